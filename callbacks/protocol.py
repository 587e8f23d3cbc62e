"""`metrics.json`: every number with everything it depends on."""

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
TOLD = {  # a table's heading: the key in a protocol
    "prompts": "num_prompts",
    "weights": "weights",
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "sampler": "sampler",
}


@dataclass(frozen=True)
class MetricRecord:
    """A measured value."""

    name: str
    value: float
    protocol: dict[str, Any]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the prompts' texts, a line each."""
    text = "\n".join(prompt.text for prompt in prompts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def installed_version(package: str) -> str | None:
    """None of what is not installed, as a checkout that is merely on Python's path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """What the libraries are, and we."""
    return {name: installed_version(name) for name in PACKAGES}


def write_numbers(
    path: Path, numbers: Sequence[MetricRecord], *, checkpoint: str | None, global_step: int
) -> None:
    """Writes the file whole or not at all.

    Args:
        path: of the JSON file; its folder is made.
        numbers: those that are not finite become null, since JSON has no NaN; what was measured.
        checkpoint: file that the weights were read from; None while training.
        global_step: optimizer steps that made the weights.
    """
    content = {
        "checkpoint": checkpoint and Path(checkpoint).name,
        "checkpoint_hash": file_hash(checkpoint) if checkpoint else None,
        "global_step": global_step,
        "versions": versions(),
        "numbers": [
            vars(number) | {"value": number.value if math.isfinite(number.value) else None}
            for number in numbers
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_numbers(
    trainer: L.Trainer, module: L.LightningModule, numbers: Sequence[MetricRecord], tag: str = "val"
) -> None:
    """Write what a validation measured, a file a step while training; else tell it, too.

    To be called on every rank; rank zero writes.
    """
    folder = run_folder(trainer)
    if not trainer.is_global_zero:
        return
    step = trainer.global_step or module.loaded_step
    if trainer.state.fn == "fit":
        path = folder / f"metrics/step{step:07d}-{tag}.json"
        write_numbers(path, numbers, checkpoint=None, global_step=step)
        return
    path = folder / ("metrics.json" if tag == "val" else f"metrics-{tag}.json")
    write_numbers(path, numbers, checkpoint=trainer.ckpt_path, global_step=step)
    print_numbers(numbers)
    rank_zero_info(f"Wrote {path}")


def print_numbers(numbers: Sequence[MetricRecord]) -> None:
    """One table of names and values; below it how the samples were made, or beside where it varies.

    (A sweep varies the guidance. What is the same in every row would leave no room for the names.)
    """
    told = {
        heading: [str(number.protocol.get(key, "")) for number in numbers]
        for heading, key in TOLD.items()
    }
    said = {heading: {*column} - {""} for heading, column in told.items()}
    varies = [heading for heading, values in said.items() if len(values) > 1]
    common = [f"{heading} {values.pop()}" for heading, values in said.items() if len(values) == 1]
    whole = [Column(heading, no_wrap=True) for heading in ("number", "value")]
    table = Table(*whole, *varies, caption=", ".join(common))
    for row, number in enumerate(numbers):
        more = [told[heading][row] for heading in varies]
        table.add_row(escape(number.name), f"{number.value:.6g}", *more)
    Console().print(table)
