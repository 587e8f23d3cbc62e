"""An answer on its way: what it has read, and what it hands over.

Shapes: C x h x w latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from tf_lightning.batch import Document
from tf_lightning.sampler import Trajectory

# Number of the prompt, and what it is answered with: a token, an image (C, h, w), or None: the end.
Event = tuple[int, int | Tensor | None]

# str, a picture, or a part that is already token ids or latents; in any order.
RawDocument = list[str | Image.Image | Tensor]
Prompt = str | Image.Image | RawDocument


@dataclass(frozen=True)
class Answers:
    """What `Model.generate` gives: one document for each answer, text and pictures in order."""

    documents: list[RawDocument]
    seeds: list[int]

    @property
    def images(self) -> list[Image.Image]:
        """Every picture."""
        return [p for document in self.documents for p in document if isinstance(p, Image.Image)]

    @property
    def texts(self) -> list[str]:
        """The words of each answer."""
        return [" ".join(p for p in parts if isinstance(p, str)) for parts in self.documents]


@dataclass
class Branch:
    """A row of the cache that reads all of a sequence, or less of it, for guidance."""

    row: int
    reads_text: bool
    reads_images: bool
    length: int = 0


@dataclass
class Reply:
    """A sequence on its way."""

    number: int
    branches: list[Branch]  # the first reads everything
    generator: torch.Generator
    turns_left: int  # of its share of the progress bar
    token: int | None = None  # to be read next
    text: list[int] = field(default_factory=list)  # since the last image
    codes: list[int] = field(default_factory=list)  # of the image on its way
    num_tokens: int = 0
    num_images: int = 0


def by_kind(replies: Sequence[Reply]) -> list[Branch]:
    """Every sequence's first branch, then every second one, ..."""
    return [branch for kind in zip(*(r.branches for r in replies), strict=True) for branch in kind]


def collect(events: Iterator[Event], count: int) -> list[Document]:
    """The answers to `count` prompts as Documents."""
    answers: list[list[int | Tensor]] = [[] for _ in range(count)]
    for number, part in events:
        if part is not None:
            answers[number].append(part)
    return [to_document(parts) for parts in answers]


def to_document(parts: list[int | Tensor]) -> Document:
    """Tokens and images in order; tokens that follow each other are one text.

    Images are copied out of inference mode, so that they can be trained on.
    """
    document: Document = []
    for is_token, group in groupby(parts, key=lambda part: isinstance(part, int)):
        members = list(group)
        document += [torch.tensor(members)] if is_token else [image.clone() for image in members]
    return document


@dataclass
class Drawing:
    """Sequences whose images began together."""

    replies: list[Reply]
    trajectory: Trajectory
