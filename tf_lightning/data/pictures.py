"""Pictures alone, for training autoencoders: every source's pictures, without its words.

Shapes: B pictures of H x W pixels.

All pictures of a source in one file, read by number: what training an autoencoder goes through.

A store is a directory of
    pictures.bin   uint8 (n, H, W, 3)
    store.json     {"shape": [n, H, W, 3], "skipped": {reason: count}, "origin": [...]}

Random changes of a training picture, so that a small set does not get learnt by heart.

Pictures are uint8 (H, W, 3).
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from tqdm import tqdm

from tf_lightning.data.corpus.prepare import summary
from tf_lightning.data.corpus.reader import refuse_damage
from tf_lightning.data.documents import Skipped, Source, Split
from tf_lightning.data.stream import ENDLESS, RowSampler, StreamData
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


@dataclass(frozen=True)
class Augment:
    """Which changes are made; the defaults are those of photographs.

    Attributes:
        flip: mirror left and right, half of the time.
        rotate: turn by 0, 90, 180 or 270 degrees.
        zoom: largest enlargement or reduction, >= 1; 1 = none. Its place is random too. What comes
            in from outside the picture repeats its edge.
        shuffle_colours: put red, green and blue in a random order.
    """

    flip: bool = True
    rotate: bool = False
    zoom: float = 1.0
    shuffle_colours: bool = False

    def __post_init__(self) -> None:
        if not self.zoom >= 1:
            raise UserError(f"zoom={self.zoom} must be 1 (none) or more; 1.4 is a good start")

    def __call__(self, picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A changed copy, of the same size."""
        if self.flip and random.random() < 0.5:
            picture = picture[:, ::-1]
        if self.rotate:
            picture = np.rot90(picture, random.integers(4))
        if self.zoom > 1:
            scale = self.zoom ** random.uniform(-1, 1)
            picture = zoomed(picture, scale, random.uniform(0, 1, size=2))
        if self.shuffle_colours:
            picture = picture[..., random.permutation(3)]
        return np.ascontiguousarray(picture)


def zoomed(picture: np.ndarray, scale: float, place: np.ndarray) -> np.ndarray:
    """A picture scaled by `scale` and cut or filled up to its size.

    Args:
        picture: uint8 (H, W, 3).
        scale: > 1 enlarges.
        place: where the window of H x W lies along the two free distances, (2,) in [0, 1].
    """
    height, width = picture.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, 3))  # bicubic
    missing = [max(0, a - b) for a, b in zip((height, width), scaled.shape, strict=False)]
    before = [round(float(p) * m) for p, m in zip(place, missing, strict=True)]
    pads = [(b, m - b) for b, m in zip(before, missing, strict=True)]
    scaled = np.pad(scaled, [*pads, (0, 0)], mode="edge")
    spare = [a - b for a, b in zip(scaled.shape, (height, width), strict=False)]
    top, left = (round(float(p) * s) for p, s in zip(place, spare, strict=True))
    return scaled[top : top + height, left : left + width]


NOTHING = -1  # the row of a picture that only fills up the last batch of a rank


class PictureBatch(NamedTuple):
    """What an autoencoder trains on."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    rows: Tensor  # (B,) int64, place in the stream; NOTHING is not to be counted


class TrainPictures(Dataset):
    """Pictures without end, each once an epoch: number `row` depends on (seed, row) alone.

    Args:
        store: the pictures.
        augment: how they are changed.
        seed: of order and changes.
    """

    def __init__(self, store: PictureStore, augment: Augment, seed: int = 0):
        self.store, self.augment, self.seed = store, augment, seed

    def __len__(self) -> int:
        """No end."""
        return ENDLESS

    def __getitem__(self, row: int) -> PictureBatch:
        """One picture, (3, H, W), and its row."""
        epoch, place = divmod(row, len(self.store))
        number = epoch_order(len(self.store), self.seed, epoch)[place]
        random = np.random.default_rng((self.seed, 1, row))
        return as_item(self.augment(self.store.pictures[number], random), row)


class ValPictures(Dataset):
    """Pictures once, as they are; the first few again at the end, so that every rank has as many.

    Args:
        store: the pictures.
        world_size: ranks.
    """

    def __init__(self, store: PictureStore, world_size: int = 1):
        self.store = store
        self.length = -(-len(store) // world_size) * world_size

    def __len__(self) -> int:
        """A multiple of the ranks."""
        return self.length

    def __getitem__(self, row: int) -> PictureBatch:
        """One picture and its number, NOTHING where it is there again."""
        picture = self.store.pictures[row % len(self.store)]
        return as_item(picture, row if row < len(self.store) else NOTHING)


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, (count,)."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def as_item(picture: np.ndarray, row: int) -> PictureBatch:
    """uint8 (H, W, 3) as the model takes it."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return PictureBatch(pixels.float() / 127.5 - 1, torch.tensor(row))


class PictureData(StreamData):
    """The pictures of a source, stored once and served without end.

    Args:
        source: any source of documents; `tf_lightning.data.ImageFiles` reads plain picture files.
        batch_size: pictures in a batch of one rank.
        augment: random changes of training pictures.
        num_workers: processes that load pictures; 0 loads in the training process.
        seed: of order and changes, >= 0.
        cache_dir: where the pictures are kept, uint8.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 16,
        augment: Augment = Augment(),  # noqa: B008 - it is frozen
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = "data",
    ):
        super().__init__(batch_size)
        self.source, self.augment = source, augment
        self.num_workers, self.seed, self.cache_dir = num_workers, seed, Path(cache_dir)
        self.stores: dict[str, PictureStore] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, told by the first picture."""
        picture = first_picture(self.source)
        return picture.height, picture.width

    def prepare_data(self) -> None:
        """Store the pictures, where that was not done."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` made."""
        if not self.stores:
            self._open()

    def _open(self) -> None:
        self.stores = {
            split: store_pictures(self.source, split, self.cache_dir) for split in ("train", "val")
        }
        if not len(self.stores["val"]):
            raise UserError(
                "no picture is held out to validate on; give the source a larger val_fraction, "
                "num_val, or val_paths"
            )

    def train_dataloader(self) -> DataLoader:
        """Batches without end, from the picture that the run has reached."""
        pictures = TrainPictures(self.stores["train"], self.augment, self.seed)
        sampler = RowSampler(
            pictures,
            self.next_row,
            batch_size=self.batch_size,
            num_batches=self.num_batches(),
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._loader(pictures, sampler)

    def val_dataloader(self) -> DataLoader:
        """Every held-out picture once."""
        pictures = ValPictures(self.stores["val"], self.world_size)
        world = {"num_replicas": self.world_size, "rank": self.rank}
        return self._loader(pictures, DistributedSampler(pictures, shuffle=False, **world))

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, pictures: Dataset, sampler: Sampler) -> DataLoader:
        return DataLoader(
            pictures,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
