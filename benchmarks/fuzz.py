"""Give random and damaged files, options and prompts to everything that reads them; count failures.

    python benchmarks/fuzz.py --minutes 10
    python benchmarks/fuzz.py --tries 100000 --keep failures
    python benchmarks/fuzz.py --section pairs --seed 7 --tries 1

A try makes one hostile input in memory or in a temporary folder and reads it. It fails if it
raises anything but UserError with one sentence, takes more than 5 s of CPU time, gives an image the
caption of another, loads a checkpoint that its checksum should refuse, raises the peak memory by
more than 512 MB, or ends the process. A failure prints its section and its seed, which repeat it,
and --keep saves its input. The exit code is 1 if any try failed.

The tries of a section run in a process of their own: a watchdog in it ends a try that waits or
hangs in C code, and a new process goes on after one that crashed.
"""

import argparse
import faulthandler
import logging
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import (  # noqa: E402
    hostile_checkpoints,
    hostile_files,
    hostile_folders,
    hostile_options,
    hostile_pairs,
    hostile_tokenizers,
)
from support.sources import GreyImages  # noqa: E402
from tf_lightning.data import Mixture, Skipped  # noqa: E402
from tf_lightning.data.corpus.reader import Corpus  # noqa: E402
from tf_lightning.errors import UserError  # noqa: E402

SECONDS = 5  # of CPU time that a try may take, also on a busy machine
WATCHDOG = 30  # seconds after which a try that waits or hangs in C code is ended with its process
MEGABYTES = 512  # that a try may take over the memory before it
TRY = "try-"  # begins the name of the folder of a try
CEILING = 4096  # megabytes at which the process is ended before the machine has no memory left


class TooSlow(BaseException):
    """A try took more than SECONDS. No reader takes it for an error of its own."""


def readers(folder: Path, rng: random.Random) -> None:
    """Read a random or damaged file with any reader."""
    file = rng.choice(hostile_files.MAKERS)(folder, rng)
    (file.parent / "red.png").write_bytes(hostile_files.encoded_image("red"))
    (file.parent / "forbidden").mkdir(mode=0)
    reader = rng.choice(hostile_files.READERS)
    sized = {} if reader is hostile_files.data.TextFiles else {"image_size": 16}
    source = reader(str(file), val_fraction=0, **sized)
    source.fingerprint("train")
    for document in source.documents("train"):
        if not isinstance(document, Skipped) and hostile_files.wrong_pairs(document):
            raise AssertionError(f"wrong pairs {hostile_files.wrong_pairs(document)} in {file}")


@cache
def prepared() -> tuple[Path, list]:
    """Prepare a small corpus once; return its folder and its documents."""
    folder = tempfile.mkdtemp()
    data = Mixture({"pictures": GreyImages(num_documents=20)}, autoencoder="pixels", patch_size=4,
                   row_length=64, vocab_size=300, cache_dir=folder)  # fmt: skip
    data.setup()
    corpus = data.corpora["train"]["pictures"]
    return corpus.path, [corpus.document(number) for number in range(len(corpus))]


def corpora(folder: Path, rng: random.Random) -> None:
    """Read a prepared corpus after damage of one of its files."""
    path, clean = prepared()
    copy = shutil.copytree(path, folder / path.name)
    file = rng.choice(sorted(file for file in copy.iterdir() if file.stat().st_size))
    file.write_bytes(hostile_files.damaged(file.read_bytes(), rng))
    corpus = Corpus(copy)
    layout = corpus.layout()
    layout.lengths(4), layout.image_patches(4), layout.pairs(), layout.prompted()
    for number in range(min(len(corpus), len(clean))):
        document = corpus.document(number)
        if not all(map(torch.equal, document, clean[number])):
            raise AssertionError(f"document {number} changed after damage of {file.name}")


SECTIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "readers": readers,
    "pairs": hostile_pairs.read_pairs,
    "images": hostile_pairs.read_changed_image,
    "bombs": hostile_files.read_bomb,
    "corpora": corpora,
    "flipped bits": hostile_checkpoints.flip_bit,
    "checkpoints": hostile_checkpoints.damage_checkpoint,
    "sharded checkpoints": hostile_checkpoints.read_sharded,
    "tokenizers": hostile_tokenizers.read_tokenizer,
    "language models": hostile_tokenizers.read_language_model,
    "autoencoders": hostile_folders.read_autoencoder,
    "exports": hostile_folders.read_export,
    "configs": hostile_options.build_model,
    "prompts": hostile_options.answer_prompt,
}
PREPARE = {"bombs": hostile_files.all_bombs, "checkpoints": hostile_checkpoints.compressed}
SHARES = {"readers": 6, "pairs": 6, "images": 6, "bombs": 0.1, "tokenizers": 2, "checkpoints": 2}


# One try


def run_try(section: str, seed: int, keep: Path | None = None) -> str | None:
    """Make and read one input; return what failed.

    Args:
        section: key of SECTIONS.
        seed: seed of the input.
        keep: folder to save the input of a failure in.
    """
    folder = Path(tempfile.mkdtemp(prefix=TRY))
    base, began = reset_peak(), time.process_time()
    try:
        with alarm():
            SECTIONS[section](folder, random.Random(f"{section} {seed}"))
        failure = None
    except UserError as error:
        failure = None if is_sentence(str(error)) else f"not one sentence: {str(error)!r}"
    except KeyboardInterrupt:
        raise
    except BaseException:  # some libraries raise errors that are no Exceptions
        failure = traceback.format_exc()
    if failure is None and time.process_time() - began > SECONDS:
        failure = f"took {time.process_time() - began:.1f} s"
    if (rise := peak() - base) > MEGABYTES:
        failure = f"{rise:.0f} MB over the base\n{failure or ''}"
    if failure and keep:
        save_failure(folder, failure, keep, section, seed)
    shutil.rmtree(folder, ignore_errors=True)
    return failure


def warm_up(section: str) -> None:
    """Make what the tries of a section share, without limits."""
    PREPARE.get(section, lambda: None)()
    with tempfile.TemporaryDirectory() as folder, suppress(Exception):
        SECTIONS[section](Path(folder), random.Random(section))


def is_sentence(message: str) -> bool:
    """Return whether an error message is one line of a length that a person reads."""
    return 0 < len(message) < 2000 and "\n" not in message


def save_failure(folder: Path, failure: str, keep: Path, section: str, seed: int) -> None:
    """Copy the input of a try that failed, with what failed."""
    target = keep / f"{section.replace(' ', '-')}-{seed}"
    shutil.copytree(folder, target, dirs_exist_ok=True, symlinks=True)
    (target / "failure.txt").write_text(failure, errors="replace")


@contextmanager
def alarm() -> Iterator[None]:
    """Raise TooSlow in a block that takes more than SECONDS."""

    def stop(*_):
        raise TooSlow(f"more than {SECONDS} s")

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def reset_peak() -> float:
    """Let the peak memory start from the present memory, and return it in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak(process: int | str = "self", field: str = "VmHWM") -> float:
    """Return the peak resident memory of a process in MB, or with VmRSS the present one."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return found[0] / 1024 if found else 0.0  # a process that has ended has none


# Many tries


def run_tries(section: str, seeds: range, end: float, keep: Path | None) -> tuple[int, int]:
    """Run a section's tries in processes of their own; print and count the failures.

    Args:
        section: key of SECTIONS.
        seeds: seeds of the tries.
        end: time, as of time.monotonic, after which none begins.
        keep: see `run_try`.

    Returns:
        The number of tries and of failures.
    """
    count = failed = 0
    while count < len(seeds) and time.monotonic() < end:
        for seed, failure in results(section, seeds[count:], end, keep):
            count += 1
            if failure:
                failed += 1
                print(f"{section}, seed {seed}:\n{failure}", flush=True)
    return count, failed


def results(
    section: str, seeds: range, end: float, keep: Path | None
) -> Iterator[tuple[int, str | None]]:
    """Run tries in one process until it ends; yield the seed and the failure of each."""
    here, there = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+") as stacks:
        context = multiprocessing.get_context("fork")
        arguments = section, seeds, end, keep, place, (here, there), stacks
        process = context.Process(target=work, args=arguments)
        process.start()
        there.close()
        done = 0
        try:
            while True:
                while not here.poll(0.05):
                    if process.is_alive() and peak(process.pid, "VmRSS") > CEILING:
                        process.kill()
                result = here.recv()
                done += 1
                yield result
        except EOFError:
            process.join()
        if process.exitcode:
            stacks.seek(0)
            failure = f"the process ended with {process.exitcode}\n{stacks.read()}"
            seed = seeds[min(done, len(seeds) - 1)]
            for folder in Path(place).glob(f"{TRY}*") if keep else ():
                save_failure(folder, failure, keep, section, seed)
            yield seed, failure


def work(
    section: str,
    seeds: range,
    end: float,
    keep: Path | None,
    place: str,
    ends: tuple[Connection, Connection],
    stacks: IO[str],
) -> None:
    """Run tries and send the result of each; a process that hangs ends with its stacks.

    Args:
        section: see `run_tries`.
        seeds: see `run_tries`.
        end: see `run_tries`.
        keep: see `run_tries`.
        place: folder for the inputs.
        ends: where the results are received, which is closed here, and where they are sent.
        stacks: file for the stacks.
    """
    here, results = ends
    here.close()  # so that sending fails when the other process has ended
    tempfile.tempdir = place
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    faulthandler.enable(stacks)
    warm_up(section)
    for seed in seeds:
        if time.monotonic() > end:
            break
        faulthandler.dump_traceback_later(WATCHDOG, exit=True, file=stacks)
        failure = run_try(section, seed, keep)
        faulthandler.cancel_dump_traceback_later()
        results.send((seed, failure))


def main() -> int:
    """Run tries until the time or the number of them is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="time for all sections (default: 1)")
    parser.add_argument("--tries", type=int, help="number of tries of all sections")
    parser.add_argument("--section", choices=SECTIONS, help="a single section")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first try of a section")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of failures")
    args = parser.parse_args()
    sections = [args.section] if args.section else list(SECTIONS)
    shares = {section: SHARES.get(section, 1) for section in sections}
    minutes = args.minutes or (1 if args.tries is None else float("inf"))
    total = failures = 0
    for section, share in shares.items():
        part = share / sum(shares.values())
        tries = 10**9 if args.tries is None else max(1, round(args.tries * part))
        began = time.monotonic()
        end = began + 60 * minutes * part
        seeds = range(args.seed, args.seed + tries)
        count, failed = run_tries(section, seeds, end, args.keep)
        seconds = time.monotonic() - began
        print(f"{section}: {count:,} tries, {failed:,} failures, {seconds:.0f} s", flush=True)
        total, failures = total + count, failures + failed
    print(f"all: {total:,} tries, {failures:,} failures", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
