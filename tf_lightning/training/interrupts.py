"""Signals that end a run.

They are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is closed, unless `nohup` ignores that) and
SIGUSR1 (SLURM, before a time limit).

In the middle of a training step the state is not consistent, so a signal is heeded at the end of
the batch, on all ranks at the same one. Outside of training steps it is heeded at once, because
nothing changes the state there. `LastCheckpoint` saves the state when `Interrupted` is raised.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

from tf_lightning.errors import Interrupted

NAMES = "SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # not on Windows
WAIT = timedelta(seconds=60)  # for rank zero to save

Handler = Callable[[int, FrameType | None], None]


def interrupt(signum: int, frame: FrameType | None = None, on_all_ranks: bool = False) -> NoReturn:
    """Raise Interrupted; from now on only a second Ctrl-C is heeded, and ends the process at once.

    Launchers repeat their signal, which would otherwise end the saving.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    raise Interrupted(signum, on_all_ranks)


def heeded() -> list[int]:
    """Return SIGNALS without a SIGHUP that `nohup` lets the process ignore."""
    return [
        number
        for number in SIGNALS
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    ]


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Handle SIGNALS by `handler` within the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in heeded()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Interrupts(L.Callback):
    """Raises Interrupted at the end of the batch in which a rank received a signal.

    Lightning's own handlers save in the middle of a step and call collectives of torch from within
    the handler; these take their place when training starts.
    """

    def __init__(self):
        self.received = 0
        self.in_step = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Remember a signal until the end of the batch, or raise Interrupted at once."""
        if not self.in_step:
            interrupt(signum, frame)
        self.received = self.received or signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signals from here on; Lightning restores the earlier handlers at the end."""
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in heeded():
                signal.signal(number, self.handle)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training steps begin."""
        self.in_step = True

    def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:
        """Raise Interrupted on all ranks if any of them received a signal."""
        self.raise_on_all_ranks(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Heed signals at once, unless ranks that shard the model have to save together."""
        self.in_step = is_sharded(pl_module)
        self.raise_if_received()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args
    ) -> None:
        """Raise Interrupted on all ranks if the model is sharded and any received a signal."""
        if self.in_step:
            self.raise_on_all_ranks(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training steps go on."""
        self.in_step = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training steps are over."""
        self.in_step = False
        self.raise_if_received()

    def raise_if_received(self) -> None:
        """Heed a signal that came between the end of a batch and here."""
        if self.received and not self.in_step:
            interrupt(self.received)

    def raise_on_all_ranks(self, trainer: L.Trainer) -> None:
        """Raise Interrupted if any rank has received a signal."""
        received = self.received
        if trainer.world_size > 1:
            largest = torch.tensor(received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            received = int(largest)
        if received:
            interrupt(received, on_all_ranks=True)


def is_sharded(module: L.LightningModule) -> bool:
    """Whether each rank holds a part of the weights, so that saving takes all ranks."""
    return getattr(module, "device_mesh", None) is not None


def wait_for_rank_zero() -> None:
    """Wait on another rank until rank zero has ended, at most WAIT.

    Launchers kill the remaining ranks when one has failed; rank zero may still be saving.
    """
    with suppress(Exception):  # the connection to the store breaks when rank zero ends
        store = torch.distributed.distributed_c10d._get_default_store()
        store.wait(["rank zero has ended"], WAIT)


def requeues(trainer: L.Trainer, signum: int) -> bool:
    """Whether the signal is SLURM's request to save and to queue the job again."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        isinstance(environment, SLURMEnvironment)
        and environment.auto_requeue
        and signum == (environment.requeue_signal or signal.SIGUSR1)
    )


def requeue() -> None:
    """Queue this SLURM job again, as Lightning does."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    with suppress(OSError):  # no scontrol: the checkpoint is there for whoever goes on
        subprocess.run(["scontrol", "requeue", job], check=False)
