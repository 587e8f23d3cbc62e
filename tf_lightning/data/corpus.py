"""What a source of documents is, and a prepared corpus on disk: memory-mapped, read by number.

A corpus is a directory of
    tokens.bin     uint32, all text ids one after another
    latents.bin    float16 (num_images, C, h, w), unit variance; codes are uint32, C = 1
    parts.npy      int64 (num_parts, 2): text is (first token, length), an image (its number, -1)
    documents.npy  int64 (num_documents + 1,): document i is parts[documents[i] : documents[i + 1]]
    corpus.json    counts, image shape, codes in the codebook if there is one, and how many samples
                   were skipped for what reason
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from tf_lightning.batch import Document

Split = Literal["train", "val"]
RawDocument = list[str | Image.Image]
IMAGE = -1  # stands where a text part has its length
STORED_LATENTS, STORED_CODES = (np.float16, np.float32), (np.uint32, np.int64)  # and as they serve


@dataclass(frozen=True)
class Skipped:
    """What a source yields in place of a bad sample; the reason is counted and reported."""

    reason: str


class BadSample(Exception):
    """A sample cannot be used; the message is the reason to count."""


class Source(ABC):
    """Where documents come from. Any class with these two methods is one."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[RawDocument | Skipped]:
        """Texts and RGB pictures, all pictures of one size; `Skipped` for each bad sample."""

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """Identifies what `documents` yields: reader, arguments, the files' sizes and times."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Duck typing, as for collections.abc.Iterable."""
        return hasattr(other, "documents") and hasattr(other, "fingerprint")


class Corpus:
    """A prepared corpus.

    Attributes:
        name: the directory's name.
        image_shape: (C, h, w) of its latents, None where it has none.
        skipped: how many samples were left out, by reason.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        facts = json.loads((self.path / "corpus.json").read_text())
        self.name = self.path.name
        self.image_shape = tuple(facts["image_shape"]) if facts["image_shape"] else None
        self.skipped: dict[str, int] = facts["skipped"]
        self._tokens = _memmap(self.path / "tokens.bin", np.uint32, (facts["num_tokens"],))
        shape = (facts["num_images"], *(self.image_shape or ()))
        stored, self._dtype = STORED_CODES if facts.get("num_codes") else STORED_LATENTS
        self._latents = _memmap(self.path / "latents.bin", stored, shape)
        self._parts = np.load(self.path / "parts.npy", mmap_mode="r")
        self._documents = np.load(self.path / "documents.npy", mmap_mode="r")

    def __reduce__(self):
        """Travels to DataLoader workers as its path, not its content."""
        return Corpus, (self.path,)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents) - 1

    def document(self, index: int) -> Document:
        """Texts (L,) int64 and latents (C, h, w) float32, or codes (1, h, w) int64, in order."""
        parts = self._parts[self._documents[index] : self._documents[index + 1]]
        return [
            torch.from_numpy(self._latents[start].astype(self._dtype))
            if length == IMAGE
            else torch.from_numpy(self._tokens[start : start + length].astype(np.int64))
            for start, length in parts.tolist()
        ]

    def lengths(self, num_patches: int) -> np.ndarray:
        """Positions each document takes in a row, (num_documents,), with N patches an image."""
        length = self._parts[:, 1]
        return 2 + self._sums(np.where(length == IMAGE, num_patches + 2, length))

    def pairs(self) -> np.ndarray:
        """Which documents are exactly one text and one image, (num_documents,) bool."""
        images = self._sums(self._parts[:, 1] == IMAGE)
        return (images == 1) & (np.diff(self._documents) == 2)

    def edits(self) -> np.ndarray:
        """Which documents are exactly picture, instruction, picture, (num_documents,) bool."""
        found = np.diff(self._documents) == 3
        first = self._documents[:-1][found]
        image = self._parts[:, 1] == IMAGE
        found[found] = image[first] & ~image[first + 1] & image[first + 2]
        return found

    def read_images(self) -> np.ndarray:
        """How many images of each document have a part after them, (num_documents,)."""
        image = self._parts[:, 1] == IMAGE
        return self._sums(image) - image[self._documents[1:] - 1]

    def _sums(self, of_parts: np.ndarray) -> np.ndarray:
        """Sums over the parts of each document."""
        totals = np.concatenate([[0], np.cumsum(of_parts)])
        return totals[self._documents[1:]] - totals[self._documents[:-1]]


def _memmap(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file; an empty file, which cannot be mapped, is an empty array."""
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))  # plain arrays slice faster
