"""The shapes world: scenes of one or two flat shapes on a plain background, and their images.

Scenes are a pure function of (seed, index, split), so no file is downloaded or stored. Lengths are
in pixels of a 64 x 64 image; x points right and y points down. `grammar` has the sentences.
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
COLORS = {
    "red": (205, 25, 35),
    "green": (30, 150, 60),
    "blue": (30, 70, 215),
    "yellow": (250, 225, 40),
    "purple": (140, 40, 165),
    "orange": (250, 130, 10),
}
KINDS = tuple(product(SHAPES, COLORS))  # 18 (shape, color) pairs
RADII = (7.0, 13.0)
MARGIN = 2.0  # between an object and the edge of the image
GAP = 3.0  # between the bounding boxes of two objects
# Minimum ratio of displacement along the relation's axis to the other axis.
DOMINANCE = 1.5


class Meaning(NamedTuple):
    """Meaning of an image or a caption, in a unique form.

    `objects` are (shape, color) pairs. With two objects, `relation` is "above" or "left of" and
    relates the first to the second. "below" and "right of" are expressed by exchanging the objects.
    """

    objects: tuple[tuple[str, str], ...]
    relation: Literal["above", "left of"] | None = None

    def __str__(self) -> str:
        """Return words such as "red circle above blue square"."""
        return f" {self.relation} ".join(f"{color} {shape}" for shape, color in self.objects)


@dataclass(frozen=True)
class Object:
    """A flat shape with bounding box (x - radius, y - radius) to (x + radius, y + radius)."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two objects."""

    objects: tuple[Object, ...]

    @property
    def meaning(self) -> Meaning:
        """Meaning of this scene."""
        if len(self.objects) == 1:
            return Meaning(((self.objects[0].shape, self.objects[0].color),))
        first, second = self.objects
        horizontal = abs(first.x - second.x) > abs(first.y - second.y)
        if (first.x > second.x) if horizontal else (first.y > second.y):
            first, second = second, first
        kinds = ((first.shape, first.color), (second.shape, second.color))
        return Meaning(kinds, "left of" if horizontal else "above")


def held_out(meaning: Meaning) -> bool:
    """Return whether a meaning is held out for evaluation: a tenth of those with two objects."""
    return len(meaning.objects) == 2 and zlib.crc32(str(meaning).encode()) % 10 == 0


@cache
def meanings(num_objects: int, split: Split | None = None) -> Sequence[Meaning]:
    """Return all meanings with one or two objects of a split; None: of both splits."""
    if num_objects == 1:
        return tuple(Meaning((kind,)) for kind in KINDS)
    every = (Meaning(*both) for both in product(permutations(KINDS, 2), ("above", "left of")))
    return tuple(m for m in every if split is None or held_out(m) == (split == "val"))


def generator(seed: int, index: int, split: Split = "train") -> np.random.Generator:
    """Return the random generator of one sample."""
    return np.random.default_rng([seed, index, split == "val"])


def draw_scene(
    rng: np.random.Generator,
    num_objects: int | None = None,
    *,
    split: Split = "train",
    two_objects: float = 0.75,
) -> Scene:
    """Draw a scene.

    Args:
        rng: source of the random numbers.
        num_objects: 1 or 2; None: drawn at random.
        split: "train" has no held-out meanings; scenes of two objects in "val" have only those.
        two_objects: probability of two objects if `num_objects` is None, in [0, 1].
    """
    drawn = 1 + int(rng.random() < two_objects)
    choices = meanings(num_objects or drawn, split)
    return place(choices[rng.integers(len(choices))], rng)


def place(meaning: Meaning, rng: np.random.Generator) -> Scene:
    """Draw a scene with a given meaning: objects at random positions and of random sizes."""
    if len(meaning.objects) == 1:
        radius = rng.uniform(*RADII)
        x, y = rng.uniform(MARGIN + radius, IMAGE_SIZE - MARGIN - radius, size=2)
        return Scene((Object(*meaning.objects[0], x, y, radius),))
    radii = rng.uniform(*RADII, size=2)
    low, high = MARGIN + radii, IMAGE_SIZE - MARGIN - radii
    # Divide the free length along the relation's axis: before, between and after the two boxes.
    room = high[1] - low[0] - radii.sum() - GAP
    before, after = np.sort(rng.uniform(0, room, size=2))
    along = (low[0] + before, low[0] + radii.sum() + GAP + after)
    reach = (along[1] - along[0]) / DOMINANCE
    first = rng.uniform(low[0], high[0])
    second = rng.uniform(max(low[1], first - reach), min(high[1], first + reach))
    centers = zip(along, (first, second), strict=True)
    if meaning.relation == "above":
        centers = ((x, y) for y, x in centers)
    return Scene(
        tuple(
            Object(*kind, float(x), float(y), float(radius))
            for kind, (x, y), radius in zip(meaning.objects, centers, radii, strict=True)
        )
    )


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Compute the share of each pixel that a shape covers, (64, 64) in [0, 1].

    The share is a linear function of the signed distance to the shape, clipped to [0, 1].
    """
    centers = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    across, down = np.abs(centers - np.float32(x))[None], (centers - np.float32(y))[:, None]
    if shape == "circle":
        distance = np.sqrt(across**2 + down**2) - radius
    elif shape == "square":
        distance = np.maximum(across, np.abs(down)) - radius
    else:  # upright triangle: apex at the center of the box's top edge
        distance = np.maximum((2 * across - down - radius) / 5**0.5, down - radius)
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Render a scene with antialiasing, uint8 (64, 64, 3)."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.float32)
    for thing in scene.objects:
        covered = coverage(thing.shape, thing.x, thing.y, thing.radius)[..., None]
        image += covered * (np.float32(COLORS[thing.color]) - image)
    return np.rint(image).astype(np.uint8)
