"""All ranks end together: when one rank fails or receives a signal, the others end too.

Otherwise they would wait for it in a collective, with NCCL forever. A rank that ends before the
others writes the reason into the store of the process group and closes its connections, so that the
others leave their collectives. Each rank has a thread that reads the store and interrupts the main
thread. Rank zero saves; the others wait for that, because launchers kill all ranks when one has
ended.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
import torch.distributed as dist

from tf_lightning.errors import Interrupted, UserError

POLL_SECONDS = 0.5  # between two reads of the store
GRACE = 5.0  # seconds for ranks to fail by themselves, and to leave a collective
LEAVE_SECONDS = 15.0  # for which rank zero waits for the others after it has saved
STUCK_SECONDS = 120.0  # after which a rank that does not end with the others is killed
WORK_SECONDS = 3600.0  # for which rank zero waits for the others' work at the end
SAVE_SECONDS = 600.0  # for which the others wait until rank zero has saved

# Keys of the store: why the run ends; who failed; how many ranks have left; whether rank zero is
# leaving, and whether it has saved.
REASON, FAILED, LEFT, LEAVING, SAVED = "reason", "failed", "left", "leaving", "saved"


class Ending:
    """Lets all ranks of a run end when one of them ends.

    Attributes:
        reason: why the run ends, the same on all ranks: the rank that ended first, its signal or 0,
            and a sentence. None while no rank has ended before the others.
    """

    def __init__(self):
        self.store: Any = None
        self.reason: tuple[int, int, str] | None = None
        self.is_leaving = threading.Event()
        self.launched: list = []  # processes that Lightning has started as the other ranks

    def begin(self, trainer: L.Trainer) -> None:
        """Listen from now on, if there are several ranks; a later call changes nothing."""
        if trainer.world_size > 1 and dist.is_initialized() and self.store is None:
            store = dist.distributed_c10d._get_default_store()
            self.store = dist.PrefixStore("tf_lightning ending", store)
            threading.Thread(target=self.listen, args=(trainer,), daemon=True).start()

    def listen(self, trainer: L.Trainer) -> None:
        """Wait for a reason, then make this rank end."""
        with suppress(Exception):  # the store's own rank has ended
            while not self.store.check([REASON]):
                if self.is_leaving.wait(POLL_SECONDS):
                    return
            self.read()
            self.take_launched(trainer)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        if self.reason and not self.is_leaving.wait(GRACE):
            close_connections()  # ends this rank's own collectives with NCCL
            if not self.is_leaving.wait(STUCK_SECONDS):
                os._exit(1)

    def read(self) -> None:
        """Read the reason, if there is one."""
        with suppress(Exception):
            if self.store.check([REASON]):
                self.reason = tuple(json.loads(self.store.get(REASON)))

    def tell(self, trainer: L.Trainer, error: BaseException, is_sharded: bool) -> None:
        """Tell the other ranks that this one ends, unless all of them do so at the same place.

        Args:
            trainer: trainer of the run.
            error: the error that ends this rank. Its attribute `on_all_ranks` is set if all ranks
                raise it.
            is_sharded: whether all ranks have to save together; then they are given time to fail.
        """
        self.is_leaving.set()
        self.take_launched(trainer)
        if self.store is not None and trainer.is_global_zero:
            self.store.set(LEAVING, "")
        if self.store is None or getattr(error, "on_all_ranks", False):
            return
        with suppress(Exception):  # the store's own rank has ended
            if is_sharded and self.all_fail_alike(trainer, error):
                error.on_all_ranks = True
                return
            signum = getattr(error, "signum", 0)
            reason = json.dumps([trainer.global_rank, signum, describe(error)])
            self.reason = tuple(json.loads(self.store.compare_set(REASON, "", reason)))
        close_connections()

    def all_fail_alike(self, trainer: L.Trainer, error: BaseException) -> bool:
        """Return whether every rank raises the same error at the same step within GRACE."""
        key = f"{FAILED} {trainer.global_step} {describe(error)}"
        self.store.add(key, 1)
        deadline = time.monotonic() + GRACE
        while self.store.add(key, 0) < trainer.world_size:
            if time.monotonic() > deadline or self.store.check([REASON]):
                return False
            time.sleep(0.05)
        return True

    def take_launched(self, trainer: L.Trainer) -> None:
        """Take over the other ranks' processes: Lightning kills rank zero when one has ended."""
        launched = getattr(trainer.strategy.launcher, "procs", [])
        while launched:
            self.launched.append(launched.pop())

    def finish(self, trainer: L.Trainer) -> None:
        """Let rank zero wait until the others have done their work too; a later call does nothing.

        Raises:
            Interrupted: another rank has failed in it.
        """
        if self.store is None or self.is_leaving.is_set():
            return
        if trainer.is_global_zero:
            self.wait_for_others(trainer, WORK_SECONDS)
        else:
            self.store.add(LEFT, 1)
        self.read()
        self.is_leaving.set()
        if self.reason:
            raise self.because_of_another()

    def wait_for_others(self, trainer: L.Trainer, seconds: float) -> None:
        """Wait until all ranks but zero leave the run."""
        wait_until(lambda: self.store.add(LEFT, 0) >= trainer.world_size - 1, seconds)

    def because_of_another(self) -> Interrupted:
        """Return the exception for the reason of another rank."""
        rank, signum, text = self.reason
        return Interrupted(signum, failure="" if signum else f"rank {rank} failed: {text}")

    @contextmanager
    def together(self, trainer: L.Trainer) -> Iterator[None]:
        """Run the trainer in the block; when an error ends it, all ranks end, rank zero last.

        Raises:
            Interrupted: on rank zero, if another rank ended before it.
            SystemExit: on any other rank that a signal or the end of another rank has ended.
        """
        try:
            yield
        except BaseException as error:
            self.leave(trainer)
            is_own = self.reason is None or self.reason[0] == trainer.global_rank
            first = error if is_own else self.because_of_another()
            # Rank zero reports it.
            if isinstance(first, Interrupted) and not trainer.is_global_zero:
                raise SystemExit(first.exit_code) from error
            if is_own:
                raise
            raise first from error

    def leave(self, trainer: L.Trainer) -> None:
        """Let rank zero end last after an error, and end the ranks that it has started."""
        self.is_leaving.set()
        self.take_launched(trainer)
        with suppress(Exception):  # the store's own rank has ended
            if self.store is not None and trainer.is_global_zero:
                self.wait_for_others(trainer, LEAVE_SECONDS)
                self.store.set(SAVED, "")
            elif self.store is not None:
                self.store.add(LEFT, 1)
                # If rank zero is still in a collective, the end of this process gets it out.
                wait_until(lambda: self.store.check([LEAVING]), 2 * GRACE)
                if self.store.check([LEAVING]):
                    wait_until(lambda: self.store.check([SAVED]), SAVE_SECONDS)
        for process in self.launched:
            if self.store is None:
                process.terminate()
            wait_until(lambda process=process: has_ended(process), LEAVE_SECONDS)
            process.kill()


def describe(error: BaseException) -> str:
    """Return the first line of an error; with its type, unless it is a sentence for the user."""
    lines = str(error).strip().splitlines() or ["no message"]
    is_sentence = isinstance(error, UserError | Interrupted)
    return lines[0] if is_sentence else f"{type(error).__name__}: {lines[0]}"


def close_connections() -> None:
    """Close this rank's connections to the others, which raises an error in their collectives."""
    with suppress(Exception):  # another thread has closed them
        dist.distributed_c10d._abort_process_group()


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds, at most so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)


def has_ended(process: Any) -> bool:
    """Return whether a process of `subprocess` or of `multiprocessing` has ended."""
    return not process.is_alive() if hasattr(process, "is_alive") else process.poll() is not None
