"""The embedded world: one or two flat shapes on a plain ground, and the pictures of them.

Everything is a pure function of (seed, index, split), so no file is downloaded or kept. Lengths are
in pixels of a 64 x 64 picture, x to the right and y downwards. `shapes_grammar` has the sentences.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "val"]

IMAGE_SIZE = 64
BACKGROUND = (245, 245, 245)
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (205, 25, 35),
    "green": (30, 150, 60),
    "blue": (30, 70, 215),
    "yellow": (250, 225, 40),
    "purple": (140, 40, 165),
    "orange": (250, 130, 10),
}
KINDS = tuple(product(SHAPES, COLOURS))  # 18 (shape, colour) pairs
RADII = (7.0, 13.0)
MARGIN = 2.0  # between an object and the edge of the picture
GAP = 3.0  # between the boxes of two objects
DOMINANCE = (
    1.5  # the relation's axis has at least this many times the displacement of the other axis
)


class Meaning(NamedTuple):
    """What a picture or a caption says, with one form for each fact.

    `objects` are (shape, colour) pairs. With two of them `relation` is "above" or "left of" and
    reads from the first to the second; "below" and "right of" are these with the objects exchanged.
    """

    objects: tuple[tuple[str, str], ...]
    relation: Literal["above", "left of"] | None = None

    def __str__(self) -> str:
        """Words such as "red circle above blue square"."""
        return f" {self.relation} ".join(f"{colour} {shape}" for shape, colour in self.objects)


@dataclass(frozen=True)
class Object:
    """A flat shape that fills the box from (x - radius, y - radius) to (x + radius, y + radius)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two objects."""

    objects: tuple[Object, ...]

    @property
    def meaning(self) -> Meaning:
        """What this scene shows."""
        if len(self.objects) == 1:
            return Meaning(((self.objects[0].shape, self.objects[0].colour),))
        first, second = self.objects
        horizontal = abs(first.x - second.x) > abs(first.y - second.y)
        if (first.x > second.x) if horizontal else (first.y > second.y):
            first, second = second, first
        kinds = ((first.shape, first.colour), (second.shape, second.colour))
        return Meaning(kinds, "left of" if horizontal else "above")


def held_out(meaning: Meaning) -> bool:
    """Whether a meaning is kept for evaluation: a fixed tenth, about, of those with two objects."""
    return len(meaning.objects) == 2 and zlib.crc32(str(meaning).encode()) % 10 == 0


@cache
def meanings(num_objects: int, split: Split | None = None) -> Sequence[Meaning]:
    """All meanings with one or two objects that pictures of a split (None: of either) may have."""
    if num_objects == 1:
        return tuple(Meaning((kind,)) for kind in KINDS)
    every = (Meaning(*both) for both in product(permutations(KINDS, 2), ("above", "left of")))
    return tuple(m for m in every if split is None or held_out(m) == (split == "val"))


def generator(seed: int, index: int, split: Split = "train") -> np.random.Generator:
    """The random numbers of one sample."""
    return np.random.default_rng([seed, index, split == "val"])


def scene(
    seed: int,
    index: int,
    num_objects: int | None = None,
    *,
    split: Split = "train",
    two_objects: float = 0.75,
) -> Scene:
    """Scene `index` of a split.

    Args:
        seed: names the world, >= 0.
        index: place in the split, >= 0.
        num_objects: 1 or 2; None draws it.
        split: "train" never shows a held-out meaning; two objects of "val" show nothing else.
        two_objects: share of scenes with two objects where `num_objects` is None, in [0, 1].
    """
    return draw_scene(
        generator(seed, index, split), num_objects, split=split, two_objects=two_objects
    )


def draw_scene(
    rng: np.random.Generator,
    num_objects: int | None = None,
    *,
    split: Split = "train",
    two_objects: float = 0.75,
) -> Scene:
    """As `scene`, from a generator that the caller goes on using."""
    drawn = 1 + int(rng.random() < two_objects)
    choices = meanings(num_objects or drawn, split)
    return place(choices[rng.integers(len(choices))], rng)


def place(meaning: Meaning, rng: np.random.Generator) -> Scene:
    """A scene with a given meaning, at random places and sizes."""
    if len(meaning.objects) == 1:
        radius = rng.uniform(*RADII)
        x, y = rng.uniform(MARGIN + radius, IMAGE_SIZE - MARGIN - radius, size=2)
        return Scene((Object(*meaning.objects[0], x, y, radius),))
    radii = rng.uniform(*RADII, size=2)
    low, high = MARGIN + radii, IMAGE_SIZE - MARGIN - radii
    # Along the relation's axis the two boxes and the gap share out what room they leave.
    room = high[1] - low[0] - radii.sum() - GAP
    before, after = np.sort(rng.uniform(0, room, size=2))
    along = (low[0] + before, low[0] + radii.sum() + GAP + after)
    reach = (along[1] - along[0]) / DOMINANCE
    first = rng.uniform(low[0], high[0])
    second = rng.uniform(max(low[1], first - reach), min(high[1], first + reach))
    centres = zip(along, (first, second), strict=True)
    if meaning.relation == "above":
        centres = ((x, y) for y, x in centres)
    return Scene(
        tuple(
            Object(*kind, float(x), float(y), float(radius))
            for kind, (x, y), radius in zip(meaning.objects, centres, radii, strict=True)
        )
    )


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, (64, 64) in [0, 1], from its signed distance."""
    centres = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    across, down = np.abs(centres - np.float32(x))[None], (centres - np.float32(y))[:, None]
    if shape == "circle":
        distance = np.sqrt(across**2 + down**2) - radius
    elif shape == "square":
        distance = np.maximum(across, np.abs(down)) - radius
    else:  # upright: apex in the middle of the box's top, base along its bottom
        distance = np.maximum((2 * across - down - radius) / 5**0.5, down - radius)
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, antialiased, uint8 (64, 64, 3)."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.float32)
    for thing in scene.objects:
        covered = coverage(thing.shape, thing.x, thing.y, thing.radius)[..., None]
        image += covered * (np.float32(COLOURS[thing.colour]) - image)
    return np.rint(image).astype(np.uint8)
