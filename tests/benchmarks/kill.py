"""Does a run that `kill -9` ends resume to the same bits, with 2 ranks that have 2 workers each?

    python tests/benchmarks/kill.py [--ranks 2] [--workers 2] [--kill_at 5]

The run of the tests (tests/runs.py: captioned pictures and text, 6 steps, a checkpoint every 3) is
trained in full; then again, killed, and resumed. Weights, averaged weights, the optimizer and the
place in the data must be equal in every bit. Ends with 1 where one is not.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import runs  # noqa: E402

PARTS = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "Mixture")


def leaves(value) -> list:
    """The tensors and numbers of nested dicts and lists, in order."""
    if isinstance(value, dict):
        return [leaf for item in value.items() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def same(a, b) -> bool:
    """Equal in every bit."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def only_checkpoints(config: dict) -> None:
    """No validation."""
    callbacks = config["trainer"]["callbacks"][:1]
    config["trainer"] |= {"callbacks": callbacks, "limit_val_batches": 0}


def train(folder: Path, ranks: int, workers: int, *more: str) -> int:
    """Train in processes of its own; the exit code."""
    folder.mkdir(exist_ok=True)
    arguments = ["fit", "-c", str(runs.write_config(folder, only_checkpoints))]
    arguments += [f"--trainer.devices={ranks}", f"--data.init_args.num_workers={workers}"]
    arguments += ["--data.init_args.batch_size=1", *more]
    if ranks > 1:
        arguments.append("--trainer.strategy=ddp")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "tf_lightning", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # no pipe to wait for
    return subprocess.run(command, env=environment, timeout=300, **quiet).returncode


def main() -> None:
    """Train, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill_at", type=int, default=5, help="steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        size = args.ranks, args.workers
        assert train(whole, *size) == 0
        kill = ["--trainer.callbacks+=runs.KillAt", f"--trainer.callbacks.step={args.kill_at}"]
        assert train(killed, *size, *kill) == -signal.SIGKILL
        last = "run/checkpoints/last.ckpt"
        print(f"killed at step {args.kill_at}, checkpoint of step", end=" ")
        print(torch.load(killed / last, weights_only=True)["global_step"])
        assert train(killed, *size, "--ckpt_path=last") == 0
        a, b = (torch.load(path / last, weights_only=True) for path in (whole, killed))
        equal = {part: same(a[part], b[part]) for part in PARTS}
    for part, is_equal in equal.items():
        print(f"{part:20}{'equal in every bit' if is_equal else 'DIFFERS'}")
    sys.exit(not all(equal.values()))


if __name__ == "__main__":
    main()
