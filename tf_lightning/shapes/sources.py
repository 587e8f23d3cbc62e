"""The shapes world as three sources of documents: captioned images, text, and edits.

Their default seeds differ, so that document i of one source is independent of document i of
another.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from tf_lightning.data.documents import RawDocument
from tf_lightning.ranges import NonNegativeInt, PositiveInt, Share, check_fields
from tf_lightning.shapes import grammar, world
from tf_lightning.shapes.grammar import caption, draw_edit, draw_text
from tf_lightning.shapes.world import IMAGE_SIZE, Scene, Split, draw_scene, generator, render


@dataclass(frozen=True)
class ShapesCaptions:
    """Documents [caption, image].

    Args:
        num_documents: number of training documents.
        num_val: number of validation documents; those with two objects have meanings that never
            occur in training.
        two_objects: share of images with two objects, in [0, 1].
        seed: seed of the documents, >= 0.
    """

    image_size: ClassVar[int] = IMAGE_SIZE

    num_documents: PositiveInt = 30_000
    num_val: NonNegativeInt = 1_000
    two_objects: Share = 0.75
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def documents(self, split: Split) -> Iterator[RawDocument]:
        """Yield the documents of a split, in order."""
        for index in range(self.num_samples(split)):
            rng = generator(self.seed, index, split)
            scene = draw_scene(rng, split=split, two_objects=self.two_objects)
            yield [caption(scene, rng), scene_image(scene)]

    def num_samples(self, split: Split) -> int:
        """Return the number of documents of a split."""
        return _count(self, split)

    def fingerprint(self, split: Split) -> str:
        """Identify the documents of a split: equal documents have equal fingerprints."""
        return _fingerprint(self, split, self.two_objects)


@dataclass(frozen=True)
class ShapesTexts:
    """Documents [text] with known probability `grammar.text_log_prob`.

    Training texts state every meaning, also those that are held out for images.

    Args:
        num_documents: number of training documents.
        num_val: number of validation documents.
        seed: seed of the documents, >= 0.
    """

    num_documents: PositiveInt = 30_000
    num_val: NonNegativeInt = 1_000
    seed: NonNegativeInt = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def documents(self, split: Split) -> Iterator[RawDocument]:
        """Yield the documents of a split, in order."""
        for index in range(self.num_samples(split)):
            yield [draw_text(generator(self.seed, index, split))]

    def num_samples(self, split: Split) -> int:
        """Return the number of documents of a split."""
        return _count(self, split)

    def fingerprint(self, split: Split) -> str:
        """Identify the documents of a split: equal documents have equal fingerprints."""
        return _fingerprint(self, split)


@dataclass(frozen=True)
class ShapesEdits:
    """Documents [image, instruction, edited image]; no training image has a held-out meaning.

    Args:
        num_documents: number of training documents.
        num_val: number of validation documents.
        two_objects: share of images to edit with two objects, in [0, 1].
        seed: seed of the documents, >= 0.
    """

    image_size: ClassVar[int] = IMAGE_SIZE

    num_documents: PositiveInt = 10_000
    num_val: NonNegativeInt = 1_000
    two_objects: Share = 0.75
    seed: NonNegativeInt = 2

    def __post_init__(self) -> None:
        check_fields(self)

    def documents(self, split: Split) -> Iterator[RawDocument]:
        """Yield the documents of a split, in order."""
        for index in range(self.num_samples(split)):
            rng = generator(self.seed, index, split)
            scene = draw_scene(rng, split=split, two_objects=self.two_objects)
            instruction, edited = draw_edit(scene, rng, split=split)
            yield [scene_image(scene), instruction, scene_image(edited)]

    def num_samples(self, split: Split) -> int:
        """Return the number of documents of a split."""
        return _count(self, split)

    def fingerprint(self, split: Split) -> str:
        """Identify the documents of a split: equal documents have equal fingerprints."""
        return _fingerprint(self, split, self.two_objects)


def scene_image(scene: Scene) -> Image.Image:
    """Render a scene as an RGB image of 64 x 64."""
    return Image.fromarray(render(scene))


def _count(source: ShapesCaptions | ShapesTexts | ShapesEdits, split: Split) -> int:
    return source.num_documents if split == "train" else source.num_val


def _fingerprint(
    source: ShapesCaptions | ShapesTexts | ShapesEdits, split: Split, *more: float
) -> str:
    # The code is included because it determines the documents.
    code = b"".join(Path(module.__file__).read_bytes() for module in (world, grammar))
    parts = (
        type(source).__name__,
        split,
        _count(source, split),
        source.seed,
        *more,
        zlib.crc32(code),
    )
    return " ".join(map(str, parts))
