"""The endless stream of rows: row r is a function of (seed, r), whatever the ranks and workers.

Each corpus is read epoch after epoch; a fixed cycle says which corpus each row comes from.

Which source each row of the stream comes from: asked shares, met by any 1,000 rows.

A data module that serves an endless stream, whose place is one integer: the next row.
"""

import warnings
from collections.abc import Callable, Iterator

import lightning as L
import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from tf_lightning.batch import Row
from tf_lightning.data.packing import CorpusRows
from tf_lightning.errors import UserError

CYCLE = 10_000  # rows after which the order of the sources repeats
EXACT = 1_000  # any so many rows in a row have each source's share, to within one row


def even_cycle(shares: np.ndarray, length: int = CYCLE, exact: int = EXACT) -> np.ndarray:
    """Which source each place of a cycle has, (length,), also when it repeats.

    Of a source's rows in the cycle, `exact` rows have each the whole part, always in the same
    places. K places are left over, and a table of blocks (down) and these places (across) is filled
    with what the sources still lack, column by column (McNaughton's wrap-around rule). A source
    that goes on in the next column does so two blocks earlier at least, so among any K left-over
    places that follow one another no source is twice.

    Args:
        shares: of the rows, summing to 1.
        length: rows in the cycle, a multiple of `exact` or less.
        exact: rows.

    Raises:
        UserError: a share is positive but too small to occur.
    """
    blocks = max(length // exact, 1)
    whole, lacking = np.divmod(_whole_numbers(shares, length), blocks)
    block = _evenly(np.append(whole, lacking.sum() // blocks))
    cycle = np.tile(block, blocks)
    table = np.repeat(np.arange(len(shares)), lacking).reshape(-1, blocks).T
    cycle[cycle == len(shares)] = table.flatten()
    missing = set(np.flatnonzero(shares).tolist()) - set(cycle.tolist())
    if missing:
        raise UserError(
            f"a source's weight is less than 1/{length:,} of all rows; raise it, or make it 0"
        )
    return cycle


def _whole_numbers(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in these shares that sum to `total` (largest remainders are rounded up)."""
    numbers = np.floor(shares * total).astype(np.int64)
    up = np.argsort(numbers - shares * total, kind="stable")[: total - numbers.sum()]
    numbers[up] += 1
    return numbers


def _evenly(counts: np.ndarray) -> np.ndarray:
    """Each source as often as its count, (sum,), spread (smooth weighted round robin)."""
    credit, total = np.zeros_like(counts), int(counts.sum())
    order = np.empty(total, np.int64)
    for place in range(total):
        credit += counts
        order[place] = credit.argmax()
        credit[order[place]] -= total
    return order


ENDLESS = 2**31  # batches; what a progress bar shows when a run has no max_steps

StreamRow = tuple[int, Row, int]  # row id, documents, number of its source


class Rows(Dataset):
    """All rows of training: the corpora's rows in a fixed cycle.

    Args:
        corpora: one for each source.
        weights: share of all tokens that each is to have; they need not sum to 1.
    """

    def __init__(self, corpora: list[CorpusRows], weights: list[float]):
        self.corpora = corpora
        rows = np.array(weights) / [corpus.fill for corpus in corpora]  # fuller rows: fewer of them
        self.cycle = even_cycle(rows / rows.sum(), CYCLE)
        one_hot = self.cycle[:, None] == np.arange(len(corpora))
        self.counts = one_hot.sum(0)  # rows of each source in a cycle
        self.earlier = one_hot.cumsum(0) - one_hot  # and before each place of it

    def __len__(self) -> int:
        """No end."""
        return ENDLESS

    def __getitem__(self, index: int) -> StreamRow:
        """Row `index` of the stream."""
        source = int(self.cycle[index % CYCLE])
        return index, self.corpora[source].row(int(self.before(index)[source])), source

    def before(self, index: int) -> np.ndarray:
        """How many rows of each source are before row `index`, (num_sources,)."""
        cycles, place = divmod(index, CYCLE)
        return cycles * self.counts + self.earlier[place]

    def epochs(self, index: int) -> list[float]:
        """How often each source was read before row `index`, in epochs."""
        per_epoch = [corpus.rows_per_epoch for corpus in self.corpora]
        return (self.before(index) / per_epoch).tolist()


class ValidationRows(Dataset):
    """The rows of one corpus, once; empty rows at the end give every rank as many.

    Args:
        rows: the rows of a corpus, in order.
        source: the number of its source.
        world_size: ranks.
    """

    def __init__(self, rows: CorpusRows, source: int, world_size: int = 1):
        self.rows, self.source = rows, source
        self.length = -(-rows.rows_per_epoch // world_size) * world_size

    def __len__(self) -> int:
        """A multiple of the ranks."""
        return self.length

    def __getitem__(self, index: int) -> StreamRow:
        """Row `index`, or an empty one past the end."""
        row = self.rows.row(index) if index < self.rows.rows_per_epoch else []
        return index, row, self.source


class RowSampler(DistributedSampler):
    """The stream's rows that one rank reads, from wherever the run is.

    Batch n of rank k of W holds rows start + (n * W + k) * batch_size + (0 .. batch_size - 1).
    (A DistributedSampler, or Lightning would put one around it.)

    Args:
        rows: the stream.
        start: says which row comes next; asked whenever iteration begins.
        batch_size: rows in a batch of one rank.
        num_batches: of one rank, in the whole run.
        rank: k in {0..W-1}.
        world_size: W.
    """

    def __init__(
        self,
        rows: Rows,
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
        """Rows of one rank in the whole run, also when it was resumed: the progress bar's total."""
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Rows from `start` on."""
        start = self.start()
        for batch in range(self.num_batches):
            first = start + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)


class StreamData(L.LightningDataModule):
    """Where a run is in its stream, for the sampler and for the checkpoint.

    Args:
        batch_size: rows in a batch of one rank.
    """

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self._first_row = self._first_step = 0

    @property
    def rank(self) -> int:
        """Of this process, in {0..world_size-1}."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.trainer.world_size if self.trainer else 1

    def num_batches(self) -> int:
        """Batches of one rank in the whole run."""
        if self.trainer is None or self.trainer.max_steps < 0:
            return ENDLESS
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def next_row(self) -> int:
        """The first row that no optimizer step has seen; computed, never counted."""
        if self.trainer is None:
            return self._first_row
        rows_per_step = self.batch_size * self.world_size * self.trainer.accumulate_grad_batches
        steps = self.trainer.global_step - self._first_step
        return self._first_row + steps * rows_per_step

    def state_dict(self) -> dict[str, int]:
        """The place in the stream, for the checkpoint; valid for any number of ranks."""
        step = self.trainer.global_step if self.trainer else self._first_step
        return {"next_row": self.next_row(), "global_step": step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a checkpoint's place."""
        # Lightning, which looks for a loader with a state of its own, would warn of the opposite.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
        self._first_row, self._first_step = state_dict["next_row"], state_dict["global_step"]
