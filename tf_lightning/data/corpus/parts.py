"""The kinds and lengths of the parts of documents, from the index of a corpus."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

IMAGE = -1  # the length of a part that is an image
CONTEXT_IMAGE = -2  # the length of an image that is never generated, such as one in a question
ALTERNATIVE = -2  # minus the tokens: the length of another wording of the text before it


def num_tokens(length: int | np.ndarray) -> int | np.ndarray:
    """Return the number of tokens of a text from its length in parts.npy."""
    return np.maximum(length, ALTERNATIVE - length)  # the second is that of another wording


@dataclass(frozen=True)
class PartLayout:
    """The kinds and lengths of the parts of some documents.

    Attributes:
        part_lengths: tokens of each text, IMAGE or CONTEXT_IMAGE for each image, document by
            document, (num_parts,).
        starts: document i has parts starts[i] to starts[i + 1] - 1, (num_documents + 1,).
        image_positions: positions of the patches of each part, 0 for texts, (num_parts,); None:
            all images have the same number.
    """

    part_lengths: np.ndarray
    starts: np.ndarray
    image_positions: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def lengths(self, num_patches: int) -> np.ndarray:
        """Count the positions of each document in a row, (num_documents,).

        Args:
            num_patches: positions of an image's patches, if all images have the same number.
        """
        image = self.part_lengths < 0
        patches = self._patches(num_patches)
        return 2 + self._sums(np.where(image, patches + 2, self.part_lengths))

    def image_patches(self, num_patches: int) -> "ImagePatches":
        """Count the positions of the images' patches in each document.

        Args:
            num_patches: as in `lengths`.
        """
        patches = self._patches(num_patches)
        ends = self.starts[1:]
        last = np.maximum.accumulate(np.where(self.part_lengths < 0, np.arange(len(patches)), -1))
        found = last[ends - 1]  # the last image up to the end of each document
        own = found >= self.starts[:-1]
        final = patches[ends - 1]
        return ImagePatches(self._sums(patches), np.where(own, patches[found], 0), final)

    def _patches(self, num_patches: int) -> np.ndarray:
        """Return the positions of the patches of each part, 0 for texts, (num_parts,)."""
        if self.image_positions is not None:
            return self.image_positions
        return np.where(self.part_lengths < 0, num_patches, 0)

    def pairs(self) -> np.ndarray:
        """Find documents of exactly one text and one image, (num_documents,) bool."""
        images = self._sums(self.part_lengths < 0)
        return (images == 1) & (np.diff(self.starts) == 2)

    def edits(self) -> np.ndarray:
        """Find documents of exactly image, instruction, image, (num_documents,) bool."""
        found = np.diff(self.starts) == 3
        first = self.starts[:-1][found]
        image = self.part_lengths < 0
        found[found] = image[first] & ~image[first + 1] & image[first + 2]
        return found

    def prompted(self) -> np.ndarray:
        """Find documents whose last image is generated after a text, (num_documents,) bool."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.starts))
        is_image = self.part_lengths < 0
        images, texts = np.flatnonzero(is_image), np.flatnonzero(~is_image)
        last_image, first_text = np.full(len(self), -1), np.full(len(self), len(owner))
        last_image[owner[images]] = images
        first_text[owner[texts[::-1]]] = texts[::-1]
        found = first_text < last_image
        found[found] = self.part_lengths[last_image[found]] == IMAGE
        return found

    def num_images(self) -> np.ndarray:
        """Count the images of each document, (num_documents,)."""
        return self._sums(self.part_lengths < 0)

    def _sums(self, of_parts: np.ndarray) -> np.ndarray:
        """Sum a value per part over each document, (num_documents,)."""
        totals = np.concatenate([[0], np.cumsum(of_parts)])
        return totals[self.starts[1:]] - totals[self.starts[:-1]]


class ImagePatches(NamedTuple):
    """Positions of the images' patches in each document, (num_documents,) each."""

    total: np.ndarray  # of all images
    last: np.ndarray  # of the last image
    final: np.ndarray  # of the last part, which nothing in the document reads; 0 if it is a text


def select_layout(
    parts: np.ndarray,
    starts: np.ndarray,
    documents: np.ndarray,
    wordings: np.ndarray | None,
    image_positions: np.ndarray | None = None,
) -> PartLayout:
    """Describe some documents of a corpus; the index of other documents is not read.

    Args:
        parts: parts.npy of the corpus, (num_parts, 2).
        starts: documents.npy of the corpus, (num_documents + 1,).
        documents: numbers of the documents, (n,).
        wordings: as in `Corpus.layout`, (n,).
        image_positions: positions of the patches of each image of the corpus, (num_images,); None:
            all images have the same number.
    """
    first = starts[documents]
    counts = starts[documents + 1] - first
    chosen = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(chosen[-1]) + np.repeat(first - chosen[:-1], counts)
    lengths = parts[places, 1]
    other = lengths < ALTERNATIVE
    positions = None
    if image_positions is not None:
        image = (lengths == IMAGE) | (lengths == CONTEXT_IMAGE)
        positions = np.zeros(len(places), np.int64)
        positions[image] = image_positions[parts[places[image], 0]]
    if not other.any():
        return PartLayout(lengths, chosen, positions)
    firsts = np.flatnonzero(~other)  # parts without the other wordings
    owner = np.repeat(np.arange(len(documents)), counts)[firsts]
    number = np.diff(np.append(firsts, len(lengths)))  # wordings of each part
    drawn = np.zeros(len(documents)) if wordings is None else wordings
    picked = lengths[firsts + (drawn[owner] * number).astype(np.int64)]
    picked = np.where(picked < ALTERNATIVE, num_tokens(picked), picked)
    positions = None if positions is None else positions[firsts]
    return PartLayout(picked, np.searchsorted(owner, np.arange(len(documents) + 1)), positions)


def choose_wordings(lengths: list[int], wording: float) -> Iterator[int]:
    """Yield the places of the parts of a document, with one wording of each text."""
    place = 0
    while place < len(lengths):
        end = place + 1
        while end < len(lengths) and lengths[end] < ALTERNATIVE:
            end += 1
        yield place + int(wording * (end - place))
        place = end
