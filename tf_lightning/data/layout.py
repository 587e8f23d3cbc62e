"""What documents look like before they are read: which parts they have and how long these are."""

from dataclasses import dataclass

import numpy as np

IMAGE = -1  # stands where a text part has its length


@dataclass(frozen=True)
class Layout:
    """The parts of some documents.

    Attributes:
        part_lengths: tokens of each text, IMAGE for an image, (num_parts,), document by document.
        starts: document i is parts starts[i] .. starts[i + 1] - 1, (num_documents + 1,).
    """

    part_lengths: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def lengths(self, num_patches: int) -> np.ndarray:
        """Positions each document takes in a row, (num_documents,), with N patches an image."""
        image = self.part_lengths == IMAGE
        return 2 + self._sums(np.where(image, num_patches + 2, self.part_lengths))

    def pairs(self) -> np.ndarray:
        """Which documents are exactly one text and one image, (num_documents,) bool."""
        images = self._sums(self.part_lengths == IMAGE)
        return (images == 1) & (np.diff(self.starts) == 2)

    def edits(self) -> np.ndarray:
        """Which documents are exactly picture, instruction, picture, (num_documents,) bool."""
        found = np.diff(self.starts) == 3
        first = self.starts[:-1][found]
        image = self.part_lengths == IMAGE
        found[found] = image[first] & ~image[first + 1] & image[first + 2]
        return found

    def read_images(self) -> np.ndarray:
        """How many images of each document have a part after them, (num_documents,)."""
        image = self.part_lengths == IMAGE
        return self._sums(image) - image[self.starts[1:] - 1]

    def _sums(self, of_parts: np.ndarray) -> np.ndarray:
        """Sums over the parts of each document."""
        totals = np.concatenate([[0], np.cumsum(of_parts)])
        return totals[self.starts[1:]] - totals[self.starts[:-1]]


def select(parts: np.ndarray, starts: np.ndarray, documents: np.ndarray) -> Layout:
    """The layout of some documents of a corpus, reading no others.

    Args:
        parts: of the corpus, (num_parts, 2), the second column as `Layout.part_lengths`.
        starts: of the corpus, (num_documents + 1,).
        documents: their numbers, (n,).
    """
    first = starts[documents]
    counts = starts[documents + 1] - first
    chosen = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(chosen[-1]) + np.repeat(first - chosen[:-1], counts)
    return Layout(parts[places, 1], chosen)
