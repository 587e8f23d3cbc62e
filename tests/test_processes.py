"""Children of a killed process do not stay behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tf_lightning.processes import start_worker

# Workers with rows to hand over, more than a pipe holds, when the process is killed.
PARENT = """
import os, signal, torch
from torch.utils.data import DataLoader
from tf_lightning.processes import start_worker
rows = [torch.zeros(200_000)] * 100
rows = iter(DataLoader(rows, num_workers=2, prefetch_factor=20, worker_init_fn=start_worker))
next(rows), next(rows)  # one of each worker, so both have begun
print(*[worker.pid for worker in rows._workers], flush=True)
for worker in rows._workers:  # as Ctrl-C and job schedulers do
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, signum)
for _ in range(60):
    next(rows)
print("all there", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_leave_signals_to_the_training_process_and_end_with_it():
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    ended = subprocess.run(
        [sys.executable, "-c", PARENT], env=environment, capture_output=True, text=True, timeout=120
    )
    workers, done = ended.stdout.splitlines()
    assert ended.returncode == -signal.SIGKILL and done == "all there"
    deadline = time.monotonic() + 20
    while any(map(is_running, map(int, workers.split()))):
        assert time.monotonic() < deadline, "workers stayed behind"
        time.sleep(0.1)


def test_the_loaders_of_training_and_validation_start_their_workers_so(mixture):
    data = mixture(num_workers=1)
    data.setup()
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        assert loader.worker_init_fn is start_worker
