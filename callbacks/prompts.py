"""Prompt sets of an evaluation: captions to generate images for, real images to caption."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from tf_lightning.data.buckets import Size
from tf_lightning.data.documents import HOLD_OUT, RawDocument, Skipped, Source, Split
from tf_lightning.errors import UserError
from tf_lightning.ranges import NonNegativeInt, PositiveInt, check_arguments
from tf_lightning.shapes.grammar import caption, captions, parse
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.sources import scene_image
from tf_lightning.shapes.world import Meaning, draw_scene, generator, place

SEED_OFFSET = 2_000  # separates these images from those of validation and of the final report

OpenImage = Callable[[], Image.Image]


@dataclass(frozen=True)
class Prompt:
    """A caption to generate an image for, and optionally its real image with all its captions."""

    text: str
    image: OpenImage | None = None
    references: tuple[str, ...] = ()
    about: Any = None  # facts for the prompt set's `judge` methods and for its own metrics
    metadata: dict = field(default_factory=dict)  # the prompt's entry in the set's file


class PromptSet(ABC):
    """Fixed prompts in a fixed order, and the real images to compare generated images with.

    `facts` hold the name of the `dataset` and how its images were resized (`resize`). `image_size`
    is the side of the real images; generated images are resized to it (None: neither is resized).
    """

    facts: dict[str, str | int]
    image_size: int | None

    def setup(self, data: L.LightningDataModule) -> None:  # noqa: B027 - most sets know them
        """Set those facts that depend on the data; called before anything else.

        Args:
            data: data module of the run.

        Raises:
            ValueError: the data does not have what the prompts need.
        """

    @abstractmethod
    def prompts(self, data: L.LightningDataModule) -> Sequence[Prompt]:
        """Return the prompts.

        Args:
            data: data module of the run.

        Raises:
            ValueError: there are no prompts.
        """

    @abstractmethod
    def real_images(self, data: L.LightningDataModule) -> Sequence[OpenImage]:
        """Return the images whose distribution is compared with that of the generated images."""

    def judge(self, prompt: Prompt, image: Image.Image) -> bool | None:
        """Return whether a generated image is right; None if that cannot be judged."""
        return None

    def judge_caption(self, prompt: Prompt, caption: str) -> bool | None:
        """Return whether a generated caption is right; None if that cannot be judged."""
        return None


class ShapesPrompts(PromptSet):
    """Captions of the shapes world; scenes with two objects have held-out meanings only.

    Args:
        count: number of prompts.
        real_per_prompt: real images of each prompt's meaning, at other positions and sizes. Since
            their meanings are those of the prompts, FID measures the quality of the images and not
            the random choice of meanings.
        seed: seed of the scenes, >= 0.
    """

    image_size = None

    def __init__(
        self, count: PositiveInt = 128, real_per_prompt: PositiveInt = 8, seed: NonNegativeInt = 0
    ):
        check_arguments(ShapesPrompts.__init__, locals())
        self.count, self.real_per_prompt, self.seed = count, real_per_prompt, seed
        self.facts = {
            "dataset": f"shapes held-out, seed {seed}",
            "resize": "none (64 x 64)",
            "count": count * real_per_prompt,
        }

    def prompts(self, data: L.LightningDataModule | None = None) -> list[Prompt]:
        """Return a caption of each scene, with its image and all captions of its meaning."""
        found = []
        for index in range(self.count):
            rng = generator(SEED_OFFSET + self.seed, index, "val")
            scene = draw_scene(rng, split="val")
            text, image = caption(scene, rng), partial(scene_image, scene)
            found.append(Prompt(text, image, captions(scene.meaning), scene.meaning))
        return found

    def real_images(self, data: L.LightningDataModule | None = None) -> list[OpenImage]:
        """Return other images of the prompts' meanings."""
        meanings = [prompt.about for prompt in self.prompts()] * self.real_per_prompt
        return [partial(self._real, meaning, index) for index, meaning in enumerate(meanings)]

    def _real(self, meaning: Meaning, index: int) -> Image.Image:
        return scene_image(place(meaning, generator(SEED_OFFSET + self.seed, index, "train")))

    def judge(self, prompt: Prompt, image: Image.Image) -> bool:
        """Return whether the oracle reads the prompt's meaning from the image."""
        return read(np.asarray(image.convert("RGB"))).meaning == prompt.about

    def judge_caption(self, prompt: Prompt, caption: str) -> bool:
        """Return whether the caption has the prompt's meaning."""
        return parse(caption) == prompt.about


class HeldOut(PromptSet):
    """Captioned images from the validation split of one of the run's data sources.

    With the data's `max_aspect_ratio`, real and generated images are center cropped to a square of
    the source's `image_size` before they are scored. Captions are generated for the whole images.

    Args:
        source: name of the source in the data's `sources`.
        count: number of prompts, from the start of the split; all of a smaller split.
    """

    image_size = None

    def __init__(self, source: str, count: PositiveInt = 128):
        check_arguments(HeldOut.__init__, locals())
        self.source, self.count = source, count
        self.facts = {"dataset": f"{source} held-out", "resize": "as trained on"}

    def setup(self, data: L.LightningDataModule) -> None:
        """Choose the square that images of several shapes are cropped to."""
        storage = getattr(data, "image_storage", None)
        if storage and storage.has_shapes:  # scores compare images of one size
            side = getattr(find_source(data, self.source), "image_size", None)
            self.image_size = side or min(self._pairs(data)[0][1].size)
            self.facts["resize"] = f"centre crop, lanczos {self.image_size}"

    def prompts(self, data: L.LightningDataModule) -> list[Prompt]:
        """Return the caption of each image with the image."""
        return [
            Prompt(text, partial(as_image, image), getattr(text, "texts", (text,)))
            for text, image in self._pairs(data)
        ]

    def _pairs(self, data: L.LightningDataModule) -> list[tuple[str, Image.Image]]:
        """Read the captions and the images of the prompts."""
        source = find_source(data, self.source)
        pairs = [*islice(caption_pairs(source, "val"), self.count)]
        if not pairs:
            raise UserError(
                f"source {self.source!r} has no captioned image in its validation split; "
                f"{HOLD_OUT}, or name another source"
            )
        return pairs

    def real_images(self, data: L.LightningDataModule) -> list[OpenImage]:
        """Return all images of the split."""
        pairs = caption_pairs(data.sources[self.source], "val")
        return [partial(as_image, image) for _, image in pairs]


def as_image(image: Image.Image | np.ndarray) -> Image.Image:
    """Convert an array to an image; return an image unchanged."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def find_source(data: L.LightningDataModule, name: str) -> Source:
    """Return the source of this name.

    Raises:
        UserError: the data has no such source.
    """
    sources = getattr(data, "sources", {})
    if name not in sources:
        known = f"name one of {', '.join(sources)}" if sources else "it has none"
        raise UserError(f"the data has no source {name!r}; {known}")
    return sources[name]


def caption_pairs(source: Source, split: Split) -> Iterator[tuple[str, Image.Image]]:
    """Yield (caption, image) of every document that consists of one text and one image."""
    for document in source.documents(split):
        parts: RawDocument = [] if isinstance(document, Skipped) else document
        if sorted(isinstance(part, str) for part in parts) == [False, True]:
            text, image = sorted(parts, key=lambda part: not isinstance(part, str))
            yield text, as_image(image)


def center_crop_resize(image: Image.Image, size: int | Size) -> Image.Image:
    """Center crop an image to the aspect ratio of a size and resize it to it with Lanczos.

    Args:
        image: the image.
        size: width and height in pixels, or the side of a square.
    """
    size = (size, size) if isinstance(size, int) else size
    if image.size == size:
        return image
    width = min(image.width, round(image.height * size[0] / size[1]))
    height = min(image.height, round(image.width * size[1] / size[0]))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    # Crop first: with Pillow's `box` argument, as in ImageOps.fit, the filter at the border also
    # uses pixels outside the box.
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize(size, Image.Resampling.LANCZOS)
