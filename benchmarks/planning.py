"""Measure the time, memory and padding of planning rows for ten million documents.

    python benchmarks/planning.py [--documents 10000000] [--row_length 4096]

A corpus with synthetic document lengths is written to a temporary folder: texts, then captions of
5-60 tokens with images of 256 patches. Its index is on disk as `prepare` writes it. For the given
number of documents and for a hundredth of it, two cases are measured, each in a new process:
    plan and start  plan all rows and read a row far into the corpus
    start           start on the planned corpus and read the same row
"peak MB" includes the pages of memory-mapped files, which the system can reclaim. "MB kept" is the
memory that the process itself holds at the end beyond that at its start.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from tf_lightning.data.corpus.damage import checksum_seed
from tf_lightning.data.corpus.parts import IMAGE
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.packing import CorpusRows

NUM_PATCHES = 256


def write_corpus(path: Path, kind: str, documents: int, row_length: int) -> None:
    """Write a corpus with a large index; all its documents share the same few tokens."""
    path.mkdir()
    random = np.random.default_rng(0)
    if kind == "text":  # median 500 tokens, at most one row
        tokens = random.lognormal(6.2, 1.2, documents).astype(np.int64).clip(1, row_length - 2)
        parts = np.stack([np.zeros_like(tokens), tokens], 1)
    else:
        tokens = random.integers(5, 61, documents)
        images = np.zeros_like(tokens)
        parts = np.stack([images, tokens, images, np.full_like(tokens, IMAGE)], 1).reshape(-1, 2)
    np.save(path / "parts.npy", parts)
    np.save(path / "documents.npy", np.arange(documents + 1) * (len(parts) // documents))
    np.save(path / "checks.npy", checks_of(parts, 1 if kind == "text" else 2))
    np.zeros(row_length, np.uint32).tofile(path / "tokens.bin")
    np.zeros((1, 1, 16, 16), np.float16).tofile(path / "latents.bin")
    facts = {"num_tokens": row_length, "num_images": 1, "image_shape": [1, 16, 16]}
    facts |= {"skipped": {}, "made_from": []}
    (path / "corpus.json").write_text(json.dumps(facts))


def checks_of(parts: np.ndarray, count: int) -> np.ndarray:
    """Checksum of each part; all tokens and latents are 0."""
    image = np.zeros((1, 1, 16, 16), np.float16)
    longest, checks = int(parts[:, 1].max()), np.empty(len(parts), np.uint32)
    for place in range(count):
        seed = checksum_seed(place, count)
        known = [zlib.crc32(bytes(4 * n), seed) for n in range(longest + 1)]
        known.append(zlib.crc32(image, seed))  # IMAGE is -1 and indexes the last entry
        checks[place::count] = np.array(known, np.uint32)[parts[place::count, 1]]
    return checks


def measured(path: Path, row_length: int, queue: multiprocessing.Queue) -> None:
    """Put the seconds until a row is read, peak MB, kept MB and share of padding into a queue."""
    before, start = memory("RssAnon"), time.perf_counter()
    chances = {"image_first_prob": 0.2, "caption_drop_prob": 0.1}
    sizes = {"row_length": row_length, "num_patches": NUM_PATCHES}
    rows = CorpusRows(Corpus(path), seed=(0, 0), **sizes, **chances)
    rows.row(int(9.5 * rows.rows_per_epoch))
    seconds = time.perf_counter() - start
    queue.put((seconds, memory("VmHWM"), memory("RssAnon") - before, 1 - rows.fill))


def memory(kind: str) -> float:
    """Memory of this process in MB (Linux): "VmHWM" is the peak, "RssAnon" excludes files."""
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if kind in s]
    return int(line.split()[1]) / 1024


def measure_in_new_process(*arguments) -> tuple[float, float, float, float]:
    """Run `measured` in a new process, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measured, args=(*arguments, queue))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=10_000_000, help="default: 10,000,000")
    parser.add_argument("--row_length", type=int, default=4096, help="tokens (default: 4096)")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    print("corpus     documents   what            seconds  peak MB  MB kept  padding")
    for kind in ("text", "captions"):
        for documents in (args.documents, args.documents // 100):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / kind
                write_corpus(path, kind, documents, args.row_length)
                for what in ("plan and start", "start"):
                    seconds, peak, new, padding = measure_in_new_process(path, args.row_length)
                    line = f"{kind:9}{documents:11,}   {what:15}{seconds:8.2f}{peak:9,.0f}"
                    print(f"{line}{new:9,.0f}{padding:9.2%}", flush=True)


if __name__ == "__main__":
    main()
