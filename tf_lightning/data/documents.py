"""Documents, and the interface of the sources that yield them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Split = Literal["train", "val"]
HOLD_OUT = "give the source a larger val_fraction (such as 0.2), num_val, or val_paths"

RawDocument = list[str | Image.Image]


class ContextText(str):
    """Loss-masked text: the model reads it, but none of its tokens is a target of the LM loss."""


class TurnText(str):
    """Text followed by <eos> inside a document, such as an answer in a chat that continues."""


class ContextTurn(ContextText, TurnText):
    """Loss-masked text followed by a loss-masked <eos>, such as an answer that is only read."""


class AnyText(str):
    """The first of several texts, such as the captions of an image; each epoch draws one of them.

    Attributes:
        texts: all of them.
    """

    def __new__(cls, texts: Sequence[str]) -> str:
        """Create the part for `texts`, at least one; a plain str if they are all the same."""
        texts = tuple(dict.fromkeys(texts))
        if len(texts) == 1:
            return texts[0]
        part = super().__new__(cls, texts[0])
        part.texts = texts
        return part

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:
        """Return the argument that pickle passes to `__new__`."""
        return (self.texts,)


@dataclass(frozen=True)
class Skipped:
    """Yielded by a source in place of a sample that cannot be used; reasons are counted."""

    reason: str


class BadSample(Exception):
    """A sample cannot be used. The message is the reason, as in `Skipped`."""


class Source(ABC):
    """Interface of a source of documents. Any class with these two methods is a `Source`.

    It may also have a method `num_samples`, see `num_samples`.
    """

    @abstractmethod
    def documents(self, split: Split) -> Iterator[RawDocument | Skipped]:
        """Yield documents of texts and RGB images of one size, and `Skipped` for bad samples."""

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """Identify the content of `documents`: class, arguments, sizes and times of the files.

        A prepared corpus is reused as long as the fingerprint of its source stays the same.
        """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Accept any class with the two methods as a `Source`, without inheritance."""
        if cls is not Source:
            return NotImplemented
        return hasattr(other, "documents") and hasattr(other, "fingerprint")


def num_samples(source: Source, split: Split) -> int | None:
    """Return how many documents and bad samples a source yields, for a progress bar.

    None if the source has no method `num_samples(split)`, or if counting would take long.
    """
    return source.num_samples(split) if hasattr(source, "num_samples") else None


def identified(
    name: str, source: Source, split: Split
) -> Iterator[tuple[str, RawDocument | Skipped]]:
    """Yield each document with an id, which a filter list may name.

    A source that reads files has a method `identified(split)`, whose ids begin with the path of one
    of `files(split)`. Other documents are named by the source, the split and their number, such as
    "shapes:train:17".

    Args:
        name: name of the source.
        source: the source.
        split: "train" or "val".
    """
    if hasattr(source, "identified"):
        yield from source.identified(split)
        return
    for number, document in enumerate(source.documents(split)):
        yield f"{name}:{split}:{number}", document
