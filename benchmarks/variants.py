"""Train the variants of configs/experiments on the shapes world and put them in one table.

    python benchmarks/variants.py --steps 600 --out runs/small -- -c configs/small.yaml

Each variant is one row of the table, trained in the folder `--out`/NAME. The same command continues
an interrupted table: a variant with a report of its last step is skipped, another one resumes from
its last checkpoint. All variants have the same rows of data, positions per step, schedule and seed.
With one seed, the table shows that all of them work, not which is better.

`monoformer` starts from a language model, which is trained first in `--out`/shapes_text; its row
does not count that training. The table is printed and written to `--out`/table.md.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tf_lightning.cli.main import main as tf_lightning
from tf_lightning.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "configs" / "experiments"
INITIAL_MODELS = {"monoformer": ROOT / "configs" / "shapes_text.yaml"}
DEFAULT = ["baseline", "epsilon", "flow", "causal", "unet", "unet_patch4", "patch4", "mot"]
DEFAULT += ["monoformer", "chameleon"]
COLUMNS = {
    "one object": ("one_object", "{:.1%}"),
    "two objects": ("two_objects", "{:.1%}"),
    "captions": ("caption_accuracy", "{:.1%}"),
    "FID[shapes]": ("fid[shapes]", "{:.1f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "parameters": ("num_parameters", "{:,}"),
    "PFLOPs": ("training_pflops", "{:.3g}"),
    "images": ("images_seen", "{:,.0f}"),
    "minutes": ("minutes", "{:.1f}"),
}


def read_report(folder: Path, steps: int) -> dict | None:
    """The report of a run at its last step; None if there is none."""
    for path in (folder / "report.json", *later(folder, "report.json")):
        report = json.loads(path.read_text()) if path.is_file() else {}
        if report.get("global_step") == steps:
            return report
    return None


def steps_done(folder: Path) -> int:
    """Optimizer steps of a run's last checkpoint; 0 without one."""
    last = folder / "checkpoints" / "last.ckpt"
    return torch.load(last, weights_only=True)["global_step"] if last.is_file() else 0


def train(name: str, base: Path, out: Path, steps: int, more: list[str]) -> None:
    """Train a variant from its last checkpoint; validate it if it is trained but has no report."""
    arguments = ["-c", str(base), "-c", str(EXPERIMENTS / f"{name}.yaml")]
    arguments += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    arguments += [f"--trainer.logger.init_args.save_dir={out}"]
    if name in INITIAL_MODELS:
        start = train_initial_model(INITIAL_MODELS[name], out, more)
        arguments += [f"--init_from.checkpoint={start}"]
    arguments += more
    if steps_done(out / name) < steps:
        tf_lightning(["fit", *arguments, "--ckpt_path=last"])
    else:
        last = out / name / "checkpoints" / "last.ckpt"
        tf_lightning(["validate", *arguments, f"--ckpt_path={last}"])


def train_initial_model(recipe: Path, out: Path, more: list[str]) -> Path:
    """Train the model that a variant starts from; the path of its last checkpoint."""
    trainer = yaml.safe_load(recipe.read_text())["trainer"]
    if steps_done(out / recipe.stem) < trainer["max_steps"]:
        save_dir = f"--trainer.logger.init_args.save_dir={out}"
        tf_lightning(["fit", "-c", str(recipe), *more, save_dir, "--ckpt_path=last"])
    return out / recipe.stem / "checkpoints" / "last.ckpt"


def training_totals(folder: Path) -> dict[str, float]:
    """Training PFLOPs (forward and backward) and images, from the values logged per token."""
    events = EventAccumulator(str(folder)).Reload()

    def logged(name: str) -> list[float]:
        return [event.value for event in events.Scalars(f"train/{name}")]

    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = config["data"]["init_args"]
    positions = config["trainer"]["max_steps"] * data["batch_size"] * data["row_length"]
    tokens = positions * (1 - logged("padding_share")[-1])
    totals = {"training_pflops": statistics.fmean(logged("flops_per_token")) * tokens / 1e15}
    if "train/images_per_token" in events.Tags()["scalars"]:
        totals["images_seen"] = statistics.fmean(logged("images_per_token")) * tokens
    return totals


def later(folder: Path, name: str) -> list[Path]:
    """The files of a name that later calls of `validate` wrote for a run, newest first."""
    files = folder.glob(f"validate*/{name}")
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def last_metrics(folder: Path, steps: int) -> dict[str, float]:
    """Metrics of the last validation, by `fit` or by a later `validate`, by name."""
    of_fit = folder / "metrics" / f"step{steps:07d}-val.json"
    for path in (of_fit, *later(folder, "metrics.json")):
        content = json.loads(path.read_text()) if path.is_file() else {}
        if content.get("global_step") == steps:
            return {n["name"].removeprefix("val/"): n["value"] for n in content["numbers"]}
    return {}


def row(folder: Path, report: dict) -> dict:
    """Values of a variant by the keys of COLUMNS."""
    totals = training_totals(folder) | {"minutes": report["train_seconds"] / 60}
    return last_metrics(folder, report["global_step"]) | report | totals


def table(rows: dict[str, dict]) -> str:
    """The table as Markdown; a missing value is a dash."""
    lines = [["variant", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name, values in rows.items():
        cells = [
            form.format(values[key]) if values.get(key) is not None else "-"
            for key, form in COLUMNS.values()
        ]
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save_every(base: Path) -> int:
    """Optimizer steps between the checkpoints of a recipe."""
    return yaml.safe_load(base.read_text())["checkpoint"]["every_n_train_steps"]


def main(args: list[str] | None = None) -> None:
    """Train the variants that are not trained yet; write the table after each."""
    known = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"rows of the table, from {', '.join(known)} (default: %(default)s)"
    parser.add_argument(
        "--variants", nargs="+", default=DEFAULT, choices=known, metavar="NAME", help=names
    )
    parser.add_argument(
        "--steps", type=int, default=900, help="optimizer steps per variant (default: 900)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/variants"),
        help="folder of the runs (default: runs/variants)",
    )
    parser.add_argument(
        "--base",
        type=Path,
        default=ROOT / "configs" / "quickstart.yaml",
        help="recipe that the variants change (default: quickstart.yaml)",
    )
    parser.add_argument("more", nargs="*", help="arguments of `tf-lightning fit`, after `--`")
    options = parser.parse_args(args)
    if options.steps < 1 or options.steps % save_every(options.base):
        parser.error(
            f"--steps {options.steps} must be a multiple of {save_every(options.base)}, the steps "
            f"between checkpoints of {options.base}"
        )
    rows = {}
    for name in options.variants:
        folder = options.out / name
        if read_report(folder, options.steps) is None:
            train(name, options.base, options.out, options.steps, options.more)
        rows[name] = row(folder, read_report(folder, options.steps))
        with atomic_file(options.out / "table.md") as file:
            file.write_text(table(rows))
        print(f"\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
