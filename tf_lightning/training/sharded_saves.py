"""Asynchronous sharded checkpoints of FSDP2, written while training goes on.

Training waits until the state has been copied to the memory of the host. A thread of each rank then
writes its shard, and rank zero publishes the folder when all have written; see `sharded.py`. The
link `last.ckpt` is updated and an older checkpoint is removed in the same thread, after that. At
most one checkpoint is in memory: the next save waits for the one before. A save that fails ends the
run on all ranks, before their next training step.
"""

import io
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from tf_lightning.checkpoint_file import lock_if_possible, opened, remove_leftovers
from tf_lightning.errors import UserError, first_sentence
from tf_lightning.files import partial_folder, remove, report_full_disk
from tf_lightning.sharded import (
    OPTIMIZER,
    ShardedWeights,
    ShardWriter,
    check_sharded,
    first_failure,
    is_sharded,
    read_sharded,
)


class Saves:
    """A thread that does one thing after the other, until one of them fails."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1, "checkpoints")
        self.last: Future | None = None

    def submit(self, function: Callable, *args: Any) -> None:
        """Call a function after the earlier ones, unless one of them has failed."""
        before = self.last

        def call() -> None:
            if before:
                before.result()
            function(*args)

        self.last = self.pool.submit(call)

    @property
    def failure(self) -> BaseException | None:
        """The error since the last `wait`, if one is known now; nothing is waited for.

        When something fails, everything after it fails too.
        """
        return self.last.exception() if self.last and self.last.done() else None

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all is done; raise the first error, once.

        Raises:
            TimeoutError: it takes more than `seconds`; the next call waits for the same.
        """
        if not self.last:
            return
        if not wait([self.last], seconds).done:
            raise TimeoutError(f"a checkpoint is not written after {seconds} s")
        last, self.last = self.last, None
        last.result()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with sharded checkpoints that are whole and have checksums.

    With `save_distributed_checkpoint: false`, a checkpoint is one file as with other strategies.
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.saves = Saves()

    @classmethod
    def like(cls, strategy: ModelParallelStrategy) -> "ShardedStrategy":
        """Return a strategy with the arguments of Lightning's, before a trainer uses it."""
        names = ("data_parallel_size", "tensor_parallel_size", "save_distributed_checkpoint")
        names += ("process_group_backend", "timeout")
        return cls(**{name: getattr(strategy, f"_{name}") for name in names})

    def setup_environment(self) -> None:
        """Also create a process group for the threads, apart from the collectives of training."""
        super().setup_environment()
        self.group = dist.new_group(backend="gloo", timeout=self._timeout)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights; the shards stay on the device, as `save_checkpoint` copies them."""
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer; the shards stay on the device."""
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        return get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Copy the state to the host and begin to write it; all ranks call this.

        Raises:
            UserError: the previous save failed.
        """
        if not self._save_distributed_checkpoint:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        self.saves.wait()
        folder = Path(self.broadcast(filepath)).absolute()
        partial = self.broadcast(self.is_global_zero and new_partial(folder))
        state = {"state_dict": checkpoint.pop("state_dict")}
        for number, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"{OPTIMIZER}{number}"] = optimizer
        rest = io.BytesIO()
        torch.save(checkpoint, rest)
        writer = ShardWriter(partial, folder, rest.getvalue())
        self.saves.submit(self.write, writer.stage(state), writer)

    def write(self, state: dict[str, Any], writer: ShardWriter) -> None:
        """Write a copy of the state, in the thread of each rank.

        Raises:
            UserError: a rank could not write it; rank zero also warns at once.
        """
        try:
            with report_full_disk(writer.folder.parent), opened(writer.path) as descriptor:
                if self.is_global_zero:
                    lock_if_possible(descriptor)
                dcp.save(state, storage_writer=writer, process_group=self.group)
        except (Exception, CheckpointException) as error:
            cause = first_failure(error) if isinstance(error, CheckpointException) else error
            failed = UserError(
                f"the checkpoint {writer.folder.name} could not be written "
                f"({first_sentence(cause)}); the earlier ones are whole: see to the disk, and "
                "resume with --ckpt_path last"
            )
            rank_zero_warn(f"{failed}; the run ends after this step")
            raise failed from cause
        finally:
            if self.is_global_zero:
                remove(writer.path)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint when all saves that have begun are complete."""
        self.saves.submit(super().remove_checkpoint, filepath)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; of a sharded one, each rank verifies some of the checksums.

        A file is loaded here. The weights and the state of the optimizer in a sharded checkpoint
        are loaded when the module has checked the rest.

        Raises:
            UserError: on all ranks, if a file is missing or damaged.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(path):
            return super().load_checkpoint(path, weights_only)
        self.check(path)
        return read_sharded(path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's part of the weights in a sharded checkpoint."""
        if isinstance(weights := checkpoint.get("state_dict"), ShardedWeights):
            self.lightning_module.load_state_dict(weights)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the trainer calls `load_optimizer_state_dict`."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of the optimizer state in a sharded checkpoint."""
        if not isinstance(weights := checkpoint.get("state_dict"), ShardedWeights):
            return
        for number, optimizer in enumerate(self.optimizers):
            name = f"{OPTIMIZER}{number}"
            state = {name: get_optimizer_state_dict(self.model, optimizer)}
            weights.reader.load(state, DefaultLoadPlanner())
            set_optimizer_state_dict(self.model, optimizer, state[name])

    def check(self, folder: Path) -> None:
        """Verify a sharded checkpoint together.

        Raises:
            UserError: on all ranks, if a file is missing or damaged.
        """
        refusal = ""
        try:
            check_sharded(folder, (self.global_rank, self.world_size))
        except UserError as error:
            refusal = str(error)
        refusals = [""] * self.world_size
        dist.all_gather_object(refusals, refusal, group=self.group)
        if first := next(filter(None, refusals), ""):
            raise UserError(first)


def new_partial(folder: Path) -> Path:
    """Make the folder in which a checkpoint is written, beside its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    return partial_folder(folder)


def call_when_saved(trainer: L.Trainer, function: Callable, *args: Any) -> None:
    """Call a function when all saves of a run that have begun are complete."""
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.saves.submit(function, *args)
    else:
        function(*args)


def wait_for_saves(trainer: L.Trainer, seconds: float | None = None) -> None:
    """Wait until all saves of a run that have begun are complete; raise the first error."""
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.saves.wait(seconds)


def save_has_failed(trainer: L.Trainer) -> bool:
    """Return whether this rank knows of a checkpoint that was not written; wait for none."""
    strategy = trainer.strategy
    return isinstance(strategy, ShardedStrategy) and strategy.saves.failure is not None


def end_after_failed_save(trainer: L.Trainer) -> NoReturn:
    """End the run because a rank has failed to save; all ranks call this at the same place.

    Raises:
        UserError: on all ranks, with what failed on the first of them that knows it.
    """
    failure = trainer.strategy.saves.failure
    failures = [str(failure or "")] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(failures, failures[trainer.global_rank])
    error = UserError(next(filter(None, failures)))
    error.on_all_ranks = True
    raise error from failure
