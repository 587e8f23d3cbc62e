"""What a model is asked at validation: captions to draw, true pictures to compare and caption."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from tf_lightning.data.documents import RawDocument, Skipped, Source, Split
from tf_lightning.errors import UserError
from tf_lightning.shapes.grammar import caption, captions, parse
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.sources import scene_image
from tf_lightning.shapes.world import Meaning, draw_scene, generator, place

SEED_OFFSET = 2_000  # these pictures are neither the validation's nor the final report's

OpenPicture = Callable[[], Image.Image]


@dataclass(frozen=True)
class Prompt:
    """One question: words to draw, and where there is one the true picture with its captions."""

    text: str
    picture: OpenPicture | None = None
    references: tuple[str, ...] = ()
    about: Any = None  # what its set and the measures made for that set know of it
    metadata: dict = field(default_factory=dict)  # as the set's file has it


class PromptSet(ABC):
    """Fixed prompts in a fixed order, and the real pictures that drawn ones are compared with.

    `facts` are the `dataset` and how its pictures came to their size, `resize`; `image_size` is the
    side of the real pictures, to which drawn ones are resized (None: neither is resized).
    """

    facts: dict[str, str | int]
    image_size: int | None

    @abstractmethod
    def prompts(self, data: L.LightningDataModule) -> Sequence[Prompt]:
        """The prompts; `data` is the run's.

        Raises:
            ValueError: there is none.
        """

    @abstractmethod
    def real_pictures(self, data: L.LightningDataModule) -> Sequence[OpenPicture]:
        """The pictures that the distribution of drawn ones is compared with."""

    def judge(self, prompt: Prompt, picture: Image.Image) -> bool | None:
        """Whether a drawn picture is right; None where nobody can tell."""
        return None

    def judge_words(self, prompt: Prompt, words: str) -> bool | None:
        """Whether a written caption is right; None where nobody can tell."""
        return None


class ShapesPrompts(PromptSet):
    """The embedded world: captions of scenes, those with two objects of held-out meanings only.

    Args:
        count: prompts.
        real_per_prompt: real pictures of each prompt's meaning, at other places and sizes. With
            the meanings the same, FID tells errors of drawing from the luck of the draw.
        seed: of the scenes, >= 0.
    """

    image_size = None

    def __init__(self, count: int = 128, real_per_prompt: int = 8, seed: int = 0):
        if min(count, real_per_prompt) < 1:
            raise UserError(
                f"count={count} and real_per_prompt={real_per_prompt} ask nothing; give 1 or more"
            )
        self.count, self.real_per_prompt, self.seed = count, real_per_prompt, seed
        self.facts = {
            "dataset": f"shapes held-out, seed {seed}",
            "resize": "none (64 x 64)",
            "count": count * real_per_prompt,
        }

    def prompts(self, data: L.LightningDataModule | None = None) -> list[Prompt]:
        """A caption of each scene, its picture, and every wording of its meaning."""
        asked = []
        for index in range(self.count):
            rng = generator(SEED_OFFSET + self.seed, index, "val")
            scene = draw_scene(rng, split="val")
            words = captions(scene.meaning)
            asked.append(
                Prompt(caption(scene, rng), partial(scene_image, scene), words, scene.meaning)
            )
        return asked

    def real_pictures(self, data: L.LightningDataModule | None = None) -> list[OpenPicture]:
        """Other pictures of the prompts' meanings."""
        meanings = [prompt.about for prompt in self.prompts()] * self.real_per_prompt
        return [partial(self._real, meaning, index) for index, meaning in enumerate(meanings)]

    def _real(self, meaning: Meaning, index: int) -> Image.Image:
        return scene_image(place(meaning, generator(SEED_OFFSET + self.seed, index, "train")))

    def judge(self, prompt: Prompt, picture: Image.Image) -> bool:
        """As the oracle reads it."""
        return read(np.asarray(picture.convert("RGB"))).meaning == prompt.about

    def judge_words(self, prompt: Prompt, words: str) -> bool:
        """As the grammar reads them."""
        return parse(words) == prompt.about


class HeldOut(PromptSet):
    """Captioned pictures that a source of the run's data keeps from training.

    Args:
        source: its name in the data's `sources`.
        count: prompts, the first of the split; fewer where it has fewer.
    """

    image_size = None

    def __init__(self, source: str, count: int = 128):
        self.source, self.count = source, count
        self.facts = {"dataset": f"{source} held-out", "resize": "as trained on"}

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Each picture with its one caption."""
        if self.source not in data.sources:
            raise UserError(
                f"the data has no source {self.source!r}; name one of {', '.join(data.sources)}"
            )
        pairs = [*islice(captioned(data.sources[self.source], "val"), self.count)]
        if not pairs:
            raise UserError(
                f"source {self.source!r} holds no captioned picture out; give it a validation split"
            )
        return [Prompt(words, partial(as_it_is, true), (words,)) for words, true in pairs]

    def real_pictures(self, data: L.LightningDataModule) -> list[OpenPicture]:
        """All pictures of the split."""
        return [partial(as_it_is, p) for _, p in captioned(data.sources[self.source], "val")]


def as_it_is(picture: Image.Image | np.ndarray) -> Image.Image:
    """A picture that is in memory already."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def captioned(source: Source, split: Split) -> Iterator[tuple[str, Image.Image]]:
    """Caption and picture of the documents that are just these."""
    for document in source.documents(split):
        kinds = sorted(isinstance(part, str) for part in document_parts(document))
        if kinds == [False, True]:
            words, true = sorted(document, key=lambda part: not isinstance(part, str))
            yield words, as_it_is(true)


def document_parts(document: RawDocument | Skipped) -> RawDocument:
    """The parts of a document; none of one that is skipped."""
    return [] if isinstance(document, Skipped) else document


def square(picture: Image.Image, side: int) -> Image.Image:
    """A picture centre cropped along its longer edge, then resized by Lanczos to side x side."""
    if picture.size == (side, side):
        return picture
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    # Cropped first: Pillow's own `box`, as in ImageOps.fit, lets what lies outside shine through.
    cropped = picture.crop((left, top, left + short, top + short))
    return cropped.resize((side, side), Image.Resampling.LANCZOS)
