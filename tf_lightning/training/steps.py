"""Optimizer steps of several batches, and checks of the trainer's settings.

With `accumulate_grad_batches`, a module receives all batches of an optimizer step at once and runs
them one after another. So it knows the number of text targets and latent elements of the whole step
before the first batch, and every mean is taken over the step. A step of the trainer is then always
an optimizer step: it validates, saves and resumes between two of them, never within one.
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor

from tf_lightning.data.stream import StreamData
from tf_lightning.errors import UserError
from tf_lightning.ranges import Range
from tf_lightning.training.horizon import duration_of, timer_of
from tf_lightning.training.precision import check_precision

LIMITS = {  # of the trainer's numbers
    "accumulate_grad_batches": Range(ge=1, note="1 accumulates nothing"),
    "gradient_clip_val": Range(ge=0, note="0 clips nothing"),
    "log_every_n_steps": Range(ge=1, note="set logger to false to log nothing (barebones sets 0)"),
    "check_val_every_n_epoch": Range(ge=1, note="null to count val_check_interval in steps"),
    "min_steps": Range(ge=0),
    "min_epochs": Range(ge=0),
}
WITHOUT_EFFECT = {  # options of the trainer that need epochs, with what to do instead
    "overfit_batches": "give the data a source of few documents",
    "reload_dataloaders_every_n_epochs": "leave it at 0",
}


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse settings of the trainer that an endless stream of rows cannot follow.

    Raises:
        UserError: a limit or an interval is out of range or never takes effect, gradients are
            accumulated over a number of batches that changes, or the precision is not supported.
    """
    check_precision(trainer.precision)
    for name, limits in LIMITS.items():
        value = getattr(trainer, name)
        if value is not None and not limits.contains(value):
            raise UserError(f"{name}={value} must be {limits}")
    for name, remedy in WITHOUT_EFFECT.items():
        if value := getattr(trainer, name):
            raise UserError(f"{name}={value} has no effect on an endless stream of rows; {remedy}")
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):
        raise UserError(
            "GradientAccumulationScheduler changes the batches of an optimizer step during the "
            "run, and resuming needs their number to be constant; remove it and set "
            "trainer.accumulate_grad_batches"
        )
    if trainer.gradient_clip_algorithm and not trainer.gradient_clip_val:
        raise UserError(
            f"gradient_clip_algorithm={trainer.gradient_clip_algorithm.value} has no effect "
            "without gradient_clip_val; give it a number above 0"
        )
    check_end(trainer)
    check_validation(trainer)


def check_end(trainer: L.Trainer) -> None:
    """Refuse a run that ends before it begins, or before its earliest end.

    Raises:
        UserError: `max_time` is 0, or `min_steps` is above `max_steps`.
    """
    timer = timer_of(trainer)
    if timer and duration_of(timer) <= 0:
        raise UserError("max_time=0 has nothing to do; give a time, as in 00:08:00:00 for 8 hours")
    least, most = trainer.min_steps or 0, trainer.max_steps
    if 0 < most < least:
        raise UserError(f"min_steps={least} is after the last step (max_steps={most})")


def check_validation(trainer: L.Trainer) -> None:
    """Refuse validations that would never come, or not after the same steps in each run.

    Raises:
        UserError: an option of the trainer's validations is out of range.
    """
    if trainer.num_sanity_val_steps < 0:  # Lightning turns -1 into infinity
        raise UserError(
            f"num_sanity_val_steps={trainer.num_sanity_val_steps} must be at least 0, or -1 for "
            "all batches"
        )
    if not hasattr(trainer, "val_check_interval"):  # Lightning keeps a time under another name
        raise UserError(
            "a val_check_interval in time would validate after other steps in each run; set it to "
            "a number of steps"
        )
    if trainer.val_check_interval == 0:
        raise UserError(
            "val_check_interval=0 must be a number of steps or a share of an epoch; set "
            "limit_val_batches to 0 for no validations"
        )
    epochs = trainer.check_val_every_n_epoch or 1
    if epochs > 1 and trainer.max_steps >= 0:
        raise UserError(
            f"check_val_every_n_epoch={epochs} never validates in a run of max_steps, which is one "
            "epoch to Lightning; set it to null and val_check_interval to a number of steps"
        )


def check_strategy(strategy: Strategy, shards: bool) -> None:
    """Refuse strategies with which the ranks would train different weights.

    Args:
        strategy: the trainer's strategy.
        shards: whether the module can shard its network with ModelParallelStrategy (FSDP2).

    Raises:
        UserError: the strategy is not supported.
    """
    name = type(strategy).__name__
    if isinstance(strategy, ModelParallelStrategy) and not shards:
        raise UserError(f"{name} cannot train an autoencoder; set trainer.strategy to ddp")
    if isinstance(strategy, ModelParallelStrategy):
        check_mesh(*mesh_sizes(strategy))
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise UserError(
            f"the strategy {name} is not supported; set trainer.strategy to auto, ddp or "
            "ModelParallelStrategy"
        )


def check_shards(trainer: L.Trainer, shard_size: int | None) -> None:
    """Refuse numbers of ranks that the strategy cannot divide as it should.

    Args:
        trainer: the trainer.
        shard_size: ranks that share one copy of the weights; None: all of them.

    Raises:
        UserError: `data_parallel_size` is not the number of ranks, or `shard_size` does not divide
            it or has no effect.
    """
    strategy, ranks = trainer.strategy, trainer.world_size
    if not isinstance(strategy, ModelParallelStrategy):
        if shard_size is not None:
            raise UserError(
                f"shard_size={shard_size} has no effect without trainer.strategy "
                "ModelParallelStrategy; leave it out, or set the strategy"
            )
        return
    size, _ = mesh_sizes(strategy)
    if size != ranks:
        raise UserError(
            f"ModelParallelStrategy has data_parallel_size={size}, but the number of ranks "
            f"(devices times num_nodes) is {ranks}; give both the same number"
        )
    check_shard_size(shard_size, ranks)


def check_shard_size(shard_size: int | None, ranks: int) -> None:
    """Refuse a number of ranks that cannot be divided into groups of `shard_size`.

    Raises:
        UserError: `shard_size` does not divide `ranks`.
    """
    if shard_size is not None and ranks % shard_size:
        raise UserError(
            f"shard_size={shard_size} does not divide the {ranks} ranks; give a divisor, such as "
            "the number of devices of a node, or null to share the weights among all ranks"
        )


def mesh_sizes(strategy: ModelParallelStrategy) -> tuple[int, int]:
    """Return the sizes of the axes of a mesh that does not exist yet: data and tensor parallel."""
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    return (
        strategy.num_nodes if data == "auto" else data,
        strategy.num_processes if tensor == "auto" else tensor,
    )


def check_mesh(data_parallel: int, tensor_parallel: int) -> None:
    """Refuse tensor parallelism, whose ranks would each train a copy of their own.

    Args:
        data_parallel: size of ModelParallelStrategy's data-parallel axis.
        tensor_parallel: size of its other axis.

    Raises:
        UserError: the second axis has more than one rank.
    """
    if tensor_parallel > 1:
        raise UserError(
            f"ModelParallelStrategy with tensor_parallel_size={tensor_parallel} is not supported; "
            "set its data_parallel_size to the number of ranks "
            f"({data_parallel * tensor_parallel}) and its tensor_parallel_size to 1"
        )


def take_whole_steps(trainer: L.Trainer) -> None:
    """Let the training loader yield the batches of an optimizer step as one list.

    The trainer then accumulates nothing itself; `give_back_steps` restores its setting.

    Raises:
        UserError: batches are to be accumulated, but the data cannot yield several at once.
    """
    data, accumulated = trainer.datamodule, trainer.accumulate_grad_batches
    if accumulated == 1:
        return
    if not isinstance(data, StreamData):
        raise UserError(
            f"{type(data).__name__} cannot yield {accumulated} batches at once; derive it from "
            "StreamData, or set accumulate_grad_batches to 1"
        )
    data.batches_at_once, trainer.accumulate_grad_batches = accumulated, 1


def give_back_steps(trainer: L.Trainer) -> None:
    """Undo `take_whole_steps`."""
    data = trainer.datamodule
    if isinstance(data, StreamData):
        trainer.accumulate_grad_batches *= data.batches_at_once
        data.batches_at_once = 1


def backward_of_part(module: L.LightningModule, loss: Tensor) -> None:
    """Add the gradients of one batch of a step; Lightning does it for the last batch.

    DDP averages gradients over ranks in the backward pass of the last batch only.
    """
    with torch.autocast(module.device.type, enabled=False):  # as Lightning does: outside autocast
        module.trainer.strategy.backward(loss, None)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, detached."""
    values = values.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


def count_steps(checkpoint: dict) -> None:
    """Let a checkpoint's progress count optimizer steps where it counts accumulated batches.

    Older versions let the trainer accumulate. A checkpoint that was saved within a step continues
    at the step's beginning, whose rows no optimizer step has read.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    steps = loops.get("epoch_loop.automatic_optimization.optim_progress")
    batches = loops.get("epoch_loop.batch_progress")
    if not steps or not batches:
        return
    for span in ("total", "current"):
        surplus = batches[span]["ready"] - steps["optimizer"]["step"][span]["completed"]
        batches[span] = {name: number - surplus for name, number in batches[span].items()}
