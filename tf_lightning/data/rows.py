"""The endless stream of rows: row r is a function of (seed, r), whatever the ranks and workers.

Each corpus is read epoch after epoch. An epoch is a random order of the documents, each document
once, planned into rows; a fixed cycle says which corpus each row of the stream comes from.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset, DistributedSampler

from tf_lightning.batch import Document, Row, is_image
from tf_lightning.data.corpus import Corpus
from tf_lightning.errors import UserError

ENDLESS = 2**31  # batches; what a progress bar shows when a run has no max_steps
CYCLE = 10_000  # rows after which the order of the corpora repeats
WINDOW = 64  # rows that are filled at the same time

StreamRow = tuple[int, Row, int]  # row id, documents, number of its source


@dataclass(frozen=True)
class Epoch:
    """One pass over a corpus.

    Attributes:
        rows: the documents of each row.
        image_first: which documents show their picture before the caption, (num_documents,) bool.
        dropped: which documents lose their caption or instruction, (num_documents,) bool.
        alone: which of them lose all but the last picture, (num_documents,) bool.
        fill: share of the rows' positions that is not padding.
    """

    rows: list[list[int]]
    image_first: np.ndarray
    dropped: np.ndarray
    alone: np.ndarray
    fill: float


def best_fit(lengths: Sequence[int], row_length: int, window: int = WINDOW) -> list[list[int]]:
    """Each item put where it leaves least room: the places in `lengths` that share a row.

    Args:
        lengths: of the items, each <= row_length, in the order they come.
        row_length: room in a row.
        window: rows kept open; the fullest is closed when another is needed.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), by room
    for place, length in enumerate(lengths):
        found = bisect_left(open_rows, (length,))
        if found < len(open_rows):
            room, row = open_rows.pop(found)
        else:
            room, row = row_length, len(rows)
            rows.append([])
            if len(open_rows) == window:
                open_rows.pop(0)
        rows[row].append(place)
        insort(open_rows, (room - length, row))
    return rows


class CorpusRows:
    """The rows of one corpus, numbered through its epochs.

    Documents of one text and one image are shown caption first, or image first with probability
    `image_first_prob`; of those with the caption first, `caption_drop_prob` lose it. As many edits
    (picture, instruction, picture) lose their instruction, half of these the first picture too
    (InstructPix2Pix Sec. 3.2.1).

    With `clean_copies` a document that is longer than a row with its copies is left out.

    Args:
        corpus: the documents.
        row_length: positions in a row; no document is longer.
        num_patches: positions of an image.
        seed: None keeps the corpus's order, in every epoch.
        image_first_prob: in [0, 1].
        caption_drop_prob: in [0, 1].
        clean_copies: leave room for a second copy of each picture that a later part reads.

    Attributes:
        num_tokens: positions of all documents, as `image_first_prob` has it on average.

    Raises:
        UserError: no document fits into a row with its copies.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        row_length: int,
        num_patches: int,
        seed: tuple[int, ...] | None = None,
        image_first_prob: float = 0.0,
        caption_drop_prob: float = 0.0,
        clean_copies: bool = False,
    ):
        self.corpus, self.row_length, self.num_patches = corpus, row_length, num_patches
        self.seed = seed
        self.image_first_prob, self.caption_drop_prob = image_first_prob, caption_drop_prob
        self.lengths, self.pairs = corpus.lengths(num_patches), corpus.pairs()
        self.edits = corpus.edits()
        self.num_tokens = float(self.lengths.sum())
        self.read_images = corpus.read_images() if clean_copies else None
        if clean_copies:
            self._count_copies()
        self._starts = [0]  # first row of each epoch planned so far, and of the next
        self._latest: tuple[int, Epoch] = (0, self._plan(0))
        self._starts.append(self.rows_per_epoch)

    @property
    def fill(self) -> float:
        """Share of positions that is not padding, in the epoch planned last."""
        return self._latest[1].fill

    @property
    def rows_per_epoch(self) -> int:
        """Of the epoch planned last; epochs differ a little."""
        return len(self._latest[1].rows)

    @property
    def mean_length(self) -> float:
        """Positions of a document of the epoch planned last, dropped captions left out."""
        documents = sum(map(len, self._latest[1].rows))
        return self.fill * self.rows_per_epoch * self.row_length / documents

    def row(self, index: int) -> Row:
        """Row `index` >= 0, counted from the first epoch on."""
        while index >= self._starts[-1]:
            self._epoch(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + self.rows_per_epoch)
        number = bisect_right(self._starts, index) - 1
        epoch = self._epoch(number)
        documents = epoch.rows[index - self._starts[number]]
        return [self._document(document, epoch) for document in documents]

    def _count_copies(self) -> None:
        """Say how much of the corpus has room for clean copies."""
        copies = np.where(self.pairs, self.image_first_prob, self.read_images)
        self.num_tokens += self.num_patches * float(copies.sum())
        too_long = self.lengths + self.num_patches * np.ceil(copies) > self.row_length
        if too_long.any():
            told = f"{too_long.sum():,} of {len(too_long):,} documents of {self.corpus.name} are "
            told += f"longer than row_length={self.row_length} with clean copies of their pictures"
            if too_long.all():
                raise UserError(f"{told}; raise row_length")
            rank_zero_info(f"{told}: left out")

    def _epoch(self, number: int) -> Epoch:
        if self._latest[0] != number:
            self._latest = (number, self._plan(number))
        return self._latest[1]

    def _plan(self, number: int) -> Epoch:
        count = len(self.corpus)
        random = np.random.default_rng((*(self.seed or ()), number))
        order = np.arange(count) if self.seed is None else random.permutation(count)
        image_first = self.pairs & (random.random(count) < self.image_first_prob)
        chance = random.random(count)
        dropped = (self.pairs & ~image_first | self.edits) & (chance < self.caption_drop_prob)
        alone = dropped & (self.pairs | (chance < self.caption_drop_prob / 2))
        # Pictures without text: <bos>, <boi> patches <eoi> each, <eos>.
        image = self.num_patches + 2
        lengths = np.where(dropped, 2 + image * np.where(alone, 1, 2), self.lengths)
        if self.read_images is not None:
            copies = np.where(self.pairs, image_first, self.read_images)
            lengths = lengths + self.num_patches * np.where(alone, 0, copies)
            order = order[lengths[order] <= self.row_length]
        rows = best_fit(lengths[order].tolist(), self.row_length)
        fill = float(lengths[order].sum()) / max(len(rows) * self.row_length, 1)
        return Epoch([order[row].tolist() for row in rows], image_first, dropped, alone, fill)

    def _document(self, index: int, epoch: Epoch) -> Document:
        parts = self.corpus.document(index)
        if self.pairs[index]:
            parts.sort(key=lambda part: part.ndim, reverse=bool(epoch.image_first[index]))
        if epoch.dropped[index]:
            parts = [part for part in parts if is_image(part)]
        return parts[-1:] if epoch.alone[index] else parts


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
        cycles, place = divmod(index, CYCLE)
        source = int(self.cycle[place])
        row = cycles * int(self.counts[source]) + int(self.earlier[place, source])
        return index, self.corpora[source].row(row), source


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


def even_cycle(shares: np.ndarray, length: int) -> np.ndarray:
    """Which source each place of a cycle has, (length,): shares met as evenly as can be.

    (Smooth weighted round robin.)

    Raises:
        UserError: a share is positive but too small to occur.
    """
    credit, cycle = np.zeros(len(shares)), np.empty(length, np.int64)
    for place in range(length):
        credit += shares
        cycle[place] = credit.argmax()
        credit[cycle[place]] -= 1
    missing = set(np.flatnonzero(shares).tolist()) - set(cycle.tolist())
    if missing:
        raise UserError(
            f"a source's weight is less than 1/{length:,} of all rows; raise it, or make it 0"
        )
    return cycle
