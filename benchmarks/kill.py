"""Kill runs at random places, resume them, and compare them with a run that nothing interrupted.

    python benchmarks/kill.py --tries 200
    python benchmarks/kill.py --minutes 30 --ranks 2 --place "call save"
    python benchmarks/kill.py --seed 17 --tries 1

A try trains the small run of the tests (6 steps, a checkpoint every 2, a validation every 3, an
examination at the end) in a folder of its own, sometimes after `tf-lightning prepare`. It is ended
1 to 3 times and resumed with `--ckpt_path last` until it reaches its end. A place is how and where
it is ended: SIGKILL at a random moment, SIGKILL before or after a call that changes a file, or a
signal that makes it save; anywhere in the run, or in the preparation, in a save, in the validation
or in the examination. With 2 ranks, one or both are ended.

Then weights, moving average, optimizer state, position in the data, every logged value, the
validations, the examination and the corpora must be equal in every bit, nothing else may be left in
the folders, and no process may be left. A signal must also save the last finished step and give its
exit code. A failing try prints its seed and keeps its folder; the same seed makes the same try,
except that a moment is a time and not a line of code. The exit code is 1 if any try failed.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import runs, same_runs  # noqa: E402
from support.killed_runs import PHASES, WHOLE, Ended, Hang, Kill, run_command  # noqa: E402

HOW = ("moment", "call", "signal")
PLACES = [f"{how} {phase}" for how in HOW for phase in (WHOLE, *PHASES)]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGHUP: 129}


class Failure(Exception):
    """A run that was killed and resumed ends in another way than an uninterrupted one."""


def few_checkpoints(config: dict, every: int = 2) -> None:
    """Save every 2 steps, and write the files that only `predict` needs."""
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = every
    config["trainer"]["callbacks"].pop()


@dataclass(frozen=True)
class Reference:
    """Runs that nothing interrupted, with some number of ranks.

    Attributes:
        ranks: number of ranks.
        whole: folder of the run that the others are compared with.
        every_step: folder of the same run with a checkpoint of every step.
        ended: its events.
        prepared: events of `tf-lightning prepare` in an empty folder.
    """

    ranks: int
    whole: Path
    every_step: Path
    ended: Ended
    prepared: Ended


def fit(folder: Path, ranks: int, workers: int, every: int = 2, resume: bool = True) -> list[str]:
    """Return the command that trains in a folder."""
    config = runs.write_config(folder, lambda config: few_checkpoints(config, every))
    command = ["fit", "-c", str(config), f"--data.init_args.num_workers={workers}"]
    if ranks > 1:
        command += [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]
        command += ["--data.init_args.batch_size=1"]
    return [*command, "--ckpt_path=last"] if resume else command


def prepare(folder: Path) -> list[str]:
    """Return the command that prepares the corpora of a folder."""
    return ["prepare", "-c", str(runs.write_config(folder, few_checkpoints)), "--processes=1"]


def make_reference(folder: Path, ranks: int) -> Reference:
    """Train without interruption."""
    whole, every_step, other = (folder / f"{name}{ranks}" for name in ("whole", "every", "data"))
    ends = []
    for place, command in (
        (whole, fit(whole, ranks, 0)),
        (every_step, fit(every_step, ranks, 0, every=1)),
        (other, prepare(other)),
    ):
        ended = run_command(command, place, ranks if "fit" in command else 1)
        if any(ended.codes):
            raise Failure(f"{place.name} ended with {ended.codes}:\n{end_of_log(place)}")
        ends.append(ended)
    found = same_runs.log_differences(every_step / "run", whole / "run")
    if found:
        raise Failure(f"two runs without interruption differ: {found}")
    return Reference(ranks, whole, every_step, ends[0], ends[2])


def end_of_log(folder: Path, count: int = 30) -> str:
    """Return the last lines that the commands in a folder have printed."""
    return "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-count:])


def draw_kill(rng: random.Random, place: str, reference: Ended, ranks: int) -> Kill:
    """Choose where a run is ended.

    Args:
        rng: chooses.
        place: one of PLACES.
        reference: a command of the same kind that nothing interrupted.
        ranks: number of ranks.
    """
    how, phase = place.split()
    kill = Kill(
        phase=phase,
        rank=rng.choice([None, *range(ranks)]),
        workers=rng.random() < 0.5,
        launcher=ranks > 1 and rng.random() < 0.5,
    )
    if how == "call":
        number = rng.randint(1, calls_in(reference, phase))
        rank = None if kill.rank is None else 0
        return replace(kill, call=number * rng.choice([1, -1]), rank=rank)
    spans = spans_of(reference, phase)
    beginning = rng.randrange(len(spans))
    kill = replace(kill, beginning=beginning, delay=rng.uniform(0, spans[beginning]))
    if how == "signal":
        later = rng.uniform(0, 0.5) if rng.random() < 0.25 else None
        kill = replace(kill, signum=int(rng.choice(list(CODES))), then_killed=later)
    return kill


def spans_of(ended: Ended, phase: str) -> list[float]:
    """Return the duration of each occurrence of a phase, in seconds."""
    begun, spans = [], []
    for at, kind, name in ended.events:
        if name == phase and kind == "begin":
            begun.append(len(spans))
            spans.append(ended.events[-1][0] - at)  # until the end, if nothing else is known
        elif name == phase and kind == "end":
            number = begun.pop()
            spans[number] -= ended.events[-1][0] - at
    return spans


def calls_in(ended: Ended, phase: str) -> int:
    """Count the calls in a phase that change files."""
    depth = count = 0
    for _, kind, name in ended.events:
        if name == phase:
            depth += {"begin": 1, "end": -1}.get(kind, 0)
        count += kind == "call" and depth > 0
    return count


class Try:
    """One run that is ended at `place` and resumed until it reaches its end.

    Args:
        seed: determines the try.
        place: one of PLACES; None: a random one.
        reference: the runs that it has to equal.
        folder: an empty folder.
    """

    def __init__(self, seed: int, place: str | None, reference: Reference, folder: Path):
        self.rng = random.Random(seed)
        drawn = self.rng.choice(PLACES)
        self.place = place or drawn
        self.reference, self.folder = reference, folder
        self.story: list[str] = []  # how each command was ended, for the printed line
        self.kills = 0
        self.unlogged: set[int] = set()  # steps, from 0, that were saved when the run was killed

    def run(self) -> None:
        """Run the try.

        Raises:
            Failure, Hang: it fails.
        """
        rng, phase = self.rng, self.place.split()[1]
        unprepared = phase == "prepare" or rng.random() < 0.3
        if not unprepared:
            shutil.copytree(self.reference.whole / "data", self.folder / "data")
        if unprepared and rng.random() < 0.5:
            self.repeat(prepare(self.folder), 1, self.reference.prepared, "prepare")
        self.repeat(None, self.reference.ranks, self.reference.ended, "fit")
        whole = self.reference.whole
        lost = same_runs.steps_without_curves(self.folder / "run", whole / "run") & self.unlogged
        if lost:
            self.story.append(f"steps {sorted(lost)} were saved and not logged")
        found = same_runs.differences(self.folder, whole, self.reference.every_step, lost)
        if found:
            raise Failure("; ".join(found[:8]) + f"; {len(found)} differences" * (len(found) > 8))

    def repeat(self, command: list[str] | None, ranks: int, reference: Ended, verb: str) -> None:
        """Run a command, end it and run it again until it reaches its end.

        Args:
            command: the command; None: `fit`.
            ranks: number of ranks.
            reference: the command without interruption.
            verb: name of the command.
        """
        rng = self.rng
        wanted = rng.choice([1, 1, 1, 1, 2, 3])
        for number in range(wanted + 1):
            place = self.place if number == 0 else rng.choice(PLACES)
            if verb == "prepare":
                place = f"{place.split()[0]} {'prepare' if rng.random() < 0.7 else WHOLE}"
            kill = draw_kill(rng, place, reference, ranks) if number < wanted else None
            resume = number > 0 or rng.random() < 0.5
            workers = rng.choice([0, 0, 2])
            words = command or fit(self.folder, ranks, workers, resume=resume)
            before = newest_step(self.folder)
            ended = run_command(words, self.folder, ranks, kill)
            self.kills += ended.killed
            if -signal.SIGKILL in ended.codes:
                self.unlogged.add((newest_step(self.folder) or 0) - 1)
            codes = ",".join(map(str, ended.codes))
            self.story.append(f"{verb}: {kill or 'not killed'} {ended.where()}, code {codes}")
            if kill is None and any(ended.codes):
                raise Failure(f"the resumed {verb} ended with {codes}")
            if verb == "fit" and kill and ended.killed:
                self.check_signal(kill, ended, before)
            if not any(ended.codes):
                return

    def check_signal(self, kill: Kill, ended: Ended, before: int | None) -> None:
        """Check the exit code and the checkpoint of a run that was asked to end."""
        if kill.signum not in CODES or kill.call or kill.then_killed is not None:
            return
        code = CODES[kill.signum]
        signalled = [ended.codes[kill.rank]] if kill.rank is not None else ended.codes
        allowed = {code, 0, -kill.signum}  # -signum: before the command has begun
        if len(ended.codes) > 1:  # a rank may fail, or be ended, because the other has ended
            allowed |= {1, 143}
        if not set(signalled) <= allowed or {*signalled} == {1}:
            raise Failure(f"{kill} ended with {ended.codes} instead of {code}")
        if code in signalled and not kill.launcher:
            step = ended.last_step() or before
            if newest_step(self.folder) != step:
                raise Failure(f"{kill} saved step {newest_step(self.folder)} instead of {step}")


def newest_step(folder: Path) -> int | None:
    """Return the largest step of a run's checkpoints; None if it has none."""
    found = (folder / "run" / "checkpoints").glob("*.ckpt")
    steps = [torch.load(file, weights_only=True, mmap=True)["global_step"] for file in found]
    return max(steps, default=None)


def run_try(seed: int, place: str | None, reference: Reference, keep: Path) -> tuple[Try, str]:
    """Run one try and print its line; return it with what failed, or "".

    The folder of a try that fails is moved to `keep`.
    """
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    attempt, began, failure = Try(seed, place, reference, folder), time.monotonic(), ""
    try:
        attempt.run()
    except (Failure, Hang) as error:
        failure = str(error)
    except Exception:
        failure = traceback.format_exc()
    kept = ""
    if failure:
        kept = f"\n    {failure}\n    its folder is {keep / folder.name}"
        keep.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, keep / folder.name)
    else:
        shutil.rmtree(folder)
    result = "FAILED" if failure else "equal"
    line = f"seed {seed:<6} {attempt.place:18} {reference.ranks} rank{'s' * (reference.ranks > 1)} "
    line += f"{attempt.kills} killed {time.monotonic() - began:5.1f} s  {result}"
    details = "".join(f"\n    {sentence}" for sentence in attempt.story)
    print(line + (details if failure else "  " + " | ".join(attempt.story)) + kept, flush=True)
    return attempt, failure


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, help="default: 30, or no limit with --minutes")
    parser.add_argument("--minutes", type=float, help="begin no try after this time")
    parser.add_argument("--ranks", type=int, choices=[1, 2], help="default: 2 in every third try")
    parser.add_argument("--place", help=f"one of: {', '.join(PLACES)}; default: random ones")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first try (default: 0)")
    parser.add_argument("--keep", type=Path, default=Path("killed"), help="folder of failed tries")
    args = parser.parse_args()
    if args.place not in (None, *PLACES):
        parser.error(f"--place {args.place!r} is none of {', '.join(PLACES)}")
    if args.tries is None and args.minutes is None:
        args.tries = 30
    return args


def main() -> None:
    """Run the campaign; exit with 1 if a try failed."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and end the present try
    # Older Pythons do not give their path to the server process that imports the project.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    began, tries, failures, seeds = time.monotonic(), Counter(), Counter(), []
    references: dict[int, Reference] = {}
    with tempfile.TemporaryDirectory(prefix="kill-reference-") as folder:
        seed = args.seed
        while args.tries is None or tries.total() < args.tries:
            if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
                break
            ranks = args.ranks or (2 if seed % 3 == 0 else 1)
            if ranks not in references:
                references[ranks] = make_reference(Path(folder), ranks)
            attempt, failure = run_try(seed, args.place, references[ranks], args.keep)
            if attempt.kills or failure:
                tries[attempt.place, ranks] += 1
                failures[attempt.place, ranks] += bool(failure)
                seeds += [seed] * bool(failure)
            seed += 1
    print_table(tries, failures)
    print(
        f"{tries.total() - failures.total()} of {tries.total()} equal in every bit, "
        f"{(time.monotonic() - began) / 60:.1f} minutes"
    )
    if seeds:
        sys.exit(f"failed: {' '.join(f'--seed {seed}' for seed in seeds)}")


def print_table(tries: Counter, failures: Counter) -> None:
    """Print the tries and the failures of each place and number of ranks."""
    print(f"{'place':20}{'ranks':>6}{'tries':>7}{'failures':>10}")
    for place, ranks in sorted(tries):
        key = place, ranks
        print(f"{place:20}{ranks:>6}{tries[key]:>7}{failures[key]:>10}")


if __name__ == "__main__":
    main()
