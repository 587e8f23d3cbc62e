"""Child processes leave signals to their parent, end with it, and end when it says so."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from support.ranks import start_worker_and_die
from tf_lightning import processes
from tf_lightning.processes import Loader, end_processes, start_worker
from tf_lightning.signals import BLOCKED_IN_WORKERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Workers with rows to hand over, more than a pipe holds, when the process is killed.
PARENT = """
import os, signal, torch
from support.ranks import start_worker_and_die
from tf_lightning.processes import Loader, start_worker
rows = [torch.zeros(200_000)] * 100
rows = iter(Loader(rows, num_workers=2, prefetch_factor=20, worker_init_fn=start_worker))
next(rows), next(rows)  # one of each worker, so both have begun
print(*[worker.pid for worker in rows._workers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


def wait_for_end(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "workers stayed behind"
        time.sleep(0.05)


def signal_by_another_process(pid: int) -> None:
    """Send a process the signals that Ctrl-C and job schedulers send to all processes of a run."""
    commands = [f"kill -{int(signum)} {pid}" for signum in BLOCKED_IN_WORKERS]
    subprocess.run(["sh", "-c", ";".join(commands)], check=True)


def signalled_at_once(worker_id: int) -> None:
    signal_by_another_process(os.getpid())
    start_worker(worker_id)


def test_workers_are_not_ended_by_signals_to_the_group_even_in_their_first_moments():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    rows = iter(Loader(torch.arange(40), num_workers=2, worker_init_fn=signalled_at_once))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    found = [next(rows)]
    for worker in rows._workers:
        signal_by_another_process(worker.pid)
    found += list(rows)
    assert torch.cat(found).tolist() == list(range(40))
    wait_for_end(*[worker.pid for worker in rows._workers])


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, index):
        time.sleep(100 * (index > 1))
        return index


def test_a_worker_that_is_busy_ends_when_its_process_says_so():
    rows = iter(Loader(Slow(), num_workers=1, worker_init_fn=start_worker))
    assert next(rows) == 0
    worker = rows._workers[0]
    rows._shutdown = True  # the loader itself would first wait for the row
    torch.utils.data._utils.signal_handling._remove_worker_pids(id(rows))
    worker.terminate()
    wait_for_end(worker.pid)


def test_workers_end_with_a_killed_process():
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    ended = subprocess.run(
        [sys.executable, "-c", PARENT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL
    wait_for_end(*map(int, ended.stdout.split()))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_of_every_start_method_begin_with_the_signals_blocked(method):
    context = multiprocessing.get_context(method)
    loader = Loader(
        range(4), num_workers=1, multiprocessing_context=context, worker_init_fn=start_worker
    )
    rows = iter(loader)
    for _ in range(20):  # also while a spawned process imports modules
        signal_by_another_process(rows._workers[0].pid)
    assert [int(row) for row in rows] == [0, 1, 2, 3]


@pytest.mark.slow  # the processes of a fork server import torch
def test_a_worker_of_a_fork_server_ends_with_the_process_that_uses_it(tmp_path):
    context = multiprocessing.get_context("forkserver")
    user = context.Process(target=start_worker_and_die, args=(tmp_path / "worker",))
    user.start()
    user.join()
    assert user.exitcode == -signal.SIGKILL
    wait_for_end(int((tmp_path / "worker").read_text()))


def test_the_loaders_of_training_and_validation_start_their_workers_so(mixture):
    data = mixture(num_workers=1)
    data.setup()
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        assert isinstance(loader, Loader) and loader.worker_init_fn is start_worker


def test_processes_that_do_not_end_by_themselves_are_killed(monkeypatch):
    monkeypatch.setattr(processes, "END_SECONDS", 0.3)
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=time.sleep, args=(seconds,)) for seconds in (0, 60, 60)]
    for process in started:
        process.start()
    began = time.monotonic()
    end_processes(started)
    for process in started:
        process.join()
    assert [process.exitcode for process in started][1:] == [-signal.SIGKILL] * 2
    assert time.monotonic() - began < 30
