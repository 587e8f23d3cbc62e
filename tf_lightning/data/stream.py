"""The endless stream of training rows: row r is a function of (seed, r) alone.

It does not depend on the number of ranks or workers. A fixed cycle assigns each row to a source;
the rows of each source follow one another epoch after epoch. The state of a data module is one
integer, the next row.

An optimizer step reads consecutive rows: those of all ranks and, with `accumulate_grad_batches`, of
several batches of each rank.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from tf_lightning.batch import Row
from tf_lightning.data.packing import CorpusRows
from tf_lightning.errors import UserError
from tf_lightning.processes import Loader, start_worker
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments

CYCLE = 10_000  # rows after which the order of the sources repeats
EXACT = 1_000  # each run of this many rows has the share of every source, to within one row
ENDLESS = 2**31  # the length of an endless stream; a progress bar shows it without max_steps

StreamRow = tuple[int, Row, int]  # row id, documents, number of its source


class Rows(Dataset):
    """All training rows: the rows of the corpora in a fixed cycle.

    Args:
        corpora: the rows of each source.
        weights: share of all tokens that each source gets; they need not sum to 1.
    """

    def __init__(self, corpora: list[CorpusRows], weights: list[float]):
        self.corpora = corpora
        # A source with less padding needs fewer rows for the same tokens.
        rows = np.array(weights) / [corpus.fill for corpus in corpora]
        self.cycle = even_cycle(rows / rows.sum(), CYCLE)
        one_hot = self.cycle[:, None] == np.arange(len(corpora))
        self.counts = one_hot.sum(0)  # rows of each source in a cycle, (num_sources,)
        # Rows of each source before each position of the cycle, (CYCLE, num_sources).
        self.earlier = one_hot.cumsum(0) - one_hot

    def __len__(self) -> int:
        """Length that the progress bar shows; the stream has no end."""
        return ENDLESS

    def __getitem__(self, index: int) -> StreamRow:
        """Read row `index` of the stream."""
        source = int(self.cycle[index % CYCLE])
        return index, self.corpora[source].row(int(self.before(index)[source])), source

    def before(self, index: int) -> np.ndarray:
        """Count the rows of each source before row `index`, (num_sources,)."""
        cycles, place = divmod(index, CYCLE)
        return cycles * self.counts + self.earlier[place]

    @property
    def rows_per_epoch(self) -> int:
        """Rows after which every source has been read in full at least once."""
        rows = np.array([corpus.rows_per_epoch for corpus in self.corpora])
        used = self.counts > 0
        cycles = int((rows[used] // self.counts[used]).max()) + 1
        is_over = lambda index: bool((self.before(index) >= rows)[used].all())  # noqa: E731
        return bisect_left(range(cycles * CYCLE), True, key=is_over)

    def epochs(self, index: int) -> list[float]:
        """Count the epochs of each source before row `index`."""
        per_epoch = [corpus.rows_per_epoch for corpus in self.corpora]
        return (self.before(index) / per_epoch).tolist()


class ValidationRows(Dataset):
    """Each row of one corpus once; empty rows pad the end to a multiple of the ranks.

    Args:
        rows: the rows of the corpus, in order.
        source: number of its source.
        world_size: number of ranks.
    """

    def __init__(self, rows: CorpusRows, source: int, world_size: int = 1):
        self.rows, self.source = rows, source
        self.length = -(-rows.rows_per_epoch // world_size) * world_size

    def __len__(self) -> int:
        """Number of rows with padding, a multiple of the ranks."""
        return self.length

    def __getitem__(self, index: int) -> StreamRow:
        """Read row `index`; rows after the last one are empty."""
        row = self.rows.row(index) if index < self.rows.rows_per_epoch else []
        return index, row, self.source


class RowSampler(DistributedSampler):
    """Yields the numbers of the stream's rows that one rank reads.

    Batch n of rank k of W holds rows start + (n * W + k) * batch_size + (0 .. batch_size - 1).
    It is a DistributedSampler so that Lightning does not put another one around it.

    Args:
        rows: the stream.
        start: returns the next row; called whenever an iteration begins.
        batch_size: rows in a batch of one rank.
        num_batches: batches of one rank in the whole run.
        rank: k in {0..W-1}.
        world_size: W.
    """

    def __init__(
        self,
        rows: Dataset,
        start: Callable[[], int],
        *,
        batch_size: int,
        num_batches: int = ENDLESS,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(rows, num_replicas=world_size, rank=rank, shuffle=False)
        self.start, self.batch_size, self.num_batches = start, batch_size, num_batches

    def __len__(self) -> int:
        """Rows of one rank in the whole run, resumed or not: the total of the progress bar."""
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the rows from `start` on."""
        start = self.start()
        for batch in range(self.num_batches):
            first = start + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)


class StreamData(L.LightningDataModule):
    """Base of data modules that serve an endless stream; it keeps the run's position in it.

    Subclasses set `seed`, the seed of the order of the rows.

    Args:
        batch_size: rows in a batch of one rank.
        num_workers: processes that load rows; 0 loads in the training process.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, batch_size: PositiveInt, num_workers: NonNegativeInt):
        super().__init__()
        check_arguments(StreamData.__init__, locals())
        self.batch_size, self.num_workers = batch_size, num_workers
        # Batches that the training loader yields at once, as a list; 1: it yields each batch alone.
        self.batches_at_once = 1
        self.seed = 0
        self._first_row = self._first_step = 0

    @property
    def rank(self) -> int:
        """Rank of this process, in {0..world_size-1}."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the stream that count as one epoch, for `max_epochs`; call it after `setup`."""
        raise NotImplementedError

    def batches_per_step(self) -> int:
        """Number of batches that one rank reads in an optimizer step."""
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        return accumulated * self.batches_at_once

    def rows_per_step(self) -> int:
        """Number of rows that all ranks together read in an optimizer step."""
        return self.batch_size * self.world_size * self.batches_per_step()

    def num_batches(self) -> int:
        """Count the batches of one rank in the whole run."""
        if self.trainer is None or self.trainer.max_steps < 0:
            return ENDLESS
        return self.trainer.max_steps * self.batches_per_step()

    def next_row(self) -> int:
        """Compute the first row that no optimizer step has read, from the number of steps."""
        if self.trainer is None:
            return self._first_row
        steps = self.trainer.global_step - self._first_step
        return self._first_row + steps * self.rows_per_step()

    def train_sampler(self, rows: Dataset) -> RowSampler:
        """Sample this rank's rows of the stream without end, from the next row of the run."""
        return RowSampler(
            rows,
            self.next_row,
            batch_size=self.batch_size,
            num_batches=self.num_batches(),
            rank=self.rank,
            world_size=self.world_size,
        )

    def val_sampler(self, rows: Dataset) -> DistributedSampler:
        """Sample this rank's rows of a finite dataset once, in order."""
        ranks = {"num_replicas": self.world_size, "rank": self.rank}
        return DistributedSampler(rows, shuffle=False, **ranks)

    def train_loader(
        self, rows: Dataset, collate: Callable[[list], Any] = default_collate
    ) -> DataLoader:
        """Load the rows of the stream without end, `batches_at_once` batches at a time.

        Args:
            rows: the stream.
            collate: makes a batch of a list of rows.
        """
        at_once = self.batches_at_once
        if at_once > 1:
            collate = partial(collate_batches, collate=collate, batch_size=self.batch_size)
        return Loader(
            rows,
            batch_size=self.batch_size * at_once,
            sampler=self.train_sampler(rows),
            collate_fn=collate,
            # A worker loads all of these batches; two such lists ahead would fill the memory.
            prefetch_factor=1 if at_once > 1 and self.num_workers else None,
            **self._loading(),
        )

    def val_loader(
        self, rows: Dataset, collate: Callable[[list], Any] = default_collate
    ) -> DataLoader:
        """Load this rank's rows of a finite dataset once, in order."""
        sampler, size = self.val_sampler(rows), self.batch_size
        return Loader(rows, batch_size=size, sampler=sampler, collate_fn=collate, **self._loading())

    def _loading(self) -> dict[str, Any]:
        """Return the arguments that all loaders share."""
        return {
            "num_workers": self.num_workers,
            "worker_init_fn": start_worker,
            "pin_memory": torch.cuda.is_available(),
        }

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream, for the checkpoint; valid for any number of ranks."""
        step = self.trainer.global_step if self.trainer else self._first_step
        return {"next_row": self.next_row(), "global_step": step, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from the position of a checkpoint.

        Raises:
            UserError: the rows of the checkpoint's run were in the order of another seed.
        """
        check_same_seed(state_dict.get("seed", self.seed), self.seed)  # older versions kept none
        # Lightning looks for a stateful loader, finds none, and would warn without reason.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
        self._first_row, self._first_step = state_dict["next_row"], state_dict["global_step"]


def check_same_seed(saved: int, seed: int) -> None:
    """Raise UserError if the data of a run had another seed when its checkpoint was saved."""
    if seed != saved:
        raise UserError(
            f"the data of this run had seed={saved}, but now has seed={seed}; resume it with "
            f"--data.seed {saved}"
        )


def collate_batches(rows: list, collate: Callable[[list], Any], batch_size: int) -> list:
    """Collate consecutive rows to a list of batches of `batch_size` rows."""
    return [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def as_batches(loaded: Any) -> list:
    """Return the batches that a training loader yielded at once as a list, also if it is one."""
    return loaded if isinstance(loaded, list) else [loaded]


# The cycle of sources


def even_cycle(shares: np.ndarray, length: int = CYCLE, exact: int = EXACT) -> np.ndarray:
    """Assign a source to each row of a cycle, so that any `exact` consecutive rows have its shares.

    This also holds across the cycle's end. The cycle consists of blocks of `exact` rows. A source
    has a fixed number of rows in each block: its rows per block, rounded down. They have the same
    positions in every block. K is the number of remaining positions in a block. A table of blocks
    (down) and remaining positions (across) is filled with the missing rows column by column
    (McNaughton's wrap-around rule). A source that continues in the next column does so at least two
    blocks earlier, so any K consecutive remaining positions hold no source twice.

    Example: 2 sources, shares 0.7 and 0.3, a cycle of 10 rows and blocks of 5. Per block the
    sources should have 3.5 and 1.5 rows: 3 and 1 are fixed, and K = 1. The one remaining position
    goes to the first source in one block and to the second source in the other block.

    Args:
        shares: share of the rows of each source, summing to 1.
        length: rows in the cycle, a multiple of `exact`, or less than `exact`.
        exact: rows in a block.

    Returns:
        The source of each row, (length,).

    Raises:
        UserError: a share is positive but too small to occur in the cycle.
    """
    blocks = max(length // exact, 1)
    whole, lacking = np.divmod(_apportion(shares, length), blocks)
    block = _interleave(np.append(whole, lacking.sum() // blocks))
    cycle = np.tile(block, blocks)
    table = np.repeat(np.arange(len(shares)), lacking).reshape(-1, blocks).T
    cycle[cycle == len(shares)] = table.flatten()
    missing = set(np.flatnonzero(shares).tolist()) - set(cycle.tolist())
    if missing:
        raise UserError(
            f"the weight of a source is less than 1/{length:,} of all rows; raise it, or make it 0"
        )
    return cycle


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Round shares of `total` to whole numbers that sum to `total` (largest remainder method)."""
    numbers = np.floor(shares * total).astype(np.int64)
    up = np.argsort(numbers - shares * total, kind="stable")[: total - numbers.sum()]
    numbers[up] += 1
    return numbers


def _interleave(counts: np.ndarray) -> np.ndarray:
    """Spread each source evenly, as often as its count, (sum,) (smooth weighted round robin)."""
    credit, total = np.zeros_like(counts), int(counts.sum())
    order = np.empty(total, np.int64)
    for place in range(total):
        credit += counts
        order[place] = credit.argmax()
        credit[order[place]] -= total
    return order
