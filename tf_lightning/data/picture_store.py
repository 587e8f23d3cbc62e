"""All pictures of a source in one file, read by number: what training an autoencoder goes through.

A store is a directory of
    pictures.bin   uint8 (n, H, W, 3)
    store.json     {"shape": [n, H, W, 3], "skipped": {reason: count}, "origin": [...]}
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from tqdm import tqdm

from tf_lightning.data.corpus import Skipped, Source, Split, refuse_damage
from tf_lightning.data.prepare import summary
from tf_lightning.errors import UserError

FORMAT = 1  # of the files; a new number has every store made again


class PictureStore:
    """The pictures of one split.

    Attributes:
        pictures: uint8 (n, H, W, 3), in a file.
        skipped: how many samples were left out, by reason.

    Raises:
        UserError: the file does not hold what store.json says.
    """

    @refuse_damage
    def __init__(self, path: str | Path):
        self.path = Path(path)
        facts = json.loads((self.path / "store.json").read_text())
        self.skipped: dict[str, int] = facts["skipped"]
        shape = tuple(facts["shape"])
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError("pictures of another shape")
        if 0 in shape:  # an empty file cannot be mapped
            self.pictures = np.empty(shape, np.uint8)
            return
        file = self.path / "pictures.bin"
        if not file.is_file() or file.stat().st_size != math.prod(shape):
            raise ValueError("file of another size than store.json says")
        self.pictures = np.memmap(file, np.uint8, "r", shape=shape)

    def __reduce__(self):
        """Travels to DataLoader workers as its path, not its content."""
        return PictureStore, (self.path,)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)


def first_picture(source: Source) -> Image.Image:
    """The first usable training picture, to tell the size of all.

    Raises:
        UserError: there is none.
    """
    skipped: Counter[str] = Counter()
    for document in source.documents("train"):
        if isinstance(document, Skipped):
            skipped[document.reason] += 1
            continue
        for part in document:
            if isinstance(part, Image.Image):
                return part
    told = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
    told = f" ({told})" if told else ""
    raise UserError(f"the source has no usable picture to train on{told}; check its paths")


def store_pictures(source: Source, split: Split, directory: str | Path) -> PictureStore:
    """The store `<directory>/pictures-<split>-<hash>`, made if it is not there.

    Every picture of every document is in it, in order; texts are passed over. It appears complete
    or not at all, and is found again by what it was made of.

    Raises:
        UserError: pictures of several sizes, or none to train on.
    """
    origin = [FORMAT, source.fingerprint(split)]
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    path = Path(directory) / f"pictures-{split}-{digest}"
    if path.is_dir():
        return PictureStore(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory, prefix=f".{path.name}-"))
    try:
        shape, skipped = _write(source, split, unfinished)
        facts = {"shape": shape, "skipped": skipped, "origin": origin}
        (unfinished / "store.json").write_text(json.dumps(facts, indent=2) + "\n")
        if not path.is_dir():  # another process may have been as quick
            os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    rank_zero_info(summary("pictures", split, shape[0], skipped).replace("documents", "pictures"))
    return PictureStore(path)


def _write(source: Source, split: Split, folder: Path) -> tuple[list[int], dict[str, int]]:
    """Write the pictures; their shape (n, H, W, 3), and what was skipped, by reason."""
    skipped: Counter[str] = Counter()
    size = first_picture(source).size
    count = 0
    title = f"storing {split} pictures"
    with (folder / "pictures.bin").open("wb") as file:
        for document in tqdm(source.documents(split), title, unit=" documents", delay=2):
            if isinstance(document, Skipped):
                skipped[document.reason] += 1
                continue
            for picture in (part for part in document if isinstance(part, Image.Image)):
                if picture.size != size:
                    raise UserError(
                        f"the source has pictures of {size[0]}x{size[1]} and of "
                        f"{picture.width}x{picture.height}; give it one image_size"
                    )
                file.write(picture.tobytes())
                count += 1
    return [count, size[1], size[0], 3], dict(skipped.most_common())
