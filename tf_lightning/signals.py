"""Signals that end a command: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (SLURM) and SIGHUP.

SIGHUP says that the terminal is closed; `nohup` lets a process ignore it. SIGUSR1 comes from SLURM
before a time limit. SLURM may be told to send SIGUSR2 instead.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from tf_lightning.errors import Interrupted

NAMES = "SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # not on Windows
BLOCKED_IN_WORKERS = {*SIGNALS, getattr(signal, "SIGUSR2", signal.SIGTERM)}

Handler = Callable[[int, FrameType | None], None]


def interrupt(signum: int, frame: FrameType | None = None, on_all_ranks: bool = False) -> NoReturn:
    """Raise Interrupted. After that only a second Ctrl-C has an effect: it ends the process.

    Launchers repeat their signal, which would otherwise end the saving.
    """
    ignore_others(signum)
    raise Interrupted(signum, on_all_ranks)


def ignore_others(signum: int) -> None:
    """Ignore all further signals but Ctrl-C, which ends the process at once."""
    if threading.current_thread() is threading.main_thread():
        for number in {*SIGNALS, signum}:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


def handle(handler: Handler, more: Iterable[int] = ()) -> dict[int, Handler]:
    """Handle SIGNALS and `more` by `handler`, except a SIGHUP that `nohup` lets the process ignore.

    Returns:
        The earlier handlers; none outside of the main thread, where nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = {
        number
        for number in SIGNALS
        if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
    }
    return {number: signal.signal(number, handler) for number in {*SIGNALS, *more} - ignored}


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Handle SIGNALS by `handler` within the block."""
    before = handle(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def blocked() -> Iterator[None]:
    """Block the signals until the block ends, also in processes that start in it.

    A new process has the handlers of this process or those of the system, so a signal could end it
    before it has set its own.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_IN_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
