"""Check that a run that is killed with `kill -9` resumes to bit-identical weights.

    python benchmarks/kill.py [--ranks 2] [--workers 2] [--kill_at 5] [--victim 1]

The small run of the tests (tests/support/runs.py: 6 steps, a checkpoint every 3 steps) is trained
once without interruption, and once killed and resumed. Weights, EMA weights, optimizer state and
the position in the data must be equal in every bit. The exit code is 1 if they differ or if a run
hangs; a run that hangs prints the stacks of its processes. With 2 ranks, each of the three runs
takes about 40 s of CPU time.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from support import runs  # noqa: E402
from support.compare import bit_equal  # noqa: E402

PARTS = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "Mixture")


def only_checkpoints(config: dict) -> None:
    """Remove validation and every callback but the checkpoint."""
    callbacks = config["trainer"]["callbacks"][:1]
    config["trainer"] |= {"callbacks": callbacks, "limit_val_batches": 0}


class Hang(Exception):
    """A run did not end in time; the message has the stacks of its processes."""


def train(folder: Path, args: argparse.Namespace, *more: str) -> tuple[int, float]:
    """Train in a subprocess.

    Returns:
        The exit code, and the seconds until the last process of the run ended after the first rank.
    """
    folder.mkdir(exist_ok=True)
    arguments = ["fit", "-c", str(runs.write_config(folder, only_checkpoints))]
    arguments += [f"--trainer.devices={args.ranks}", "--data.init_args.batch_size=1"]
    arguments += [f"--data.init_args.num_workers={args.workers}", *more]
    if args.ranks > 1:
        arguments.append("--trainer.strategy=ddp")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment["PYTHONFAULTHANDLER"] = "1"  # SIGABRT prints the stacks
    command = [sys.executable, "-m", "tf_lightning", *arguments]
    began, limit = time.monotonic(), 60 * args.minutes
    with (folder / "log.txt").open("a") as log:  # a pipe would stay open while any child lives
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        code = process.wait(limit)
        ended = time.monotonic()
        while is_alive(process.pid):
            if time.monotonic() - began > limit:
                raise subprocess.TimeoutExpired(command, limit)
            time.sleep(0.1)
    except subprocess.TimeoutExpired as error:
        raise Hang(describe_hang(process.pid, folder, args.minutes)) from error
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    print(f"{folder.name}: exit code {code} after {ended - began:.0f} s", flush=True)
    return code, time.monotonic() - ended


def is_alive(group: int) -> bool:
    """Whether a process group has any process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def describe_hang(group: int, folder: Path, minutes: float) -> str:
    """Abort a process group and return the end of its log, with the stacks of its processes."""
    os.killpg(group, signal.SIGABRT)
    time.sleep(5)
    lines = (folder / "log.txt").read_text().splitlines()[-60:]
    hint = f"not done after {minutes:g} minutes; on a busy machine give more with --minutes"
    return "\n".join([*lines, f"{folder.name}: {hint}. Above: its last lines and stacks."])


def main() -> None:
    """Run the comparison and exit with 1 if a part differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--workers", type=int, default=2, help="per rank (default: 2)")
    parser.add_argument("--kill_at", type=int, default=5, help="optimizer step (default: 5)")
    parser.add_argument("--victim", type=int, help="rank to kill (default: all)")
    parser.add_argument("--minutes", type=float, default=10, help="limit per run (default: 10)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            equal = compare(Path(folder), args)
        except Hang as error:
            sys.exit(str(error))
    for part, is_equal in equal.items():
        print(f"{part:20}{'equal in every bit' if is_equal else 'DIFFERS'}")
    sys.exit(not all(equal.values()))


def compare(folder: Path, args: argparse.Namespace) -> dict[str, bool]:
    """Train with and without a kill; whether each part of the last checkpoints is equal."""
    whole, killed = folder / "whole", folder / "killed"
    code, _ = train(whole, args)
    assert code == 0, (whole / "log.txt").read_text()
    kill = ["--trainer.callbacks+=support.runs.KillAt", f"--trainer.callbacks.step={args.kill_at}"]
    if args.victim is not None:
        kill.append(f"--trainer.callbacks.rank={args.victim}")
    code, seconds = train(killed, args, *kill)
    assert code != 0, "nothing was killed"
    last = "run/checkpoints/last.ckpt"
    step = torch.load(killed / last, weights_only=True)["global_step"]
    print(f"killed at step {args.kill_at}, checkpoint of step {step}; ", end="")
    print(f"the last process ended {seconds:.1f} s after the first rank", flush=True)
    code, _ = train(killed, args, "--ckpt_path=last")
    assert code == 0, (killed / "log.txt").read_text()
    a, b = (torch.load(path / last, weights_only=True) for path in (whole, killed))
    return {part: bit_equal(a[part], b[part]) for part in PARTS}


if __name__ == "__main__":
    main()
