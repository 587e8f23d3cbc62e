"""Commands in forked processes that are killed or signalled at a chosen place.

The processes are forks of a server that has imported the project, so that a run takes seconds. Each
rank reports to the process that started it when a phase begins and ends, and when a step ends.
"""

import builtins
import faulthandler
import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import rank_zero_only

from tf_lightning.cli.main import main
from tf_lightning.data import Mixture
from tf_lightning.signals import SIGNALS
from tf_lightning.training import last_checkpoint
from tf_lightning.training.interrupts import Interrupts
from tf_lightning.training.sharded_saves import ShardedStrategy

PRELOADED = [
    "support.killed_runs",
    *("tf_lightning.cli.lightning", "tf_lightning.cli.prepare", "diffusers", "tensorboard"),
    *("callbacks.evaluate", "callbacks.metrics", "callbacks.geneval", "callbacks.shapes_report"),
    *("callbacks.retrieval", "callbacks.throughput", "callbacks.gradient_norms"),
    "support.parsed",
]
multiprocessing.set_forkserver_preload(PRELOADED)
PHASES: dict[str, list[tuple[Any, str]]] = {  # the functions that are the phases of a run
    "prepare": [(Mixture, "prepare_data")],
    "save": [(L.Trainer, "save_checkpoint"), (last_checkpoint, "link_to")],
    "validation": [(_EvaluationLoop, "run")],
    "examination": [(_FitLoop, "on_run_end")],
}
WRITE = "write"  # the phase of a sharded run in which a thread writes a checkpoint
WHOLE = "run"  # the phase from the start of a command to its end
CALLS = ("replace", "rename", "fsync", "unlink", "remove", "mkdir", "rmdir", "symlink", "open")
LOG = "events.out.tfevents."
PATIENCE = 120  # seconds for the other ranks to end, and for children of an ended rank
LIMIT = 600  # seconds for a whole command
TIME_TO_SAVE = 30  # seconds between SIGTERM and SIGKILL of a launcher


class Hang(Exception):
    """A command did not end in time; its log has the stacks of its processes."""


@dataclass(frozen=True)
class Kill:
    """A signal or a SIGKILL that ends a command at a given place.

    Attributes:
        phase: WHOLE, WRITE or a name of PHASES.
        beginning: which beginning of the phase on rank zero, from 0.
        delay: seconds from that beginning to the signal.
        call: instead of `delay`: rank zero ends before its n-th call (from 1) in any occurrence of
            the phase that changes a file; negative: after that call.
        signum: the signal; a call ends by SIGKILL.
        rank: the rank that is signalled; None: all.
        workers: also signal the processes that the ranks have started.
        then_killed: seconds from the signal to SIGKILL; None: the command may end by itself.
        launcher: SIGTERM the other ranks when one has failed, as torchrun does. Without, they have
            to end by themselves, if their process group exists.
    """

    phase: str = WHOLE
    beginning: int = 0
    delay: float = 0.0
    call: int = 0
    signum: int = signal.SIGKILL
    rank: int | None = None
    workers: bool = False
    then_killed: float | None = None
    launcher: bool = False

    def __str__(self) -> str:
        """Return one line for the log of a campaign."""
        name = signal.Signals(self.signum).name
        if self.call:
            return f"{name} {'before' if self.call > 0 else 'after'} call {abs(self.call)}"
        later = "" if self.then_killed is None else f", SIGKILL {self.then_killed:.2f} s later"
        return f"{name} {self.delay:.2f} s into {self.phase} {self.beginning}{later}"


@dataclass
class Ended:
    """A command that has ended.

    Attributes:
        codes: exit code of each rank, negative for a signal.
        events: what rank zero reported: (seconds, kind, name) with the kinds "begin" and "end" of a
            phase, "step" and "call".
        killed: whether a signal was sent, or rank zero ended at a call.
        seconds: duration of the command.
    """

    codes: list[int]
    events: list[tuple[float, str, str]] = field(default_factory=list)
    killed: bool = False
    seconds: float = 0.0

    def last_step(self) -> int | None:
        """Return the last step that the command finished."""
        steps = [int(name) for _, kind, name in self.events if kind == "step"]
        return steps[-1] if steps else None

    def where(self) -> str:
        """Describe how far the command came."""
        open_phases = [WHOLE]
        for _, kind, name in self.events:
            if kind == "begin":
                open_phases.append(name)
            elif kind == "end":
                open_phases.reverse()  # the last of this name; WRITE has a thread of its own
                open_phases.remove(name)
                open_phases.reverse()
        calls = [name for _, kind, name in self.events if kind == "call"]
        last = f", last file call {calls[-1]}" if calls else ""
        return f"in {open_phases[-1]} after step {self.last_step() or '-'}{last}"


# ---------------------------------------------------------------- the process of a rank


class Reporter:
    """Reports phases, steps and calls that change files of `folder`, and ends at a chosen call."""

    def __init__(self, pipe: Connection, folder: Path, kill: Kill | None):
        self.pipe, self.folder, self.kill = pipe, str(folder), kill
        self.pid, self.count = os.getpid(), 0
        self.thread, self.lock = threading.local(), threading.Lock()

    @property
    def phases(self) -> list[str]:
        """The phases that the present thread is in."""
        return self.thread.__dict__.setdefault("phases", [WHOLE])

    def report(self, kind: str, name: str) -> None:
        """Send an event, unless this is a child of the rank."""
        if os.getpid() == self.pid:
            with self.lock:
                self.pipe.send((time.monotonic(), kind, name))

    def install(self) -> None:
        """Wrap the functions of the phases and the functions of `os` that change files."""
        for phase, functions in (PHASES | {WRITE: [(ShardedStrategy, "write")]}).items():
            for owner, name in functions:
                setattr(owner, name, self.phase(phase, getattr(owner, name)))
        Interrupts.on_train_batch_end = self.step(Interrupts.on_train_batch_end)
        for name in CALLS:
            setattr(os, name, self.call(f"os.{name}", getattr(os, name)))
        builtins.open = io.open = self.call("open", io.open)

    def phase(self, phase: str, function: Callable) -> Callable:
        """Wrap a function that is a phase."""

        @wraps(function)
        def reported(*args, **kwargs):
            self.report("begin", phase)
            self.phases.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.phases.pop()
                self.report("end", phase)

        return reported

    def step(self, function: Callable) -> Callable:
        """Wrap a hook at the end of a step."""

        @wraps(function)
        def reported(callback, trainer, *args):
            self.report("step", str(trainer.global_step))
            return function(callback, trainer, *args)

        return reported

    def call(self, name: str, function: Callable) -> Callable:
        """Wrap a function that may change a file."""

        @wraps(function)
        def counted(*args, **kwargs):
            if os.getpid() != self.pid or not self.changes_files(name, args, kwargs):
                return function(*args, **kwargs)
            ends = self.ends_here()
            path = "" if name == "os.fsync" else os.fsdecode(args[0])
            shown = path and os.path.relpath(path, self.folder)
            self.report("call", f"{name}({shown})")
            if ends and self.kill.call > 0:
                os.kill(self.pid, signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if ends:
                    os.kill(self.pid, signal.SIGKILL)

        return counted

    def changes_files(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Return whether a call changes a file or folder in `folder`."""
        if name == "os.fsync":
            return True
        if not args or isinstance(args[0], int):
            return False
        if name == "os.open":
            flags = args[1] if len(args) > 1 else kwargs.get("flags", 0)
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return False
        if name == "open":
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            if not set(mode) & set("wax+"):
                return False
        path = os.path.abspath(os.fsdecode(args[0]))
        inside = path.startswith(self.folder) or kwargs.get("dir_fd") is not None
        return inside and LOG not in path  # which would be most of the calls

    def ends_here(self) -> bool:
        """Count a call; whether it is the one to end at."""
        if self.kill is None or not self.kill.call:
            return False
        self.count += self.kill.phase in self.phases
        return self.count == abs(self.kill.call) and self.kill.phase in self.phases


def run_rank(
    command: list[str],
    folder: Path,
    rank: int,
    environment: dict[str, str],
    kill: Kill | None,
    pipe: Connection,
) -> None:
    """Run a command as one rank, in a process group of its own.

    Args:
        command: words of the command line.
        folder: working directory; its `log.txt` takes what the command prints.
        rank: number of this rank.
        environment: further variables.
        kill: the call at which to end, if any.
        pipe: takes the events.
    """
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of workers; this process has another
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    for number in SIGNALS:  # whatever the campaign does with them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= environment
    rank_zero_only.rank = rank  # it was read from the environment at import
    sys.argv = ["tf-lightning", *command]
    torch.set_num_threads(1)
    own = kill if rank == 0 else None
    Reporter(pipe, folder, own).install()
    pipe.send((time.monotonic(), "begin", WHOLE))
    main(command)


# ---------------------------------------------------------------- the process that watches them


def run_command(
    command: list[str], folder: Path, ranks: int = 1, kill: Kill | None = None
) -> Ended:
    """Run a command by one or more ranks, end it as `kill` says, and wait until it has ended.

    Raises:
        Hang: a rank, or a child of one, does not end.
    """
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks)}
    context = multiprocessing.get_context("forkserver")
    processes, pipes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        own = environment | ({"LOCAL_RANK": str(rank)} if ranks > 1 else {})
        process = context.Process(target=run_rank, args=(command, folder, rank, own, kill, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    job = Job(processes, pipes, kill)
    try:
        job.watch()
        return job.ended()
    finally:
        job.clear()


class Job:
    """The processes of a command, and the signals that are still to be sent to them."""

    def __init__(self, processes: list, pipes: list[Connection], kill: Kill | None):
        self.processes, self.pipes, self.kill = processes, pipes, kill
        self.events: list[tuple[float, str, str]] = []
        self.started = time.monotonic()
        self.due: list[tuple[float, int, int | None]] = []  # time, signal, rank or None for all
        self.killed = False
        self.beginnings = 0
        self.limit = self.started + LIMIT

    def watch(self) -> None:
        """Wait until all ranks and their children have ended, and send the signals in time."""
        while any(process.is_alive() for process in self.processes):
            now = time.monotonic()
            if now > self.limit:
                raise Hang(self.describe_hang())
            next_signal = min((at for at, *_ in self.due), default=now + 0.5)
            sentinels = [p.sentinel for p in self.processes if p.exitcode is None]
            waiting = [pipe for pipe in self.pipes if not pipe.closed]
            wait([*waiting, *sentinels], timeout=max(0.0, min(next_signal - now, 0.5)))
            self.read()
            self.send()
            self.follow_failure()
        self.read()
        until = time.monotonic() + PATIENCE
        while any(is_alive(process.pid) for process in self.processes):
            if time.monotonic() > until:
                raise Hang(self.describe_hang())
            time.sleep(0.01)

    def read(self) -> None:
        """Take the events, and plan the signal when its phase begins on rank zero."""
        for rank, pipe in enumerate(self.pipes):
            if pipe.closed:
                continue
            try:
                while pipe.poll():
                    event = pipe.recv()
                    if rank == 0:
                        self.events.append(event)
                        self.plan(*event)
            except (EOFError, OSError):
                pipe.close()

    def plan(self, at: float, kind: str, name: str) -> None:
        """Plan the signal if an event is the beginning of its phase."""
        kill = self.kill
        if kill is None or kill.call or kind != "begin" or name != kill.phase:
            return
        if self.beginnings == kill.beginning:
            self.due.append((at + kill.delay, kill.signum, kill.rank))
            if kill.then_killed is not None:
                later = at + kill.delay + kill.then_killed
                self.due.append((later, signal.SIGKILL, kill.rank))
        self.beginnings += 1

    def send(self) -> None:
        """Send the signals that are due."""
        now = time.monotonic()
        for item in [item for item in self.due if item[0] <= now]:
            self.due.remove(item)
            _, signum, rank = item
            for number, process in enumerate(self.processes):
                if rank in (None, number) and process.exitcode is None:
                    self.killed = True
                    self.signal(process, signum)
            self.limit = min(self.limit, now + PATIENCE)

    def signal(self, process: Any, signum: int) -> None:
        """Send a signal to a rank, or to its whole process group."""
        with suppress(ProcessLookupError):
            if self.kill and self.kill.workers:
                os.killpg(process.pid, signum)
            else:
                os.kill(process.pid, signum)

    def follow_failure(self) -> None:
        """When a rank has failed, end the others as the launcher would."""
        codes = [process.exitcode for process in self.processes]
        if not any(codes) or all(code is not None for code in codes) or self.kill is None:
            return
        now = time.monotonic()
        self.limit = min(self.limit, now + PATIENCE)
        if self.kill.call and not self.killed:
            self.killed = True
            if self.kill.rank is None:
                self.due.append((now, signal.SIGKILL, None))
        # Before its process group exists, torch waits for a rank for half an hour.
        have_met = any(kind == "begin" and name != WHOLE for _, kind, name in self.events)
        acts = self.kill.launcher or not have_met
        if acts and not any(at > now for at, *_ in self.due):
            self.due += [(now + 0.1, signal.SIGTERM, None)]
            self.due += [(now + TIME_TO_SAVE, signal.SIGKILL, None)]

    def ended(self) -> Ended:
        """Return the result."""
        codes = [process.exitcode for process in self.processes]
        kill = self.kill
        killed = self.killed or bool(kill and kill.call and codes[0] == -signal.SIGKILL)
        return Ended(codes, self.events, killed, time.monotonic() - self.started)

    def describe_hang(self) -> str:
        """Abort all processes, which print their stacks, and describe them."""
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGABRT)
        time.sleep(2)
        return f"not all processes have ended (exit codes {codes}); see the end of log.txt"

    def clear(self) -> None:
        """Kill what is left, and close the pipes."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()


def is_alive(group: int) -> bool:
    """Return whether a process group has any process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
