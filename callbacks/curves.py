"""Plots the validation metrics of a run against its steps, from its TensorBoard events.

python -m callbacks.curves runs/quickstart docs/curves.png
python -m callbacks.curves runs/quickstart loss.png --tags 'val/*/loss_*' train/loss
"""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from callbacks.plot import Line, line_plots
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file

TAGS = ["val/fid*", "val/clip_score*", "val/composition*/overall", "val/*/perplexity"]


def read_curves(run: Path, patterns: Sequence[str]) -> dict[str, Line]:
    """Read the points (optimizer steps, value) of each tag that matches a pattern.

    The tags are in the order of the patterns. If a resumed run repeated a step, its later value is
    used.

    Raises:
        UserError: the folder has no events, or no tag matches.
    """
    if not any(run.glob("events.out.tfevents.*")):
        raise UserError(f"{run} has no TensorBoard events; give the folder of a run, runs/NAME")
    events = EventAccumulator(str(run), {SCALARS: 0}).Reload()  # 0: all points
    tags = events.Tags()[SCALARS]
    found = {tag: None for pattern in patterns for tag in tags if fnmatchcase(tag, pattern)}
    if not found:
        raise UserError(f"{run} has no tag that matches {' '.join(patterns)}; {suggestion(tags)}")
    # Lightning logs the index of the last step, which counts from 0.
    return {t: sorted({e.step + 1: e.value for e in events.Scalars(t)}.items()) for t in found}


def suggestion(tags: Sequence[str]) -> str:
    """List the available tags."""
    measured = sorted(tag for tag in tags if tag.startswith("val/"))
    return f"available are {', '.join(measured or sorted(tags)) or 'none'}"


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m callbacks.curves",
        description="Plot the validation metrics of a run against its steps, one panel each.",
    )
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/quickstart")
    parser.add_argument("out", type=Path, help="PNG file to write")
    tags_help = "names of metrics; * matches any text (default: %(default)s)"
    parser.add_argument("--tags", nargs="+", default=TAGS, metavar="TAG", help=tags_help)
    options = parser.parse_args(args)
    lines = read_curves(options.run, options.tags)
    page = line_plots({tag.removeprefix("val/"): line for tag, line in lines.items()}, "step")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out) as file:
        page.save(file, format="PNG")
    print(f"Wrote {options.out}: {', '.join(lines)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"callbacks.curves: error: {error}")
