"""Short trainings by several processes, each of several configurations one after another."""

import json
import os
from pathlib import Path

from lightning.pytorch.strategies import ModelParallelStrategy

from support.fits import Rates, fit, shapes_data, shapes_module
from support.ranks import run_ranks

ROWS, STEPS = 4, 20  # rows a step


def losses_of(folder: Path, ranks: int, configurations: list[dict]) -> list[dict]:
    """Train by `ranks` processes, which share the data in a folder; return what rank zero saw.

    Args:
        folder: data and results.
        ranks: number of processes; 1 trains in this process, without sharding.
        configurations: options of the module for each training.

    Returns:
        For each configuration, the loss and the gradient norm of each step.
    """
    if ranks == 1:
        return [train(folder, 1, options) for options in configurations]
    run_ranks((folder, ranks, configurations), ranks, run=_train_all)
    return json.loads((folder / f"{ranks}.json").read_text())


def _train_all(arguments: tuple[Path, int, list[dict]]) -> None:
    """Train as one of several processes."""
    folder, ranks, configurations = arguments
    found = [train(folder, ranks, options) for options in configurations]
    if os.environ["LOCAL_RANK"] == "0":
        (folder / f"{ranks}.json").write_text(json.dumps(found))


def train(folder: Path, ranks: int, options: dict) -> dict[str, list[float]]:
    """Train STEPS steps of ROWS rows; `precision` and `accumulate` are the trainer's."""
    options = dict(options)
    accumulate = options.pop("accumulate", 1)
    how = {"max_steps": STEPS, "accumulate_grad_batches": accumulate}
    how |= {"precision": options.pop("precision", "32-true"), "gradient_clip_val": 1.0}
    if ranks > 1:
        strategy = ModelParallelStrategy(ranks, 1, process_group_backend="gloo")
        how |= {"devices": ranks, "strategy": strategy}
    sizes = options.pop("sizes", {})
    module = shapes_module(warmup_steps=2, lr=1e-3, sizes=sizes, **options)
    data = shapes_data(folder, batch_size=ROWS // ranks // accumulate)
    rates = Rates()
    fit(module, data, callbacks=[rates], **how)
    return {"loss": rates.losses, "grad_norm": rates.norms}
