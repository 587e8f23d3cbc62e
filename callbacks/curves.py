"""Draws what a run's validations measured against its steps, from its TensorBoard events.

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
    """(optimizer steps, value) of each tag that fits a pattern, in the patterns' order.

    Where a resumed run measured a step again, the later value stands.

    Raises:
        UserError: no events in the folder, or no such tag.
    """
    if not any(run.glob("events.out.tfevents.*")):
        raise UserError(f"{run} has no TensorBoard events; give the folder of a run, runs/NAME")
    events = EventAccumulator(str(run), {SCALARS: 0}).Reload()  # 0: all points
    tags = events.Tags()[SCALARS]
    found = {tag: None for pattern in patterns for tag in tags if fnmatchcase(tag, pattern)}
    if not found:
        raise UserError(f"{run} logged nothing that fits {' '.join(patterns)}; {suggestion(tags)}")
    # Lightning logs under the number of the last batch, counted from 0.
    return {t: sorted({e.step + 1: e.value for e in events.Scalars(t)}.items()) for t in found}


def suggestion(tags: Sequence[str]) -> str:
    """What could be asked for."""
    measured = sorted(tag for tag in tags if tag.startswith("val/"))
    return f"it has {', '.join(measured or sorted(tags)) or 'no scalars'}"


def main(args: list[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(
        prog="python -m callbacks.curves",
        description="Draw what a run's validations measured against its steps, a panel a number.",
    )
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/quickstart")
    parser.add_argument("out", type=Path, help="PNG to write")
    told = "names of numbers, * fits anything (default: %(default)s)"
    parser.add_argument("--tags", nargs="+", default=TAGS, metavar="NAME", help=told)
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
