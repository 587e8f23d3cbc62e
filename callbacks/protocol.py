"""`metrics.json`: every metric value with everything it depends on."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from callbacks.prompts import Prompt
from callbacks.results import run_folder
from evaluation.weights import file_hash
from tf_lightning.files import atomic_file

PACKAGES = (
    *("torch", "lightning", "torchmetrics", "torch-fidelity", "open_clip_torch"),
    *("diffusers", "pillow", "tf-lightning"),
)
COLUMNS = {  # heading in the printed table: key in a protocol
    "prompts": "num_prompts",
    "weights": "weights",
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "sampler": "sampler",
}


@dataclass(frozen=True)
class MetricRecord:
    """A metric value with its name and its protocol: everything that the value depends on."""

    name: str
    value: float
    protocol: dict[str, Any]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of the prompts' texts, one a line."""
    text = "\n".join(prompt.text for prompt in prompts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed, such as an unbuilt checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_records(
    path: Path, records: Sequence[MetricRecord], *, checkpoint: str | None, global_step: int
) -> None:
    """Write records as a JSON file with the checkpoint and the versions of the libraries.

    Args:
        path: file to write; its folder is created.
        records: the records; values that are not finite become null, since JSON has no NaN.
        checkpoint: file of the weights; None during training.
        global_step: optimizer steps of the weights.
    """
    content = {
        "checkpoint": checkpoint and Path(checkpoint).name,
        "checkpoint_hash": file_hash(checkpoint) if checkpoint else None,
        "global_step": global_step,
        "versions": {name: installed_version(name) for name in PACKAGES},
        "numbers": [
            vars(record) | {"value": record.value if math.isfinite(record.value) else None}
            for record in records
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_records(
    trainer: L.Trainer, module: L.LightningModule, records: Sequence[MetricRecord], tag: str = "val"
) -> None:
    """Write the records of a validation: one file a step in `fit`, `metrics.json` otherwise.

    Outside `fit` the records are also printed. Call it on every rank; rank zero writes.

    Args:
        trainer: trainer of the run.
        module: module that was evaluated.
        records: records of all metrics.
        tag: part of the file name that distinguishes several evaluations of a run.
    """
    folder = run_folder(trainer)
    if not trainer.is_global_zero:
        return
    step = trainer.global_step or module.loaded_step
    if trainer.state.fn == "fit":
        path = folder / f"metrics/step{step:07d}-{tag}.json"
        write_records(path, records, checkpoint=None, global_step=step)
        return
    path = folder / ("metrics.json" if tag == "val" else f"metrics-{tag}.json")
    write_records(path, records, checkpoint=trainer.ckpt_path, global_step=step)
    print_records(records)
    rank_zero_info(f"Wrote {path}")


def print_records(records: Sequence[MetricRecord]) -> None:
    """Print a table of names and values.

    A setting that varies between records has a column (in a sweep, the guidance scale). Settings
    that are equal for all records are printed once in the caption, to leave room for the names.
    """
    settings = {
        heading: [str(record.protocol.get(key, "")) for record in records]
        for heading, key in COLUMNS.items()
    }
    values = {heading: {*column} - {""} for heading, column in settings.items()}
    varying = [heading for heading, found in values.items() if len(found) > 1]
    common = [f"{heading} {found.pop()}" for heading, found in values.items() if len(found) == 1]
    fixed = [Column(heading, no_wrap=True) for heading in ("metric", "value")]
    table = Table(*fixed, *varying, caption=", ".join(common))
    for row, record in enumerate(records):
        more = [settings[heading][row] for heading in varying]
        table.add_row(escape(record.name), f"{record.value:.6g}", *more)
    Console().print(table)
