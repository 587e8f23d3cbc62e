"""Signals in a run: its state is saved at a place where it is consistent, on all ranks.

In the middle of a training step the state is not consistent, so a signal takes effect when the
batch has been logged, after the same batch on all ranks. Outside of training steps it takes effect
at once, because nothing changes the state there; `Ending` then ends the other ranks.
`LastCheckpoint` saves the state when `Interrupted` is raised.
"""

import os
import signal
import subprocess
from contextlib import suppress
from types import FrameType

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

from tf_lightning.signals import handle, ignore_others, interrupt
from tf_lightning.training.ending import SAVE_SECONDS, Ending
from tf_lightning.training.sharded_saves import (
    end_after_failed_save,
    save_has_failed,
    wait_for_saves,
)


class Interrupts(L.Callback):
    """Ends a run after the batch in which a rank received a signal or failed to save.

    It replaces Lightning's handlers, which save in the middle of a step and call collectives of
    torch from within the handler.
    """

    def __init__(self):
        self.received = self.agreed = 0  # a signal of this rank, and one of any rank
        self.save_failed = False  # on any rank, in a thread that writes
        self.must_wait = False  # whether a signal waits for the end of the batch
        self.group: torch.distributed.ProcessGroup | None = None
        self.ending = Ending()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Remember a signal until the end of the batch, or raise Interrupted at once."""
        if self.must_wait:
            self.received = self.received or signum
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        elif self.ending.reason:
            ignore_others(signum)
            raise self.ending.because_of_another()
        else:
            interrupt(signum, frame)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Handle the signals and listen to the other ranks from here on."""
        self.received = self.agreed = 0
        self.save_failed = self.must_wait = False
        trainer._signal_connector.register_signal_handlers = lambda: None
        handle(self.handle, {requeue_signal(trainer)} - {None})
        self.group = group_of_hosts(trainer)
        self.ending.begin(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:
        """Find out together whether any rank received a signal or failed to save."""
        self.find_out(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args) -> None:
        """End the run for a signal or a failed save in the batch before, which is logged now."""
        self.raise_if_agreed()
        if self.save_failed:
            end_after_failed_save(trainer)
        self.must_wait = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let signals take effect at once, unless ranks that shard the model must save together."""
        self.raise_if_agreed()
        self.must_wait = has_sharded_weights(pl_module)
        self.raise_if_received()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args
    ) -> None:
        """Raise Interrupted on all ranks if the model is sharded and any received a signal."""
        if self.must_wait:
            self.find_out(trainer)
            self.raise_if_agreed()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to hold signals back, because training steps go on."""
        self.must_wait = trainer.state.fn == "fit"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let signals take effect at once, because training steps are over."""
        self.raise_if_agreed()
        self.must_wait = False
        self.raise_if_received()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the work of the other ranks, before the run is recorded as complete."""
        self.ending.finish(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for the work of the other ranks."""
        self.ending.finish(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tell the other ranks, before `LastCheckpoint` saves."""
        forget_unstarted_loaders(trainer)
        with suppress(Exception):  # `exception` is the one to report
            wait_for_saves(trainer, SAVE_SECONDS)  # the other ranks' threads still answer
        self.ending.tell(trainer, exception, has_sharded_weights(pl_module))

    def raise_if_received(self) -> None:
        """Raise Interrupted for a signal that came after the end of the last batch."""
        if self.received and not self.must_wait:
            interrupt(self.received)

    def raise_if_agreed(self) -> None:
        """Raise Interrupted on all ranks, at the same place, if any has received a signal."""
        if self.agreed:
            interrupt(self.agreed, on_all_ranks=True)

    def find_out(self, trainer: L.Trainer) -> None:
        """Find the largest number of a signal that any rank received, and whether a save failed."""
        found = [self.received, int(save_has_failed(trainer))]
        if trainer.world_size > 1:
            largest = torch.tensor(found)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
            found = largest.tolist()
        self.agreed, self.save_failed = found[0], bool(found[1])


def group_of_hosts(trainer: L.Trainer) -> torch.distributed.ProcessGroup | None:
    """Return a process group for tensors on the CPU; None is the default group.

    To read the result of a collective on a GPU, the host would wait for the work of the step.
    """
    if trainer.world_size == 1 or trainer.strategy.root_device.type == "cpu":
        return None
    timeout = getattr(trainer.strategy, "_timeout", None)  # as for its own collectives
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def forget_unstarted_loaders(trainer: L.Trainer) -> None:
    """Forget loaders whose iterator could not be made.

    Lightning's teardown asks for their length, and its RuntimeError would take the place of the
    signal or the error that ends the run.
    """
    fit, others = trainer.fit_loop, (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    for loop in (fit, fit.epoch_loop.val_loop, *others):
        loader = loop._data_fetcher and loop._data_fetcher._combined_loader
        if loader is not None and loader._iterator is None:
            loop._data_fetcher._combined_loader = None


def has_sharded_weights(module: L.LightningModule) -> bool:
    """Return whether each rank holds a part of the weights, so that saving takes all ranks."""
    return getattr(module, "device_mesh", None) is not None


def requeue_signal(trainer: L.Trainer) -> int | None:
    """Return the signal by which SLURM asks to save and to queue the job again; None without."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def requeue() -> None:
    """Queue this SLURM job again, as Lightning does."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    with suppress(OSError):  # without scontrol the run can be resumed by hand
        subprocess.run(["scontrol", "requeue", job], check=False)
