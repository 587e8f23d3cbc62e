"""Compare two runs on one page: every metric they share, at equal tokens and at equal 6 N D.

    python benchmarks/pair.py runs/baseline runs/chameleon --out runs/pair

The runs must have the same row length, batch size and data, and must be validated several times
(`--trainer.val_check_interval 240`). For example:
    tf-lightning fit -c configs/quickstart.yaml -c configs/experiments/baseline.yaml
    tf-lightning fit -c configs/quickstart.yaml -c configs/experiments/chameleon.yaml

`--out`.md has a column for each run and budget. Its first lines give the steps, tokens, FLOPs and
images of each budget. `--out`.png plots each metric against training FLOPs. Values between two
validations are interpolated.
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

NOT_COMPARABLE = ("loss_codes", "loss_diffusion")  # each exists for one kind of image only


@dataclass(frozen=True)
class Run:
    """Metrics and costs of a run."""

    name: str
    metrics: dict[str, Line]  # [(optimizer step, value), ...] by name
    tokens_per_step: float
    flops_per_token: float  # counted
    flops_per_token_6n: float  # 6 N, N = parameters
    images_per_token: float

    @property
    def steps(self) -> float:
        """Step of the last validation."""
        return max(step for line in self.metrics.values() for step, _ in line)

    def at(self, metric: str, step: float) -> float:
        """A metric at a step, interpolated between validations."""
        steps, values = zip(*self.metrics[metric], strict=True)
        return float(np.interp(step, steps, values))

    def against_flops(self, metric: str) -> Line:
        """[(training PFLOPs, value), ...] of a metric."""
        per_step = self.tokens_per_step * self.flops_per_token / 1e15
        return [(step * per_step, value) for step, value in self.metrics[metric]]


def read_run(folder: Path) -> Run:
    """Read the metrics and costs that a run wrote.

    Raises:
        SystemExit: the run has no validations.
    """
    metrics: dict[str, Line] = {}
    for file in sorted(folder.glob("metrics/step*-val.json")):
        content = json.loads(file.read_text())
        for number in content["numbers"]:
            if number["value"] is not None:
                point = content["global_step"], number["value"]
                metrics.setdefault(number["name"].removeprefix("val/"), []).append(point)
    if not metrics:
        raise SystemExit(f"{folder} has no metrics/step*-val.json; validate while training")
    events = EventAccumulator(str(folder)).Reload()

    def mean(name: str) -> float:
        return statistics.fmean(event.value for event in events.Scalars(f"train/{name}"))

    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]
    filled = 1 - events.Scalars("train/padding_share")[-1].value
    return Run(
        folder.name,
        metrics,
        tokens_per_step=data["batch_size"] * data["row_length"] * filled,
        flops_per_token=mean("flops_per_token"),
        flops_per_token_6n=mean("flops_per_token_6n"),
        images_per_token=mean("images_per_token"),
    )


def budgets(runs: list[Run]) -> dict[str, list[float]]:
    """Steps of each run at the largest budget that both have reached, by kind of budget."""
    costs_per_step = {
        "equal tokens": [run.tokens_per_step for run in runs],
        "equal 6ND": [run.tokens_per_step * run.flops_per_token_6n for run in runs],
        "equal images": [run.tokens_per_step * run.images_per_token for run in runs],
    }
    return {
        kind: [min(c * r.steps for c, r in zip(costs, runs, strict=True)) / c for c in costs]
        for kind, costs in costs_per_step.items()
    }


def page(runs: list[Run]) -> str:
    """The comparison as a Markdown table."""
    columns = [
        (f"{run.name}, {kind}", run, step)
        for kind, steps in budgets(runs).items()
        for run, step in zip(runs, steps, strict=True)
    ]
    budget = [(run, step * run.tokens_per_step) for _, run, step in columns]
    rows = {
        "steps": [f"{step:,.0f}" for _, _, step in columns],
        "tokens": [f"{tokens:,.0f}" for _, tokens in budget],
        "6ND, PFLOPs": [f"{tokens * run.flops_per_token_6n / 1e15:.3g}" for run, tokens in budget],
        "counted PFLOPs": [f"{tokens * run.flops_per_token / 1e15:.3g}" for run, tokens in budget],
        "images": [f"{tokens * run.images_per_token:,.0f}" for run, tokens in budget],
    }
    rows |= {name: [f"{run.at(name, s):.4g}" for _, run, s in columns] for name in shared(runs)}
    head = ["", *(title for title, _, _ in columns)]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shared(runs: list[Run]) -> list[str]:
    """Names of the metrics that both runs have."""
    first, second = runs
    return [n for n in first.metrics if n in second.metrics and not n.endswith(NOT_COMPARABLE)]


def main(args: list[str] | None = None) -> None:
    """Write the page and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs=2, type=Path, help="folders of the two runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/pair"),
        help="path of the page without suffix (default: runs/pair)",
    )
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
