"""`ImageData`, the data module for training autoencoders: the images of a source without its texts.

All images of a split are stored once in a folder of two files:
    pictures.bin   uint8 (n, H, W, 3)
    store.json     {"shape": [n, H, W, 3], "skipped": {reason: count}, "origin": [...]}

Shapes: B images of H x W pixels.
"""

import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tf_lightning.data.corpus.damage import refuse_damage
from tf_lightning.data.corpus.folders import LocalFolder
from tf_lightning.data.corpus.prepare import corpus_path, format_reasons, summary
from tf_lightning.data.documents import HOLD_OUT, Skipped, Source, Split, num_samples
from tf_lightning.data.exclusion import filtered, unknown_ids
from tf_lightning.data.stream import ENDLESS, StreamData
from tf_lightning.errors import UserError
from tf_lightning.files import partial_folder, publish_folder, report_full_disk
from tf_lightning.progress import progress_bar
from tf_lightning.ranges import NonNegativeInt, PositiveInt, Range, check_arguments, check_fields

FORMAT = 1  # version of the files; a higher number makes every store be made again
PADDING_ROW = -1  # row of an image that only pads the last batch of a rank


class ImageBatch(NamedTuple):
    """A batch for an autoencoder."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    rows: Tensor  # (B,) int64, position in the stream; PADDING_ROW images are not counted


@dataclass(frozen=True)
class Augment:
    """Random changes of training images, against overfitting on small sets.

    Attributes:
        hflip: flip half of the images horizontally.
        zoom: largest factor by which an image is enlarged or reduced, >= 1; 1 = none. The position
            is random. A reduced image is filled up by repeating its edges.
    """

    hflip: bool = True
    zoom: Annotated[float, Range(ge=1, note="1 turns it off")] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "augment.")

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return a changed copy of an image, uint8 (H, W, 3), of the same size."""
        if self.hflip and random.random() < 0.5:
            image = image[:, ::-1]
        if self.zoom > 1:
            scale = self.zoom ** random.uniform(-1, 1)
            image = zoomed(image, scale, random.uniform(0, 1, size=2))
        return np.ascontiguousarray(image)


def zoomed(image: np.ndarray, scale: float, place: np.ndarray) -> np.ndarray:
    """Scale an image, then crop it or pad it with its edges to its former size.

    Args:
        image: uint8 (H, W, 3).
        scale: > 1 enlarges.
        place: position of the crop, or of the reduced image, in [0, 1] from top and left, (2,).
    """
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resampling = Image.Resampling.BICUBIC
    scaled = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, resampling))
    missing = [max(0, a - b) for a, b in zip((height, width), scaled.shape, strict=False)]
    before = [round(float(p) * m) for p, m in zip(place, missing, strict=True)]
    pads = [(b, m - b) for b, m in zip(before, missing, strict=True)]
    scaled = np.pad(scaled, [*pads, (0, 0)], mode="edge")
    spare = [a - b for a, b in zip(scaled.shape, (height, width), strict=False)]
    top, left = (round(float(p) * s) for p, s in zip(place, spare, strict=True))
    return scaled[top : top + height, left : left + width]


class ImageData(StreamData):
    """The images of a source, stored once and served without end.

    Args:
        source: any source of documents; `tf_lightning.data.ImageFiles` reads plain image files.
        batch_size: images in a batch of one rank.
        augment: random changes of training images.
        num_workers: processes that load images; 0 loads in the training process.
        seed: seed of the order and of the changes, >= 0. On the command line it
            follows `seed_everything` where it is not given.
        cache_dir: folder in which the images are stored, as uint8.
        exclude: a filter list, as `Mixture` takes it: documents that are left out. null: none.
    """

    def __init__(
        self,
        source: Source,
        batch_size: PositiveInt = 16,
        augment: Augment = Augment(),  # noqa: B008 - it is frozen
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        cache_dir: str = "data",
        *,
        exclude: str | None = None,
    ):
        super().__init__(batch_size, num_workers)
        check_arguments(ImageData.__init__, locals())
        self.source = filtered({"images": source}, exclude)["images"]
        self.exclude, self.augment = exclude, augment
        self.seed, self.cache_dir = seed, Path(cache_dir)
        self.stores: dict[str, ImageStore] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels, read from the first image."""
        image = first_image(self.source)
        return image.height, image.width

    def prepare_data(self) -> None:
        """Store the images if they are not stored yet."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the stored images."""
        if not self.stores:
            self._open()

    def _open(self) -> None:
        self.stores = {
            split: store_images(self.source, split, self.cache_dir) for split in ("train", "val")
        }
        skipped = [store.skipped for store in self.stores.values()]
        if self.exclude and (message := unknown_ids(self.exclude, skipped)):
            rank_zero_warn(message)
        if not len(self.stores["val"]):
            raise UserError(f"no image is held out to validate on; {HOLD_OUT}")

    @property
    def rows_per_epoch(self) -> int:
        """Number of training images."""
        return len(self.stores["train"])

    def train_dataloader(self) -> DataLoader:
        """Load batches without end, from the next image of the run."""
        images = TrainImages(self.stores["train"], self.augment, self.seed)
        return self.train_loader(images)

    def val_dataloader(self) -> DataLoader:
        """Load each held-out image once."""
        images = ValImages(self.stores["val"], self.world_size)
        return self.val_loader(images)

    test_dataloader = predict_dataloader = val_dataloader


class TrainImages(Dataset):
    """An endless stream of images, each once an epoch; item `row` depends on (seed, row) alone.

    Args:
        store: the images.
        augment: how they are changed.
        seed: seed of the order and of the changes.
    """

    def __init__(self, store: "ImageStore", augment: Augment, seed: int = 0):
        self.store, self.augment, self.seed = store, augment, seed

    def __len__(self) -> int:
        """Length that the progress bar shows; the stream has no end."""
        return ENDLESS

    def __getitem__(self, row: int) -> ImageBatch:
        """Read one image, (3, H, W), and its row."""
        epoch, place = divmod(row, len(self.store))
        number = epoch_order(len(self.store), self.seed, epoch)[place]
        random = np.random.default_rng((self.seed, 1, row))
        return as_item(self.augment(self.store.images[number], random), row)


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the order of the images in an epoch, (count,)."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


class ValImages(Dataset):
    """Each image once and unchanged; the first images pad the end to a multiple of the ranks.

    Args:
        store: the images.
        world_size: number of ranks.
    """

    def __init__(self, store: "ImageStore", world_size: int = 1):
        self.store = store
        self.length = -(-len(store) // world_size) * world_size

    def __len__(self) -> int:
        """Number of images with padding, a multiple of the ranks."""
        return self.length

    def __getitem__(self, row: int) -> ImageBatch:
        """Read one image, (3, H, W), and its number, or PADDING_ROW if it repeats an image."""
        image = self.store.images[row % len(self.store)]
        return as_item(image, row if row < len(self.store) else PADDING_ROW)


def as_item(image: np.ndarray, row: int) -> ImageBatch:
    """Convert an image, uint8 (H, W, 3), to float (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return ImageBatch(pixels.float() / 127.5 - 1, torch.tensor(row))


class ImageStore:
    """The stored images of one split.

    Attributes:
        images: uint8 (n, H, W, 3), memory-mapped.
        skipped: number of skipped samples by reason.

    Raises:
        UserError: the files are damaged.
    """

    @refuse_damage
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = LocalFolder(self.path)  # named by `refuse_damage`
        facts = json.loads(self.folder.file("store.json").read_text())
        self.skipped: dict[str, int] = facts["skipped"]
        shape = tuple(facts["shape"])
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError("the images have another shape than (n, H, W, 3)")
        if 0 in shape:  # an empty file cannot be mapped
            self.images = np.empty(shape, np.uint8)
            return
        file = self.folder.file("pictures.bin")
        if not file.is_file() or file.stat().st_size != math.prod(shape):
            raise ValueError("the size of a file differs from store.json")
        self.images = np.memmap(file, np.uint8, "r", shape=shape)

    def __reduce__(self):
        """Pickle the path, not the content, so that DataLoader workers open the file again."""
        return ImageStore, (self.path,)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


def store_images(source: Source, split: Split, directory: str | Path) -> ImageStore:
    """Open the store `<directory>/pictures-<split>-<hash>`, after making it if it does not exist.

    It holds every image of every document, in order. The folder appears only when it is complete;
    the hash covers everything that determines its content.

    Raises:
        UserError: the images differ in size, or there are none to train on.
    """
    origin = [FORMAT, source.fingerprint(split)]
    path = corpus_path(directory, "pictures", split, origin)
    # A store that was made before the images were part of its origin is still used.
    if hasattr(source, "image_digest") and not path.is_dir():
        origin.append({"images": source.image_digest(split)})
        path = corpus_path(directory, "pictures", split, origin)
    if path.is_dir():
        return ImageStore(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes, also on several nodes, may make the same store: each has a folder of its
    # own, and the first that finishes wins.
    unfinished = partial_folder(path)
    try:
        with report_full_disk(path.parent):
            shape, skipped = _write(source, split, unfinished)
        facts = {"shape": shape, "skipped": skipped, "origin": origin}
        (unfinished / "store.json").write_text(json.dumps(facts, indent=2) + "\n")
        publish_folder(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    rank_zero_info(summary("images", split, shape[0], skipped, unit="image"))
    return ImageStore(path)


def _write(source: Source, split: Split, folder: Path) -> tuple[list[int], dict[str, int]]:
    """Write the images; return their shape (n, H, W, 3) and the skipped samples by reason."""
    skipped: Counter[str] = Counter()
    size = first_image(source).size
    count = 0
    title = f"storing {split} images"
    with (folder / "pictures.bin").open("wb") as file:
        bar = {"total": num_samples(source, split), "unit": " documents", "delay": 2}
        for document in progress_bar(source.documents(split), title, **bar):
            if isinstance(document, Skipped):
                skipped[document.reason] += 1
                continue
            for image in (part for part in document if isinstance(part, Image.Image)):
                if image.size != size:
                    raise UserError(
                        f"the source has images of {size[0]}x{size[1]} and of "
                        f"{image.width}x{image.height} pixels; give it one image_size"
                    )
                file.write(image.tobytes())
                count += 1
    return [count, size[1], size[0], 3], dict(skipped.most_common())


def first_image(source: Source) -> Image.Image:
    """Read the first usable training image, which gives the size of all images.

    Raises:
        UserError: there is no usable image.
    """
    skipped: Counter[str] = Counter()
    for document in source.documents("train"):
        if isinstance(document, Skipped):
            skipped[document.reason] += 1
            continue
        for part in document:
            if isinstance(part, Image.Image):
                return part
    reasons = f" ({format_reasons(dict(skipped.most_common()))})" if skipped else ""
    raise UserError(f"the source has no usable image to train on{reasons}; check its paths")
