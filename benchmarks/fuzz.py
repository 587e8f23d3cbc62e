"""Give random and damaged files, options and prompts to all that reads them; count what fails.

    python benchmarks/fuzz.py --minutes 10
    python benchmarks/fuzz.py --only readers --tries 1000 --seed 7

A try makes one hostile input in memory or in a temporary folder and reads it in this process. It
fails if it raises anything but UserError, takes more than 5 s, gives an image the caption of
another, or raises the peak memory by more than 512 MB. A failure prints its section and its seed;
--only SECTION --seed SEED --tries 1 repeats it. The exit code is 1 if any try failed.
"""

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import hostile_files, hostile_folders, hostile_options  # noqa: E402
from support.sources import GreyImages  # noqa: E402
from tf_lightning.data import Mixture, Skipped  # noqa: E402
from tf_lightning.data.corpus.reader import Corpus  # noqa: E402
from tf_lightning.errors import UserError  # noqa: E402

SECONDS = 5
MEGABYTES = 512


class TooSlow(Exception):
    """A try took more than SECONDS."""


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
    for count in layout.lengths, layout.pairs, layout.prompted, layout.read_images:
        count(*[4] if count == layout.lengths else [])
    for number in range(min(len(corpus), len(clean))):
        document = corpus.document(number)
        if not all(map(torch.equal, document, clean[number])):
            raise AssertionError(f"document {number} changed after damage of {file.name}")


SECTIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "readers": readers,
    "corpora": corpora,
    "autoencoders": hostile_folders.read_autoencoder,
    "exports": hostile_folders.read_export,
    "configs": hostile_options.build_model,
    "prompts": hostile_options.answer_prompt,
}


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooSlow after SECONDS, and MemoryError if the peak memory rose by MEGABYTES."""

    def stop(*_):
        raise TooSlow(f"more than {SECONDS} s")

    before, old = _peak(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    if _peak() - before > MEGABYTES:
        raise MemoryError(f"{_peak() - before:.0f} MB over the base")


def _peak() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_try(section: str, seed: int) -> str | None:
    """Make and read one input; return the traceback of a failure."""
    folder = Path(tempfile.mkdtemp())
    try:
        with limited():
            SECTIONS[section](folder, random.Random(f"{section} {seed}"))
    except UserError:
        pass
    except (Exception, RecursionError):
        return traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def main() -> int:
    """Run tries until the time or the number of them is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1, help="time for all sections")
    parser.add_argument("--tries", type=int, help="tries of each section; overrides --minutes")
    parser.add_argument("--only", choices=SECTIONS, help="a single section")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first try")
    args = parser.parse_args()
    sections = [args.only] if args.only else list(SECTIONS)
    failures = 0
    for section in sections:
        end = time.monotonic() + 60 * args.minutes / len(sections)
        count = failed = 0
        while count < args.tries if args.tries else time.monotonic() < end:
            seed = args.seed + count
            if trace := run_try(section, seed):
                failed += 1
                print(f"{section}, seed {seed}:\n{trace}", flush=True)
            count += 1
        print(f"{section}: {count:,} tries, {failed:,} failures", flush=True)
        failures += failed
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
