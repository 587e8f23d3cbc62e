"""Child processes that load or prepare data: they end with the process that started them."""

import ctypes
import os
import signal
import sys
import threading
import time

POLL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_parent() -> None:
    """Exit soon after the parent has ended, in whatever way.

    A killed process cannot stop its children. They would wait forever to hand over their data, as
    each of them keeps the pipe open that the others write to.
    """
    parent = os.getppid()
    if sys.platform == "linux":  # at once, whatever the process is doing
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(worker_id: int) -> None:
    """Begin a worker of a DataLoader: signals to the whole group are the training process's.

    Ctrl-C and job schedulers signal all processes of a run. The training process still needs the
    workers then, until it has saved.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent()
