"""Runs of the command line by one process and by several ranks, and their comparison."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support import runs
from tf_lightning.cli.main import main
from tf_lightning.data import Mixture
from tf_lightning.processes import Loader, end_with_parent, start_worker
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts

TIMEOUT = 180  # seconds
# New ranks are forks of a server process that has imported these modules.
multiprocessing.set_forkserver_preload(
    ["tf_lightning.cli.lightning", "callbacks.evaluate", "callbacks.metrics", "diffusers"]
)


def run_ranks(
    command: Sequence, ranks: int, run: Callable[[Sequence], Any] = main, **environment: str
) -> None:
    """Run a command in several processes, with the environment variables of a cluster's ranks.

    Args:
        command: what `run` is called with.
        ranks: number of processes.
        run: a function of a module; by default the command line.
        environment: more environment variables.

    Raises:
        ProcessExitedException, ProcessRaisedException: (of torch) the first rank that fails.
        TimeoutError: a rank has not ended after TIMEOUT seconds.
    """
    started = start_ranks(command, ranks, run, **environment)
    if not any(started.join(TIMEOUT) for _ in range(ranks)):  # join returns after each process
        for process in started.processes:
            process.kill()
        raise TimeoutError(f"a rank has not ended after {TIMEOUT} s")


def ends_of_ranks(command: list[str], log: Path, ranks: int = 2) -> list[tuple[int, str]]:
    """Run a command in several processes; return the exit code and the output of each.

    Raises:
        TimeoutError: a rank has not ended TIMEOUT seconds after the start of all.
        AssertionError: a process that a rank has started stays behind.
    """
    log.mkdir(exist_ok=True)
    started = start_ranks(command, ranks, RANK_LOG=str(log))
    deadline = time.monotonic() + TIMEOUT
    for process in started.processes:
        process.join(max(0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(started.processes) if process.is_alive()]
    for rank in late:
        started.processes[rank].kill()
    texts = [(log / f"{rank}.txt").read_text() for rank in range(ranks)]
    if late:
        raise TimeoutError(f"rank {late} has not ended after {TIMEOUT} s: {texts}")
    return [
        (process.exitcode, text) for process, text in zip(started.processes, texts, strict=True)
    ]


def processes_of_session(leader: int) -> list[int]:
    """The numbers of the running processes of a session."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state, _, _, session = file.read_text().rpartition(")")[2].split()[:4]
            found += [int(file.parent.name)] * (int(session) == leader and state != "Z")
    return found


def start_ranks(
    command: Sequence, ranks: int, run: Callable[[Sequence], Any] = main, **environment: str
):
    """Start a command in several processes, see `run_ranks`; return torch's context of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    return torch.multiprocessing.start_processes(
        _run_rank, (run, command, environment), ranks, join=False, start_method="forkserver"
    )


def _run_rank(
    rank: int, run: Callable[[Sequence], Any], command: Sequence, environment: dict[str, str]
) -> None:
    """Run the command as one rank of `run_ranks`."""
    end_with_parent()  # the server process, which ends with the test
    os.environ |= environment | {"LOCAL_RANK": str(rank)}
    if "RANK_LOG" in environment:
        os.setsid()  # its processes are known by the session
        with open(Path(environment["RANK_LOG"], f"{rank}.txt"), "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    rank_zero_only.rank = rank  # it was read from the environment at import
    torch.set_num_threads(1)
    run(command)


def start_worker_and_die(file: Path) -> None:
    """Write the number of a worker of this process into a file, and kill this process."""
    loader = Loader(
        range(99), num_workers=1, multiprocessing_context="forkserver", worker_init_fn=start_worker
    )
    rows = iter(loader)
    next(rows)
    file.write_text(str(rows._workers[0].pid))
    os.kill(os.getpid(), signal.SIGKILL)


def two_rank_config(config: dict) -> None:
    """Train 3 steps; with one row per rank, some ranks have no image and some steps have none."""
    data = config["data"]["init_args"]
    data["weights"] = {"captions": 0.5, "text": 0.5}
    config["trainer"] |= {"max_steps": 3, "limit_val_batches": 0, "callbacks": []}
    config["trainer"]["callbacks"] = runs.config(Path())["trainer"]["callbacks"][:1]


def images_in_rows(cache_dir: Path, count: int, **codec) -> list[int]:
    """The number of images in each of the first `count` rows of `two_rank_config`."""
    codec = {"autoencoder": "pixels", "patch_size": 16} | codec
    data = Mixture(
        {"captions": ShapesCaptions(runs.NUM_CAPTIONS, 6), "text": ShapesTexts(40, 6)},
        {"captions": 0.5, "text": 0.5},
        **{"vocab_size": runs.VOCAB_SIZE, "row_length": 256, "batch_size": 1},
        **{"cache_dir": str(cache_dir), **codec},
    )
    data.setup()
    batches = iter(data.train_dataloader())
    return [next(batches).num_images for _ in range(count)]


def logged(run: Path, names: tuple[str, ...]) -> list[float]:
    """The logged train/NAME of every step, for each name."""
    events = EventAccumulator(str(run)).Reload()
    return [event.value for name in names for event in events.Scalars(f"train/{name}")]


SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
        "process_group_backend": "gloo",
    },
}


def sharded(ranks: int) -> str:
    """The strategy of FSDP2 on some ranks with sharded checkpoints, for the command line."""
    arguments = SHARDED["init_args"]
    arguments = arguments | {"data_parallel_size": ranks, "save_distributed_checkpoint": True}
    return json.dumps(SHARDED | {"init_args": arguments})


def fit(
    config: Path, ranks: int, strategy: str, *more: str, rows: int = 2, accumulate: int = 1
) -> None:
    """Train with `rows` rows per step, by one rank in this process or by two ranks."""
    command = ["fit", "-c", str(config), f"--trainer.devices={ranks}", *more]
    command += [f"--data.init_args.batch_size={rows // ranks // accumulate}"]
    command += [f"--trainer.accumulate_grad_batches={accumulate}"]
    if ranks == 1:
        return main(command)
    run_ranks([*command, f"--trainer.strategy={strategy}"], ranks)


def check_same(one: Path, other: Path, losses: tuple[str, ...], num_steps: int) -> None:
    """Assert that two runs have the same losses, gradient norms and final weights."""
    names = (*losses, "grad_norm")
    first, second = (logged(run, names) for run in (one, other))
    assert len(first) == len(names) * num_steps
    # Weights alone would hide a wrong scale of gradients, which Adam ignores.
    assert first == pytest.approx(second, rel=1e-5, nan_ok=True)
    first, second = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (one, other)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=2e-6, rtol=1e-5, msg=name)
