"""Compare reading images from tars in place with decoding the same files by Pillow.

    OMP_NUM_THREADS=1 python benchmarks/loading.py [--images 2000] [--emoji FOLDER]

Captioned 256 x 256 JPEGs are generated into tars in a temporary folder; `--emoji` names a folder of
tars to read as well. Three rates are printed, in images per second of CPU time:
    Pillow   open, decode and convert to RGB, from bytes in memory, in the same order
    rows     the rows of training with 0 workers: read from the tars, decode, resize and crop, find
             the captions, make uint8 tensors
    batches  the packed batches of float tensors, with noise
All take turns in one process, so other work on the machine affects each. The aim is 90% of Pillow's
rate for the rows.
"""

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tf_lightning.data import ImageCaptionData

REPEATS = 5


def write_tars(folder: Path, count: int, side: int = 256) -> None:
    """Write tars of smooth random images, which take 10-20 kB as JPEG, like photographs."""
    random = np.random.default_rng(0)
    for first in range(0, count, 1000):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for key in range(first, min(first + 1000, count)):
                small = Image.fromarray(random.integers(0, 256, (48, 48, 3), np.uint8))
                file = io.BytesIO()
                small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                caption = f"image {key} of many".encode()
                for kind, content in (("jpg", file.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{key:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def seconds(work) -> float:
    """CPU time of calling `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(name: str, paths: str, side: int, cache: Path) -> None:
    """Print one line of the table for the tars that match `paths`."""
    data = ImageCaptionData(
        paths, val_fraction=0.0, image_size=side, autoencoder="pixels", lazy_images=True,
        patch_size=16, row_length=4096, batch_size=1, vocab_size=400, cache_dir=str(cache),
        caption_drop_prob=0.0,
    )  # fmt: skip
    data.prepare_data()
    loader = data.train_dataloader()
    (rows,) = loader.dataset.corpora
    images = rows.corpus._lazy_images
    order = [int(w.documents[p]) for w in [rows._find(0)[0]] for row in w.rows for p in row]
    places = images.locations[order].tolist()
    files = [Path(file).read_bytes() for file in images.files]
    contents = [files[file][first : first + size] for file, first, size, _ in places]
    kilobytes = sum(map(len, contents)) / len(contents) / 1000

    def pillow() -> None:
        for content in contents:
            Image.open(io.BytesIO(content)).convert("RGB").load()

    def ours() -> None:
        for number in range(rows.rows_per_epoch):
            rows.row(number)

    def batches() -> None:
        for number in range(rows.rows_per_epoch):
            loader.collate_fn([loader.dataset[number]])

    times = [(seconds(pillow), seconds(ours), seconds(batches)) for _ in range(REPEATS)]
    rates = [len(order) / statistics.median(column) for column in zip(*times, strict=True)]
    shares = [statistics.median(t[0] / t[n] for t in times) for n in (1, 2)]
    line = f"{name:10}{len(order):8,}{kilobytes:9.1f}" + "".join(f"{r:10,.0f}" for r in rates)
    print(f"{line}{shares[0]:10.1%}{shares[1]:10.1%}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="default: 2000")
    parser.add_argument("--emoji", help="folder of tars of 64 x 64 images")
    args = parser.parse_args()
    print("images/s                kB each    Pillow      rows   batches      rows   batches")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tars(folder, args.images)
        compare("JPEG 256", f"{folder}/*.tar", 256, folder / "cache")
        if args.emoji:
            compare("emoji", f"{args.emoji}/*.tar", 64, folder / "cache")


if __name__ == "__main__":
    main()
