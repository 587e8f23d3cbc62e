"""Does a run that `kill -9` ends resume to the same bits, with 2 ranks that have 2 workers each?

    python benchmarks/kill.py [--ranks 2] [--workers 2] [--kill_at 5] [--victim 1]

The run of the tests (tests/runs.py: captioned pictures and text, 6 steps, a checkpoint every 3) is
trained in full; then again, killed, and resumed. Weights, averaged weights, the optimizer and the
place in the data must be equal in every bit. Ends with 1 where one is not, or where a run is stuck;
then it shows where. Each of the three runs takes about 40 s of CPU time with 2 ranks.
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
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import runs  # noqa: E402

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


class Stuck(Exception):
    """A run did not end in time; the message says where its processes were."""


def train(folder: Path, args: argparse.Namespace, *more: str) -> tuple[int, float]:
    """Train in processes of its own; its exit code, and how long others of them outlived it."""
    folder.mkdir(exist_ok=True)
    arguments = ["fit", "-c", str(runs.write_config(folder, only_checkpoints))]
    arguments += [f"--trainer.devices={args.ranks}", "--data.init_args.batch_size=1"]
    arguments += [f"--data.init_args.num_workers={args.workers}", *more]
    if args.ranks > 1:
        arguments.append("--trainer.strategy=ddp")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment["PYTHONFAULTHANDLER"] = "1"  # SIGABRT then shows where a process is
    command = [sys.executable, "-m", "tf_lightning", *arguments]
    began, limit = time.monotonic(), 60 * args.minutes
    with (folder / "log.txt").open("a") as log:  # no pipe, which those left behind would hold open
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
        raise Stuck(told(process.pid, folder, args.minutes)) from error
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    print(f"{folder.name}: exit code {code} after {ended - began:.0f} s", flush=True)
    return code, time.monotonic() - ended


def is_alive(group: int) -> bool:
    """Whether any process of a group is."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def told(group: int, folder: Path, minutes: float) -> str:
    """What a run that is stuck says when it is asked where it is."""
    os.killpg(group, signal.SIGABRT)
    time.sleep(5)
    lines = (folder / "log.txt").read_text().splitlines()[-60:]
    hint = f"not done after {minutes:g} minutes; on a busy machine give more with --minutes"
    return "\n".join([*lines, f"{folder.name}: {hint}. Above: its last lines and stacks."])


def main() -> None:
    """Train, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill_at", type=int, default=5, help="steps")
    parser.add_argument("--victim", type=int, help="the rank that is killed; default: all")
    parser.add_argument("--minutes", type=float, default=10, help="limit of each of three runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            equal = compare(Path(folder), args)
        except Stuck as error:
            sys.exit(str(error))
    for part, is_equal in equal.items():
        print(f"{part:20}{'equal in every bit' if is_equal else 'DIFFERS'}")
    sys.exit(not all(equal.values()))


def compare(folder: Path, args: argparse.Namespace) -> dict[str, bool]:
    """Which parts of the two last checkpoints are equal."""
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
    return {part: same(a[part], b[part]) for part in PARTS}


if __name__ == "__main__":
    main()
