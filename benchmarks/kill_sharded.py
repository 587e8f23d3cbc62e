"""Kill a sharded run in the middle of its asynchronous saves, resume it, and compare the results.

    python benchmarks/kill_sharded.py --kills 50
    python benchmarks/kill_sharded.py --kills 5 --seed 17

A small run of two ranks with FSDP2 saves after every step, in a thread of each rank. All its ranks
are killed with SIGKILL while that thread writes: at a random moment, or before or after a call that
changes a file. The run is resumed with `--ckpt_path last` and killed again, as often as asked.

Each time the newest whole checkpoint must be at most two steps old, as one save is under way while
the next step is trained. In the end, weights, moving average, optimizer state, position in the data
and losses must be equal in every bit to those of a run that nothing interrupted, and nothing else
may be left in the folder. The exit code is 1 if a kill failed.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import ranks, runs, same_runs  # noqa: E402
from support.killed_runs import WRITE, Ended, Kill, run_command  # noqa: E402
from tf_lightning.checkpoint import find_checkpoints, step_of  # noqa: E402
from tf_lightning.errors import UserError  # noqa: E402
from tf_lightning.sharded import check_sharded  # noqa: E402

RANKS, STEPS = 2, 4  # ranks, and steps that a run adds at most before it is killed


def fit(folder: Path, steps: int) -> list[str]:
    """Return the command that trains in a folder up to a number of steps."""

    def change(config: dict) -> None:
        ranks.two_rank_config(config)
        config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 1

    config = runs.write_config(folder, change)
    more = [f"--trainer.max_steps={steps}", f"--trainer.devices={RANKS}", "--ckpt_path=last"]
    more += [f"--trainer.strategy={ranks.sharded(RANKS)}", "--data.init_args.batch_size=1"]
    # The length of the schedule must not depend on how often the run is killed.
    return ["fit", "-c", str(config), *more, "--model.min_lr_ratio=1"]


def newest_step(folder: Path) -> int:
    """Return the step of the newest whole checkpoint of a run; 0 if there is none."""
    run = folder / "run"
    found = find_checkpoints(run, run / "checkpoints")
    return int(next((step_of(path) for path in found if is_whole(path)), 0))


def is_whole(checkpoint: Path) -> bool:
    """Return whether all shards of a checkpoint are there and have their checksums."""
    try:
        check_sharded(checkpoint)
    except UserError:
        return False
    return True


def kill_once(folder: Path, rng: random.Random, steps: int) -> tuple[str, str]:
    """Resume the run and kill it in a save; return the place, and the fault or "".

    Args:
        folder: folder of the run.
        rng: chooses the place.
        steps: number of steps of the newest checkpoint.
    """
    nth = rng.randint(1, STEPS)
    if rng.random() < 0.5:
        kill = Kill(WRITE, beginning=nth - 1, delay=rng.uniform(0, 0.15))
    else:
        calls = 14  # in one save; the first is only complete with the link
        kill = Kill(WRITE, call=rng.choice([1, -1]) * (calls * (nth - 1) + rng.randint(1, calls)))
    ended = run_command(fit(folder, steps + STEPS + 1), folder, RANKS, kill)
    newest, last = newest_step(folder), ended.last_step() or steps
    story = f"{kill} {ended.where()}; newest checkpoint: step {newest}"
    if not ended.killed:
        return story, "it was not killed"
    if newest < max(steps, last - 2):
        return story, f"step {last - 1} is not saved"
    return story, ""


def differences(folder: Path, whole: Path) -> list[str]:
    """Compare the end of a run with that of the run that nothing interrupted."""
    runs_of = [path / "run" for path in (folder, whole)]
    found = same_runs.checkpoint_differences(runs_of[0], runs_of[1], runs_of[1])
    losses = [same_runs.logged(run)["train/loss"] for run in runs_of]
    found += [
        f"the loss of step {step} differs"
        for step in losses[1]
        if losses[0].get(step, losses[1][step]) != losses[1][step]
    ]
    left = sorted(path.name for path in (runs_of[0] / "checkpoints").glob(".*"))
    return found + [f"{name} is left" for name in left]


def campaign(kills: int, seed: int, folder: Path) -> list[str]:
    """Kill a run this often; return the faults."""
    rng, killed, failures = random.Random(seed), folder / "killed", []
    steps = 0
    for number in range(1, kills + 1):
        began = time.monotonic()
        story, failure = kill_once(killed, rng, steps)
        failures += [f"kill {number}: {failure}"] * bool(failure)
        steps = max(steps, newest_step(killed))
        seconds = time.monotonic() - began
        print(f"{number:3} {seconds:5.1f} s  {story}  {failure or 'resumable'}", flush=True)
    for place in (killed, folder / "whole"):
        ended: Ended = run_command(fit(place, steps + 3), place, RANKS)
        if any(ended.codes):
            end = (place / "log.txt").read_text(errors="replace")[-3000:]
            return [*failures, f"{place.name} ended with {ended.codes}: {end}"]
    return failures + differences(killed, folder / "whole")


def main() -> None:
    """Run the campaign; exit with 1 if there is a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="default: 10")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    # Older Pythons do not give their path to the server process that imports the project.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with tempfile.TemporaryDirectory(prefix="kill-sharded-") as folder:
        failures = campaign(args.kills, args.seed, Path(folder))
    print(f"{args.kills} kills in asynchronous saves, {len(failures)} failures")
    if failures:
        sys.exit("\n".join(failures[:20]))


if __name__ == "__main__":
    main()
