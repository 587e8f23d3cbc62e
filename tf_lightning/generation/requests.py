"""What is asked of a model, and what must be known of it to answer.

Shapes: N patches an image, C x h x w latents.

An answer on its way: what it has read, and what it hands over.

Shapes: C x h x w latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from tf_lightning.batch import Batch, Document, document_length, pack
from tf_lightning.diffusion.guidance import Guidance
from tf_lightning.diffusion.sampler import Trajectory
from tf_lightning.errors import UserError
from tf_lightning.generation.token_sampling import TextSampling
from tf_lightning.model.transfusion import TransfusionModel

Answer = Literal["image", "text", "any"]


@dataclass(frozen=True)
class Settings:
    """What to answer, and how."""

    answer: Answer = "any"
    """"image": one, now; "text": up to <eos> or <boi>; "any": what the model samples."""
    text: TextSampling = field(default_factory=TextSampling)
    guidance: Guidance = field(default_factory=Guidance)
    scheduler: Any = None
    """Of the images, from `sampler.build_scheduler`."""
    num_inference_steps: int = 50
    codes: TextSampling = field(default_factory=lambda: TextSampling(temperature=1.0))
    """Which codes are drawn, where images are made of them; of its fields those of one token."""
    max_images: int = 1
    """Images in an answer of any kind, at most; the <boi> after them ends it."""

    def __post_init__(self) -> None:
        if self.answer not in ("image", "text", "any"):
            raise UserError(f"answer={self.answer!r} must be 'image', 'text' or 'any'")
        if self.max_images < 1:
            raise UserError(
                f"max_images={self.max_images} must be at least 1; answer='text' draws none"
            )

    @property
    def num_images(self) -> int:
        """Most images of an answer."""
        return {"image": 1, "text": 0, "any": self.max_images}[self.answer]

    @property
    def num_tokens(self) -> int:
        """Most text tokens of an answer."""
        return 0 if self.answer == "image" else self.text.max_new_tokens

    @property
    def num_turns(self) -> int:
        """Most tokens and denoising steps of an answer."""
        return self.num_tokens + self.num_images * self.num_inference_steps

    @property
    def branches(self) -> list[tuple[bool, bool]]:
        """Which (text, images) each row of a sequence reads; the first reads everything."""
        return self.guidance.branches if self.num_images else [(True, True)]


@dataclass(frozen=True)
class Speaker:
    """A network and what must be known of it to generate."""

    net: TransfusionModel
    tokenizer: Any
    """Has bos_id, eos_id, boi_id, eoi_id; vocab_size of codes; decode, where texts stop answers."""
    patch_size: int
    latent_shape: tuple[int, int, int] | None = None
    """(C, h, w) of its images; None: it has none."""
    causal_images: bool = False
    """As trained; codes always are."""
    max_length: int | None = None
    """Positions of the longest document it was trained on; None: unknown."""

    @property
    def causal(self) -> bool:
        """Whether a patch sees only the earlier ones of its image, as a code does."""
        return self.causal_images or self.net.num_codes > 0

    @property
    def num_patches(self) -> int:
        """N, patches (the time token counted) or codes; 0 without images."""
        if self.latent_shape is None:
            return 0
        _, height, width = self.latent_shape
        return (height // self.patch_size) * (width // self.patch_size) + self.net.time_token

    def capacity(self, prompt: Document, settings: Settings) -> int:
        """Positions of a prompt and the longest answer to it.

        Raises:
            UserError: the model's documents are too short for the prompt and the least answer.
        """
        length = document_length(prompt, self.patch_size, self.net.time_token)
        image = self.num_patches + 2  # <boi>, <eoi>
        least = image if settings.answer == "image" else 1
        if self.max_length is not None and length + least > self.max_length:
            raise UserError(
                f"the prompt takes {length} positions and its answer at least {least}, but this "
                f"model was trained on {self.max_length}; shorten the prompt"
            )
        return length + settings.num_tokens + settings.num_images * image


def pack_prompts(
    documents: Sequence[Document], tokenizer, patch_size: int, device, time_token: bool = False
) -> Batch:
    """One document a row; conditioning images stay clean (t = 0)."""
    batch = pack(
        [[document] for document in documents],
        list(range(len(documents))),
        tokenizer=tokenizer,
        row_length=max(document_length(d, patch_size, time_token) for d in documents),
        patch_size=patch_size,
        time_token=time_token,
    ).to(device)
    return replace(batch, t=torch.zeros_like(batch.t))


# Number of the prompt, and what it is answered with: a token, an image (C, h, w), or None: the end.
Event = tuple[int, int | Tensor | None]

# str, a picture, or a part that is already token ids or latents; in any order.
RawDocument = list[str | Image.Image | Tensor]
Prompt = str | Image.Image | RawDocument


@dataclass(frozen=True)
class Answers:
    """What `TransfusionPipeline.generate` gives: one document for each answer, text and pictures in order."""

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
