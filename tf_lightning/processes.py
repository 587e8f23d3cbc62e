"""Child processes that load or prepare data.

They end with the process that started them, and only that process handles signals.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from tf_lightning.signals import BLOCKED_IN_WORKERS, blocked

POLL_SECONDS = 1.0
END_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Loader(DataLoader):
    """A DataLoader whose workers begin with all signals blocked.

    Ctrl-C and job schedulers signal all processes of a run. The training process still needs its
    workers then, until it has saved. Give it `start_worker` as `worker_init_fn`.
    """

    def __iter__(self) -> Iterator[Any]:
        """Start the workers."""
        context = self.multiprocessing_context or multiprocessing
        if context.get_start_method() != "fork":
            resource_tracker.ensure_running()  # its start would let the signals through
        with blocked():
            return super().__iter__()


def end_with_parent(wait: Callable[[int], bool | None] | None = None) -> None:
    """Exit soon after the parent has ended, in whatever way.

    A killed process cannot stop its children. They would wait forever to hand over their data, as
    each of them keeps the pipe open that the others write to.

    Args:
        wait: waits a moment and returns whether to end now; it is given the parent's number.
    """
    # A process of a fork server has that server as the parent that the system knows.
    parent, started_by = multiprocessing.parent_process(), os.getppid()
    wait = wait or (lambda parent: time.sleep(POLL_SECONDS))
    if sys.platform == "linux":  # at once, whatever the process is doing
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == started_by and parent.is_alive() and not wait(parent.pid):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def end_processes(processes: Iterable[BaseProcess]) -> None:
    """Wait for processes to end, and kill those that still run after `END_SECONDS`.

    They may be importing torch, or be in the middle of a long text.
    """
    latest = time.monotonic() + END_SECONDS
    for process in processes:
        process.join(max(0, latest - time.monotonic()))
        process.kill()


def start_worker(worker_id: int = 0) -> None:
    """Set up a process that loads or prepares data: only its parent's SIGTERM ends it."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_IN_WORKERS)
    end_with_parent(is_ended_by if hasattr(signal, "sigtimedwait") else None)  # not on macOS


def is_ended_by(parent: int) -> bool:
    """Wait at most POLL_SECONDS for a signal; return whether it is the parent's SIGTERM."""
    received = signal.sigtimedwait(BLOCKED_IN_WORKERS, POLL_SECONDS)
    return bool(received) and (received.si_signo, received.si_pid) == (signal.SIGTERM, parent)
