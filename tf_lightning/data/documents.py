"""What a source of documents is, and what it yields."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Split = Literal["train", "val"]


RawDocument = list[str | Image.Image]


class ContextText(str):
    """Text of a document that is read and not learned: no token of it is a target."""


class TurnText(str):
    """Text of a document that <eos> ends, and the document goes on: an answer within a chat."""


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
