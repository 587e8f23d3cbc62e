"""Short trainings by several processes, each of which trains several configurations in turn."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.fits import Rates, fit, shapes_data, shapes_module
from support.ranks import run_ranks
from tf_lightning.data.stream import as_batches
from tf_lightning.training.checkpoint_io import CheckedCheckpointIO
from tf_lightning.training.sharded_saves import ShardedStrategy, wait_for_saves

ROWS, STEPS = 4, 20  # rows a step, and steps of a whole training


def train(folder: Path, ranks: int, legs: list[dict[str, Any]]) -> list[dict[str, list]]:
    """Train by `ranks` processes, which share the data in a folder.

    Args:
        folder: data and results.
        ranks: number of processes; 1 trains in this process, without sharding.
        legs: for each training, its `options`, those of the module with `precision` and
            `accumulate` of the trainer. Optional: `start`, a checkpoint to resume; `stop`, the step
            after which it ends; `save`, the checkpoint that it then writes.

    Returns:
        For each training `loss`, `grad_norm` and `rows`, with an entry for each step, and
        `weights` and `optimizer`, with a checksum of each rank's part at the end.
    """
    if ranks == 1:
        return [train_leg(folder, 1, **leg) for leg in legs]
    run_ranks((folder, ranks, legs), ranks, run=_train_legs)
    return json.loads((folder / f"{ranks}.json").read_text())


def _train_legs(arguments: tuple[Path, int, list[dict]]) -> None:
    """Train as one of several processes."""
    folder, ranks, legs = arguments
    found = [train_leg(folder, ranks, **leg) for leg in legs]
    if os.environ["LOCAL_RANK"] == "0":
        (folder / f"{ranks}.json").write_text(json.dumps(found))


def train_leg(
    folder: Path,
    ranks: int,
    options: dict[str, Any],
    start: Path | None = None,
    stop: int = STEPS,
    save: Path | None = None,
) -> dict[str, list]:
    """Train ROWS rows a step; see `train`."""
    options = dict(options)
    accumulate = options.pop("accumulate", 1)
    how = {"max_steps": STEPS, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    how |= {"precision": options.pop("precision", "32-true"), "plugins": [CheckedCheckpointIO()]}
    if ranks > 1:
        sizes = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
        strategy = ShardedStrategy(**sizes, process_group_backend="gloo")
        how |= {"devices": ranks, "strategy": strategy, "plugins": []}
    module = shapes_module(warmup_steps=2, lr=1e-3, **options)
    data = shapes_data(folder, batch_size=ROWS // ranks // accumulate)
    record = Record(stop, save)
    fit(module, data, ckpt_path=start, callbacks=[record], **how)
    return record.found | {"loss": record.losses, "grad_norm": record.norms}


class Record(Rates):
    """Also keeps checksums of the rows of each step and of the state at the end, and saves it."""

    def __init__(self, stop: int, save: Path | None):
        super().__init__(stop)
        self.save = save
        self.found: dict[str, list] = {"rows": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        ids = [row for part in as_batches(batch) for row in part.input_ids]
        rows = [zlib.crc32(row.numpy().tobytes()) for row in ids]
        self.found["rows"].append(sorted(sum(of_all_ranks(rows), [])))
        if trainer.global_step == self.stop_after:
            optimizer = trainer.optimizers[0]
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            state = [x for w in weights for _, x in sorted(optimizer.state[w].items())]
            self.found["weights"] = of_all_ranks(checksum(module.state_dict().values()))
            self.found["optimizer"] = of_all_ranks(checksum(state))
            if self.save:
                trainer.save_checkpoint(self.save)
                wait_for_saves(trainer)


def of_all_ranks(value: Any) -> list:
    """The values of all ranks, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def checksum(tensors: Iterable[Tensor]) -> str:
    """A checksum of this rank's parts of tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total.update(part.detach().contiguous().numpy().tobytes())
    return total.hexdigest()
