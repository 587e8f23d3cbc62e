"""The training rows of a data module as datasets of PyTorch, for training loops of other projects.

Row r is a function of (seed, r), so a training loop that counts its rows can be interrupted at any
row, and resumed with other numbers of ranks and workers.
"""

from collections.abc import Iterator
from itertools import count, islice

import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tf_lightning.batch import Batch
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.stream import StreamRow
from tf_lightning.errors import UserError
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments


class TrainingRows(Dataset):
    """The training rows of a data module, by number.

    Item i is row `first_row` + i of the stream: the tuple of its number, its documents, and the
    number of its source in `data.source_names`. A document is a list of texts (L,) int64, with ~id
    for tokens that are not learned, and images (C, h, w). `collate` packs a list of items into a
    `Batch`.

    The rows are in random order, so samplers need not shuffle them, and rows that follow one
    another are read fast.

    Args:
        data: a `Mixture`, or another data module that takes its arguments. Its corpora are prepared
            if they are missing.
        num_rows: number of items. None: an epoch, after which every source has been read in full.
        first_row: number of the first row, such as `len(rows)` in the second epoch.

    Attributes:
        collate: makes a `Batch` of a list of items, for the argument `collate_fn` of a DataLoader.

    Raises:
        UserError: a number is out of range, or the data cannot be prepared.
    """

    def __init__(
        self, data: Mixture, num_rows: PositiveInt | None = None, first_row: NonNegativeInt = 0
    ):
        check_arguments(TrainingRows.__init__, locals())
        data.setup()
        self.rows, self.collate = data.training_rows(), data.training_collate()
        self.num_rows = self.rows.rows_per_epoch if num_rows is None else num_rows
        self.first_row = first_row

    def __len__(self) -> int:
        """Number of items."""
        return self.num_rows

    def __getitem__(self, index: int) -> StreamRow:
        """Read item `index`.

        Raises:
            IndexError: there is no such item.
        """
        return self.rows[self.first_row + range(self.num_rows)[index]]


class TrainingBatches(IterableDataset):
    """The batches that one rank trains on, the same as with `tf-lightning fit`.

    Batch n of rank k of W holds the B rows from `first_row` + (n * W + k) * B on, where B is
    `data.batch_size`. They are divided among the workers of a DataLoader, which returns them in
    order if its `batch_size` is None.

    Args:
        data: as in `TrainingRows`.
        num_batches: batches of this rank. None: without end.
        first_row: number of the first row. To resume, give the rows that all ranks have read:
            the number of batches of a rank * W * B.
        rank: k in {0..W-1}. None: the rank in the process group of torch.distributed, if any.
        world_size: W. None: the size of that process group.

    Raises:
        UserError: a number is out of range, or the data cannot be prepared.
    """

    def __init__(
        self,
        data: Mixture,
        num_batches: PositiveInt | None = None,
        *,
        first_row: NonNegativeInt = 0,
        rank: NonNegativeInt | None = None,
        world_size: PositiveInt | None = None,
    ):
        check_arguments(TrainingBatches.__init__, locals())
        together = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if together else 0
        self.world_size = world_size or (dist.get_world_size() if together else 1)
        if self.rank >= self.world_size:
            raise UserError(
                f"rank={self.rank} must be less than world_size={self.world_size}; give both"
            )
        data.setup()
        self.rows, self.collate = data.training_rows(), data.training_collate()
        self.batch_size, self.num_batches, self.first_row = data.batch_size, num_batches, first_row

    def __len__(self) -> int:
        """Number of batches of this rank.

        Raises:
            TypeError: they have no end.
        """
        if self.num_batches is None:
            raise TypeError("the batches have no end; give num_batches")
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this rank, or one worker's share of them."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in islice(count(), first, self.num_batches, step):
            start = (number * self.world_size + self.rank) * self.batch_size + self.first_row
            yield self.collate([self.rows[start + i] for i in range(self.batch_size)])
