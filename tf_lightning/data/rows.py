"""The endless stream of rows: row r is a function of (seed, r), whatever the ranks and workers.

Each corpus is read epoch after epoch; a fixed cycle says which corpus each row comes from.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from tf_lightning.batch import Row
from tf_lightning.data.corpus_rows import CorpusRows
from tf_lightning.data.cycle import CYCLE, even_cycle

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
