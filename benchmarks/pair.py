"""Two runs on one page: every number they share, at equal tokens and at equal 6 N D.

    python benchmarks/pair.py runs/linear runs/chameleon --out runs/pair

Of runs with one row length, batch size and source of documents, such as these, each validated
several times (`--trainer.val_check_interval 240`):
    tf-lightning fit -c configs/quickstart.yaml -c configs/experiments/linear.yaml
    tf-lightning fit -c configs/quickstart.yaml -c configs/experiments/chameleon.yaml
Writes `--out`.md, whose first lines say what the budgets are worth on either side, and `--out`.png,
each number against training FLOPs. Between validations values are interpolated.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.plot import Line, line_plots
from tf_lightning.files import atomic_file

NOT_SHARED = ("loss_codes", "loss_diffusion")  # of one side alone


@dataclass(frozen=True)
class Run:
    """A run's validations, and what a step costs it."""

    name: str
    numbers: dict[str, Line]  # (optimizer steps, value) by name
    tokens: float  # a step
    flops: float  # a token, as counted
    flops_6n: float  # a token, 6 N
    images: float  # a token

    @property
    def steps(self) -> float:
        """At the last validation."""
        return max(step for line in self.numbers.values() for step, _ in line)

    def at(self, number: str, step: float) -> float:
        """A number at a step, between validations interpolated."""
        steps, values = zip(*self.numbers[number], strict=True)
        return float(np.interp(step, steps, values))

    def against_flops(self, number: str) -> Line:
        """(training PFLOPs, value)."""
        step = self.tokens * self.flops / 1e15
        return [(steps * step, value) for steps, value in self.numbers[number]]


def read_run(folder: Path) -> Run:
    """What a run has written."""
    numbers: dict[str, Line] = {}
    for file in sorted(folder.glob("metrics/step*-val.json")):
        content = json.loads(file.read_text())
        for number in content["numbers"]:
            if number["value"] is not None:
                point = content["global_step"], number["value"]
                numbers.setdefault(number["name"].removeprefix("val/"), []).append(point)
    if not numbers:
        raise SystemExit(f"{folder} has no metrics/step*-val.json; validate while training")
    events = EventAccumulator(str(folder)).Reload()
    mean = lambda name: statistics.fmean(e.value for e in events.Scalars(f"train/{name}"))  # noqa: E731
    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]
    filled = 1 - events.Scalars("train/padding_share")[-1].value
    return Run(
        folder.name,
        numbers,
        tokens=data["batch_size"] * data["row_length"] * filled,
        flops=mean("flops_per_token"),
        flops_6n=mean("flops_per_token_6n"),
        images=mean("images_per_token"),
    )


def budgets(runs: list[Run]) -> dict[str, list[float]]:
    """Steps of each run at the largest budget that both have reached, by kind of budget."""
    costs = {
        "equal tokens": [run.tokens for run in runs],
        "equal 6ND": [run.tokens * run.flops_6n for run in runs],
        "equal pictures": [run.tokens * run.images for run in runs],
    }
    return {
        kind: [min(c * r.steps for c, r in zip(each, runs, strict=True)) / c for c in each]
        for kind, each in costs.items()
    }


def page(runs: list[Run]) -> str:
    """Markdown."""
    columns = [
        (f"{run.name}, {kind}", run, step)
        for kind, steps in budgets(runs).items()
        for run, step in zip(runs, steps, strict=True)
    ]
    rows = {
        "steps": [f"{step:,.0f}" for _, _, step in columns],
        "tokens": [f"{step * run.tokens:,.0f}" for _, run, step in columns],
        "6ND, PFLOPs": [
            f"{step * run.tokens * run.flops_6n / 1e15:.3g}" for _, run, step in columns
        ],
        "FLOPs counted, P": [
            f"{step * run.tokens * run.flops / 1e15:.3g}" for _, run, step in columns
        ],
        "pictures": [f"{step * run.tokens * run.images:,.0f}" for _, run, step in columns],
    }
    rows |= {name: [f"{run.at(name, s):.4g}" for _, run, s in columns] for name in shared(runs)}
    head = ["", *(title for title, _, _ in columns)]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shared(runs: list[Run]) -> list[str]:
    """Names of the numbers that both have."""
    first, second = runs
    return [n for n in first.numbers if n in second.numbers and not n.endswith(NOT_SHARED)]


def main(args: list[str] | None = None) -> None:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, help="folders of the two runs")
    parser.add_argument("--out", type=Path, default=Path("runs/pair"), help="page, without suffix")
    options = parser.parse_args(args)
    runs = [read_run(folder) for folder in options.runs]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = {n: {run.name: run.against_flops(n) for run in runs} for n in shared(runs)}
    with atomic_file(options.out.with_suffix(".png")) as file:
        line_plots(lines, "training PFLOPs").save(file, format="PNG")
    with atomic_file(options.out.with_suffix(".md")) as file:
        file.write_text(page(runs))
    print(f"{page(runs)}\nWrote {options.out}.md and .png")


if __name__ == "__main__":
    main()
