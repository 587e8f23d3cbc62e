"""Train the variants of configs/experiments on the embedded world and put them in one table.

    python benchmarks/variants.py --steps 600 --out runs/small -- -c configs/small.yaml

One row a variant; its run is in `--out`/NAME. Interrupted, the same command goes on where it was: a
variant with a report of its last step is left alone, one without resumes from its last checkpoint.
All have the same rows of data, positions a step, schedule and seed: one seed, so this shows that
all of them work, not which is better. `monoformer` begins with a language model, which is trained
first, into `--out`/shapes_text; its row does not count what that took. The table is printed and
kept in `--out`/table.md.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tf_lightning.cli.main import main as tf_lightning

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "configs" / "experiments"
BEGINNINGS = {"monoformer": ROOT / "configs" / "shapes_text.yaml"}
DEFAULT = ["linear", "epsilon", "flow", "causal", "unet", "unet_patch4", "patch4", "mot"]
DEFAULT += ["monoformer", "chameleon"]
COLUMNS = {
    "one object": ("one_object", "{:.1%}"),
    "two objects": ("two_objects", "{:.1%}"),
    "captions": ("caption_accuracy", "{:.1%}"),
    "FID[shapes]": ("fid[shapes]", "{:.1f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "parameters": ("num_parameters", "{:,}"),
    "PFLOPs": ("training_pflops", "{:.3g}"),
    "pictures": ("pictures_seen", "{:,.0f}"),
    "minutes": ("minutes", "{:.1f}"),
}


def read_report(folder: Path, steps: int) -> dict | None:
    """The scores of a run that has reached its last step and was examined there."""
    for path in (folder / "report.json", folder / "validate" / "report.json"):
        report = json.loads(path.read_text()) if path.is_file() else {}
        if report.get("global_step") == steps:
            return report
    return None


def steps_done(folder: Path) -> int:
    """Optimizer steps in a run's last checkpoint."""
    last = folder / "checkpoints" / "last.ckpt"
    return torch.load(last, weights_only=True)["global_step"] if last.is_file() else 0


def train(name: str, base: Path, out: Path, steps: int, more: list[str]) -> None:
    """Train a variant from where it is; examine it if it was only not examined yet."""
    arguments = ["-c", str(base), "-c", str(EXPERIMENTS / f"{name}.yaml")]
    arguments += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    arguments += [f"--trainer.logger.init_args.save_dir={out}"]
    if name in BEGINNINGS:
        start = train_beginning(BEGINNINGS[name], out, more)
        arguments += [f"--trainer.callbacks.checkpoint={start}"]  # of InitFrom, the last of them
    arguments += more
    if steps_done(out / name) < steps:
        tf_lightning(["fit", *arguments, "--ckpt_path=last"])
    else:
        last = out / name / "checkpoints" / "last.ckpt"
        tf_lightning(["validate", *arguments, f"--ckpt_path={last}"])


def train_beginning(recipe: Path, out: Path, more: list[str]) -> Path:
    """Train the model that a variant begins with, from where it is; its last checkpoint."""
    trainer = yaml.safe_load(recipe.read_text())["trainer"]
    if steps_done(out / recipe.stem) < trainer["max_steps"]:
        save_dir = f"--trainer.logger.init_args.save_dir={out}"
        tf_lightning(["fit", "-c", str(recipe), *more, save_dir, "--ckpt_path=last"])
    return out / recipe.stem / "checkpoints" / "last.ckpt"


def in_whole_run(folder: Path) -> dict[str, float]:
    """PFLOPs, forward and backward, and pictures: what was logged of a token, times all tokens."""
    events = EventAccumulator(str(folder)).Reload()
    logged = lambda name: [e.value for e in events.Scalars(f"train/{name}")]  # noqa: E731
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = config["data"]["init_args"]
    positions = config["trainer"]["max_steps"] * data["batch_size"] * data["row_length"]
    tokens = positions * (1 - logged("padding_share")[-1])
    whole = {"training_pflops": statistics.fmean(logged("flops_per_token")) * tokens / 1e15}
    if "train/images_per_token" in events.Tags()["scalars"]:  # runs of earlier versions lack it
        whole["pictures_seen"] = statistics.fmean(logged("images_per_token")) * tokens
    return whole


def last_metrics(folder: Path, steps: int) -> dict[str, float]:
    """What the last validation measured, by name: that of `fit`, or of `validate` after it."""
    of_fit = folder / "metrics" / f"step{steps:07d}-val.json"
    for path in (of_fit, folder / "validate" / "metrics.json"):
        content = json.loads(path.read_text()) if path.is_file() else {}
        if content.get("global_step") == steps:
            return {n["name"].removeprefix("val/"): n["value"] for n in content["numbers"]}
    return {}


def row(folder: Path, report: dict) -> dict:
    """A variant's numbers, under the names of COLUMNS."""
    more = in_whole_run(folder) | {"minutes": report["train_seconds"] / 60}
    return last_metrics(folder, report["global_step"]) | report | more


def table(rows: dict[str, dict]) -> str:
    """Markdown; a number that the report does not have is a dash."""
    lines = [["variant", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name, values in rows.items():
        cells = [
            form.format(values[key]) if values.get(key) is not None else "-"
            for key, form in COLUMNS.values()
        ]
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save_every(base: Path) -> int:
    """Optimizer steps between a recipe's checkpoints."""
    callbacks = yaml.safe_load(base.read_text())["trainer"]["callbacks"]
    saves = (c for c in callbacks if c["class_path"].endswith("ModelCheckpoint"))
    return next(saves)["init_args"]["every_n_train_steps"]


def main(args: list[str] | None = None) -> None:
    """Train what is not trained yet; write the table after each variant."""
    known = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = f"rows of the table, of {', '.join(known)} (default: %(default)s)"
    parser.add_argument(
        "--variants", nargs="+", default=DEFAULT, choices=known, metavar="NAME", help=names
    )
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps a variant")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/variants"), help="folder of the runs"
    )
    parser.add_argument("--base", type=Path, default=ROOT / "configs" / "quickstart.yaml",
                        help="the recipe that every variant changes")  # fmt: skip
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
        unfinished = options.out / "table.md.unfinished"
        unfinished.write_text(table(rows))
        os.replace(unfinished, options.out / "table.md")
        print(f"\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
