"""What planning costs at ten million documents: time, memory, padding; and starting a run on them.

    python benchmarks/planning.py [--documents 10000000] [--row_length 4096]

Makes a corpus of synthetic lengths in a temporary folder (texts, then captions of 5-60 tokens with
pictures of 256 patches), its index on disk as `prepare` writes it. Each measurement is a process of
its own, so that its peak memory is its own: planning all rows once, what a run does when it starts
on a planned corpus and reads a row far into it, and the same for a hundredth of the documents.
"Peak" has the pages of memory-mapped files in it, which the system takes back when it needs them;
"kept" is what the process itself holds more at the end.
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

from tf_lightning.data.corpus.reader import IMAGE, Corpus, seed_of
from tf_lightning.data.packing import CorpusRows

NUM_PATCHES = 256


def write_corpus(path: Path, kind: str, documents: int, row_length: int) -> None:
    """A corpus whose texts all read the same few tokens: only its index is large."""
    path.mkdir()
    random = np.random.default_rng(0)
    if kind == "text":  # of 500 tokens in the median, cut where a row ends
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
    """The check of each part; tokens and latents are all 0."""
    image = np.zeros((1, 1, 16, 16), np.float16)
    longest, checks = int(parts[:, 1].max()), np.empty(len(parts), np.uint32)
    for place in range(count):
        seed = seed_of(place, count)
        known = [zlib.crc32(bytes(4 * n), seed) for n in range(longest + 1)]
        known.append(zlib.crc32(image, seed))  # found at IMAGE, which is -1
        checks[place::count] = np.array(known, np.uint32)[parts[place::count, 1]]
    return checks


def measured(path: Path, row_length: int, queue: multiprocessing.Queue) -> None:
    """Seconds until a row in the middle of the tenth epoch is read, MB, and share of padding."""
    before, start = memory("RssAnon"), time.perf_counter()
    chances = {"image_first_prob": 0.2, "caption_drop_prob": 0.1}
    sizes = {"row_length": row_length, "num_patches": NUM_PATCHES}
    rows = CorpusRows(Corpus(path), seed=(0, 0), **sizes, **chances)
    rows.row(int(9.5 * rows.rows_per_epoch))
    seconds = time.perf_counter() - start
    queue.put((seconds, memory("VmHWM"), memory("RssAnon") - before, 1 - rows.fill))


def memory(kind: str) -> float:
    """Of this process, in MB (Linux): "VmHWM", the most so far, or "RssAnon", without files."""
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if kind in s]
    return int(line.split()[1]) / 1024


def in_a_process(*arguments) -> tuple[float, float, float, float]:
    """`measured`, with nothing in memory but what it needs."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measured, args=(*arguments, queue))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--row_length", type=int, default=4096)
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    print("corpus     documents   what            seconds  peak MB  MB kept  padding")
    for kind in ("text", "captions"):
        for documents in (args.documents, args.documents // 100):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / kind
                write_corpus(path, kind, documents, args.row_length)
                for what in ("plan and start", "start"):
                    seconds, peak, new, padding = in_a_process(path, args.row_length)
                    line = f"{kind:9}{documents:11,}   {what:15}{seconds:8.2f}{peak:9,.0f}"
                    print(f"{line}{new:9,.0f}{padding:9.2%}", flush=True)


if __name__ == "__main__":
    main()
