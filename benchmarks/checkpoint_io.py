"""Compare writing and reading of checkpoints, with their checksum and on the disk, with torch's.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_io.py [--gigabytes 1] [--folder FOLDER]
    OMP_NUM_THREADS=1 python benchmarks/checkpoint_io.py --flips 1000

The first command prints wall-clock seconds, best and median, of
    torch.save, which leaves the file in the memory of the operating system
    torch.save and fsync, which waits until it is on the disk
    write_checkpoint, which also computes a checksum
    torch.load and load_checkpoint, which verifies it
of one state. All take turns, so other work on the machine affects each. The aims are 1.3 times
torch.save and 1.2 times torch.load. Every writing makes a new file.

The second command flips single random bits of a checkpoint and prints how many were refused.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tf_lightning.checkpoint_file import (  # noqa: E402
    DamagedFile,
    load_checkpoint,
    unchanged,
    write_checkpoint,
)

TENSOR = 16 << 20  # bytes, a matrix of 2048 x 2048


def make_state(gigabytes: float) -> dict[str, Tensor]:
    """Return float32 matrices of a total size."""
    count = max(1, round(gigabytes * 1e9 / TENSOR))
    return {f"matrix{i}": torch.randn(TENSOR // 4) for i in range(count)}


def save_and_sync(state: dict[str, Tensor], path: Path) -> None:
    """Call torch.save and wait until the file is on the disk."""
    torch.save(state, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of calling `work`."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(state: dict[str, Tensor], folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way to write and to read, in the order of the repeats."""
    kept, new = folder / "kept.ckpt", folder / "new.ckpt"
    writers = {
        "torch.save": lambda: torch.save(state, new),
        "torch.save and fsync": lambda: save_and_sync(state, new),
        "write_checkpoint": lambda: write_checkpoint(state, new),
    }
    readers = {
        "torch.load": lambda: torch.load(kept, map_location="cpu", weights_only=True),
        "load_checkpoint": lambda: (unchanged.clear(), load_checkpoint(kept)),
    }
    write_checkpoint(state, kept)
    found: dict[str, list[float]] = {name: [] for name in [*writers, *readers]}
    for _ in range(repeats):
        for name, write in writers.items():
            new.unlink(missing_ok=True)
            os.sync()  # the disk has nothing else to write
            found[name].append(seconds(write))
        for name, read in readers.items():
            found[name].append(seconds(read))
    return found


def print_times(found: dict[str, list[float]]) -> None:
    """Print best and median of each, and their ratios to torch's."""
    for name, values in found.items():
        base = found["torch.load" if "load" in name else "torch.save"]
        best, median = min(values), statistics.median(values)
        ratios = best / min(base), median / statistics.median(base)
        print(
            f"{name:22} best {best:6.3f} s ({ratios[0]:.2f}x)   "
            f"median {median:6.3f} s ({ratios[1]:.2f}x)"
        )


def count_refused(folder: Path, flips: int) -> int:
    """Flip single random bits of a small checkpoint; return how many of them are refused."""
    path, rng = folder / "flipped.ckpt", random.Random(0)
    write_checkpoint({"weights": torch.randn(64, 64), "names": ["a", {"b": 1.5}]}, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(flips):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except DamagedFile:
            refused += 1
    return refused


def main() -> None:
    """Run one of the two measurements."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add = parser.add_argument
    add("--gigabytes", type=float, default=1.0, help="size of the state (default: 1)")
    add("--repeats", type=int, default=5, help="of each measurement (default: 5)")
    add("--folder", help="a folder on the disk to measure (default: the temporary folder)")
    add("--flips", type=int, help="flip this many bits instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if options.flips:
            refused = count_refused(Path(name), options.flips)
            print(f"{refused} of {options.flips} flipped bits refused")
            sys.exit(refused < options.flips)
        torch.manual_seed(0)
        print_times(measure(make_state(options.gigabytes), Path(name), options.repeats))


if __name__ == "__main__":
    main()
