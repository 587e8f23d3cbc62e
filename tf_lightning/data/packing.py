"""The rows of one corpus, epoch after epoch, planned window by window: any row is found at once.

The corpus is dealt into windows at random, once. Every epoch each window is packed anew into as
many rows as in the first epoch, so that where a row lies is arithmetic, whatever came before it.

Documents of known lengths put into rows.

Random orders and choices that need no memory of the whole: functions of a seed and a place.
"""

import json
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from tf_lightning.batch import Document, Row, is_image
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.errors import UserError

OPEN_ROWS = 64  # that are filled at the same time


def best_fit(
    lengths: Sequence[int], row_length: int, open_rows: int = OPEN_ROWS
) -> list[list[int]]:
    """Each item put where it leaves least room: the places in `lengths` that share a row.

    In random order this pads less than first-fit decreasing where lengths are alike, as captioned
    pictures' are (2.6% against 2.8%, or 4.4% against 6.4% in short rows), and 0.3% more on text.

    Args:
        lengths: of the items, each <= row_length, in the order they come.
        row_length: room in a row.
        open_rows: rows kept open; the fullest is closed when another is needed.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), by room
    for place, length in enumerate(lengths):
        found = bisect_left(rooms, (length,))
        if found < len(rooms):
            room, row = rooms.pop(found)
        else:
            room, row = row_length, len(rows)
            rows.append([])
            if len(rooms) == open_rows:
                rooms.pop(0)
        rows[row].append(place)
        insort(rooms, (room - length, row))
    return rows


def spread(rows: list[list[int]], count: int) -> bool:
    """Make `count` rows of fewer, each with an item; False if they are more or have too few items.

    The rows with most items give one away.
    """
    missing = count - len(rows)
    if missing == 0:
        return True
    giving = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)[:missing]
    if len(giving) < missing or missing < 0:
        return False
    rows += [[row.pop()] for row in giving]
    return True


ROUNDS = 4


def shuffled(places: np.ndarray, count: int, seed: tuple[int, ...]) -> np.ndarray:
    """What stands at some places of a random order of 0 .. count - 1; other places cost nothing.

    (A Feistel network permutes the next power of 4; what leaves 0 .. count - 1 goes on until it is
    back: "cycle walking", Black and Rogaway 2002.)

    Args:
        places: in {0..count-1}, (n,).
        count: length of the order, < 2**62.
        seed: names the order, numbers >= 0.
    """
    bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(seed).integers(2**63, size=ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        found[outside] = _feistel(found[outside], bits, keys)
        outside = found >= count
    return found.astype(np.int64)


def _feistel(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of 2 * bits bits."""
    bits, mask = np.uint64(bits), np.uint64(2**bits - 1)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on all of x (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose(random: np.random.Generator, among: np.ndarray, share: float) -> np.ndarray:
    """A random choice of exactly this share of the places where `among` is True, (n,) bool.

    A share that is no whole number is rounded up as often as makes its mean right.
    """
    places = np.flatnonzero(among)
    number = int(share * len(places) + random.random())
    chosen = np.zeros(len(among), bool)
    chosen[random.permutation(places)[:number]] = True
    return chosen


WINDOW = 2**15  # documents that are planned together
ATTEMPTS = 8  # to pack a window into its rows, before the first epoch's choices are taken
PLAN = 1  # of the kind that is kept; a new number has every corpus planned again
# What is drawn at random; never 0, which a seed may end in.
MEMBERS, WINDOWS, CHOICES, PICTURES = 1, 2, 3, 4


@dataclass(frozen=True)
class Window:
    """Some of a corpus's documents in one epoch.

    Attributes:
        documents: their numbers, (n,).
        rows: the places in `documents` of each row.
        pairs: which are one text and one picture, (n,) bool.
        image_first: which of these show their picture before the caption, (n,) bool.
        dropped: which documents lose their caption or instruction, (n,) bool.
        alone: which of them lose all but the last picture, (n,) bool.
        num_tokens: positions of all rows that are not padding.
        left_out: how many documents are ever longer than a row with their copies.
    """

    documents: np.ndarray
    rows: list[list[int]]
    pairs: np.ndarray
    image_first: np.ndarray
    dropped: np.ndarray
    alone: np.ndarray
    num_tokens: int
    left_out: int


class CorpusRows:
    """The rows of one corpus, numbered through its epochs, all of which have as many.

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
        num_tokens: positions of an epoch that are not padding; epochs differ by a few.

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
        self.clean_copies = clean_copies
        self.num_windows = -(-len(corpus) // WINDOW)
        planned_for = [PLAN, WINDOW, row_length, num_patches, seed, image_first_prob]
        planned_for += [caption_drop_prob, clean_copies]
        plan = corpus.remembered(json.dumps(planned_for), self._plan)
        self.window_rows = np.array(plan["rows"], np.int64)  # rows of each window
        self.rows_per_epoch = int(self.window_rows.sum())
        self.num_tokens, left_out = plan["num_tokens"], plan["left_out"]
        self.num_documents = len(corpus) - left_out
        if left_out:
            told = f"{left_out:,} of {len(corpus):,} documents of {corpus.name} are "
            told += f"longer than row_length={self.row_length} with clean copies of their pictures"
            if not self.num_documents:
                raise UserError(f"{told}; raise row_length")
            rank_zero_info(f"{told}: left out")
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None  # of the latest epoch
        self._latest: tuple[tuple[int, int], Window] | None = None

    @property
    def fill(self) -> float:
        """Share of positions that is not padding."""
        return self.num_tokens / max(self.rows_per_epoch * self.row_length, 1)

    @property
    def mean_length(self) -> float:
        """Positions of a document, dropped captions left out."""
        return self.num_tokens / self.num_documents

    def row(self, index: int) -> Row:
        """Row `index` >= 0, counted from the first epoch on."""
        window, place = self._find(index)
        random = None  # means, as they are: validation
        if self.seed is not None:
            random = np.random.default_rng((*self.seed, PICTURES, index))
        return [self._document(window, number, random) for number in window.rows[place]]

    def _plan(self) -> dict:
        """How many rows each window takes, told by its first epoch; once for a corpus."""
        rows, num_tokens, left_out = [], 0, 0
        title = f"planning {self.corpus.name}"
        for number in tqdm(range(self.num_windows), title, unit=" windows", delay=2):
            window = self._draw(number, 0, 0)
            rows.append(len(window.rows))
            num_tokens += window.num_tokens
            left_out += window.left_out
        return {"rows": rows, "num_tokens": num_tokens, "left_out": left_out}

    def _find(self, index: int) -> tuple[Window, int]:
        """The window of a row, and the row's place in it."""
        epoch, place = divmod(index, self.rows_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = np.arange(self.num_windows)
            if self.seed is not None:
                order = np.random.default_rng((*self.seed, WINDOWS, epoch)).permutation(order)
            self._order = epoch, order, np.cumsum(self.window_rows[order])
        _, order, ends = self._order
        turn = bisect_right(ends, place)
        number = int(order[turn])
        if self._latest is None or self._latest[0] != (epoch, number):
            self._latest = (epoch, number), self._window(number, epoch)
        return self._latest[1], place - int(ends[turn] - self.window_rows[number])

    def _window(self, number: int, epoch: int) -> Window:
        """A window packed into exactly its rows."""
        count = int(self.window_rows[number])
        for attempt in range(ATTEMPTS):
            window = self._draw(number, epoch, attempt)
            if spread(window.rows, count):
                return window
        return self._draw(number, 0, 0)

    def _draw(self, number: int, epoch: int, attempt: int) -> Window:
        """A window with its choices, packed into as many rows as it takes."""
        documents = self._members(number)
        layout, count = self.corpus.layout(documents), len(documents)
        random = np.random.default_rng((*(self.seed or ()), CHOICES, epoch, number, attempt))
        order = np.arange(count) if self.seed is None else random.permutation(count)
        pairs, edits = layout.pairs(), layout.edits()
        image_first = choose(random, pairs, self.image_first_prob)
        dropped = choose(random, pairs & ~image_first | edits, self.caption_drop_prob)
        alone = dropped & pairs | choose(random, dropped & edits, 0.5)
        # Pictures without text: <bos>, <boi> patches <eoi> each, <eos>.
        image, whole = self.num_patches + 2, layout.lengths(self.num_patches)
        lengths, left_out = np.where(dropped, 2 + image * np.where(alone, 1, 2), whole), 0
        if self.clean_copies:
            read = layout.read_images()
            copies = np.where(pairs, image_first, read)
            lengths = lengths + self.num_patches * np.where(alone, 0, copies)
            order = order[lengths[order] <= self.row_length]
            ever = np.where(pairs, self.image_first_prob > 0, read)
            left_out = int((whole + self.num_patches * ever > self.row_length).sum())
        packed = best_fit(lengths[order].tolist(), self.row_length)
        rows = [order[row].tolist() for row in packed]
        num_tokens = int(lengths[order].sum())
        return Window(documents, rows, pairs, image_first, dropped, alone, num_tokens, left_out)

    def _members(self, number: int) -> np.ndarray:
        """The documents of a window, in the corpus's order."""
        count = len(self.corpus)
        first, end = (count * n // self.num_windows for n in (number, number + 1))
        places = np.arange(first, end)
        if self.seed is None or self.num_windows == 1:
            return places
        return np.sort(shuffled(places, count, (*self.seed, MEMBERS)))

    def _document(self, window: Window, place: int, random: np.random.Generator | None) -> Document:
        parts = self.corpus.document(int(window.documents[place]), random)
        if window.pairs[place]:
            parts.sort(key=lambda part: part.ndim, reverse=bool(window.image_first[place]))
        if window.dropped[place]:
            parts = [part for part in parts if is_image(part)]
        return parts[-1:] if window.alone[place] else parts
