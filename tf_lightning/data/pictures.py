"""Pictures alone, for training autoencoders: every source's pictures, without its words.

Shapes: B pictures of H x W pixels.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from tf_lightning.data.augment import Augment
from tf_lightning.data.corpus import Source
from tf_lightning.data.picture_store import PictureStore, first_picture, store_pictures
from tf_lightning.data.rows import ENDLESS, RowSampler
from tf_lightning.data.stream import StreamData
from tf_lightning.errors import UserError

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
