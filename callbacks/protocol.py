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

from callbacks.prompts import Prompt
from callbacks.results import run_folder, weights_step
from evaluation.weights import file_hash
from tf_lightning.files import atomic_file

PACKAGES = (
    *("torch", "lightning", "torchmetrics", "torch-fidelity", "open_clip_torch"),
    *("diffusers", "pillow", "tf-lightning"),
)


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


def weights_file(checkpoint: str | Path) -> Path:
    """Return the file that holds the weights of a checkpoint or of an exported folder."""
    exported = Path(checkpoint, "net.safetensors")
    return exported if exported.is_file() else Path(checkpoint)


def write_records(
    path: Path, records: Sequence[MetricRecord], *, checkpoint: str | None, global_step: int
) -> None:
    """Write records as a JSON file with the checkpoint and the versions of the libraries.

    Args:
        path: file to write; its folder is created.
        records: the records; values that are not finite become null, since JSON has no NaN.
        checkpoint: file of the weights, or folder of `tf-lightning export`; None during training.
        global_step: optimizer steps of the weights.
    """
    content = {
        "checkpoint": checkpoint and Path(checkpoint).name,
        "checkpoint_hash": file_hash(weights_file(checkpoint)) if checkpoint else None,
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

    Call it on every rank; rank zero writes.

    Args:
        trainer: trainer of the run.
        module: module that was evaluated.
        records: records of all metrics.
        tag: part of the file name that distinguishes several evaluations of a run.
    """
    folder = run_folder(trainer)
    if not trainer.is_global_zero:
        return
    step = weights_step(trainer, module)
    if trainer.state.fn == "fit":
        path = folder / f"metrics/step{step:07d}-{tag}.json"
        write_records(path, records, checkpoint=None, global_step=step)
        return
    path = folder / ("metrics.json" if tag == "val" else f"metrics-{tag}.json")
    write_records(path, records, checkpoint=trainer.ckpt_path, global_step=step)
    rank_zero_info(f"Wrote {path}")
