"""Reads a 64 x 64 picture back into objects and their relation: the judge of generated pictures.

Each blob that stands out from the ground gets a colour from its middle and the shape whose
rendering, fitted to the blob's area and centroid, covers it best. What fits no shape of the world
is counted, never guessed.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tf_lightning.shapes.world import (
    BACKGROUND,
    COLOURS,
    RADII,
    SHAPES,
    Meaning,
    Object,
    Scene,
    coverage,
)

FOREGROUND = 60.0  # distance from the ground in RGB space; a pixel half covered by yellow has 103
SPECK = 6  # pixels; smaller blobs are dust
COLOUR_TOLERANCE = 60.0  # distance in RGB space; the two nearest colours are 100 apart
PURITY = 0.9  # share of the blob's middle that must have its colour
MIN_IOU = 0.85  # overlap of the blob and the fitted shape
MIN_LEAD = 0.02  # by which that overlap exceeds the next shape's
RADIUS_SLACK = 1.5  # pixels beyond the world's sizes
UNMOVED = 2.0  # pixels; what an edit leaves alone may differ by these

PALETTE = np.float32([BACKGROUND, *COLOURS.values()])
NEIGHBOURS = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    `unreadable` counts blobs that are no object of the world; `meaning` is None unless all is
    readable and there are one or two different objects.
    """

    objects: tuple[Object, ...]
    unreadable: int

    @property
    def meaning(self) -> Meaning | None:
        """What the picture says, as a caption would say it."""
        kinds = {(thing.shape, thing.colour) for thing in self.objects}
        if self.unreadable or not 1 <= len(self.objects) <= 2 or len(kinds) < len(self.objects):
            return None
        return Scene(self.objects).meaning

    def __str__(self) -> str:
        """Words such as "red circle above blue square", or a list of what is there."""
        if self.meaning:
            return str(self.meaning)
        found = [f"{thing.colour} {thing.shape}" for thing in self.objects]
        found += [f"{self.unreadable} unreadable"] if self.unreadable else []
        return ", ".join(found) or "nothing"


def read(image: np.ndarray) -> Reading:
    """Reads a picture, uint8 (64, 64, 3)."""
    pixels = image.astype(np.float32)
    labels, count = ndimage.label(
        np.linalg.norm(pixels - PALETTE[0], axis=-1) > FOREGROUND, structure=NEIGHBOURS
    )
    blobs = [labels == label for label in range(1, count + 1)]
    readings = [_read_blob(pixels, blob) for blob in blobs if blob.sum() >= SPECK]
    objects = tuple(thing for thing in readings if thing)
    return Reading(objects, len(readings) - len(objects))


def carried_out(image: np.ndarray, before: Scene, after: Scene) -> bool:
    """Whether a picture, uint8 (64, 64, 3), shows an edit of `before` that was to give `after`.

    It has to say what `after` says, and what the edit leaves alone has to be where it was, as large
    as it was, within UNMOVED pixels.
    """
    reading = read(image)
    if reading.meaning != after.meaning:
        return False
    found = {(thing.shape, thing.colour): thing for thing in reading.objects}
    kept = [thing for thing in after.objects if thing in before.objects]
    return all(_near(found[thing.shape, thing.colour], thing) for thing in kept)


def _near(a: Object, b: Object) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y), abs(a.radius - b.radius)) <= UNMOVED


def _read_blob(pixels: np.ndarray, blob: np.ndarray) -> Object | None:
    colour = _read_colour(pixels, blob)
    if colour is None:
        return None
    # How much of each pixel the object covers: where its colour lies between ground and object.
    direction = np.float32(COLOURS[colour]) - PALETTE[0]
    covered = np.clip((pixels - PALETTE[0]) @ direction / (direction @ direction), 0, 1) * blob
    fits = [_fit(shape, covered) for shape in SHAPES]
    overlaps = [
        _iou(coverage(shape, *fit), covered) for shape, fit in zip(SHAPES, fits, strict=True)
    ]
    best = int(np.argmax(overlaps))
    _, second, first = sorted(overlaps)
    x, y, radius = fits[best]
    fitting = first >= MIN_IOU and first - second >= MIN_LEAD
    if fitting and RADII[0] - RADIUS_SLACK <= radius <= RADII[1] + RADIUS_SLACK:
        return Object(SHAPES[best], colour, x, y, radius)
    return None


def _read_colour(pixels: np.ndarray, blob: np.ndarray) -> str | None:
    # Edges are mixtures with the ground (a pale red is nearest to orange): the middle alone tells.
    middle = pixels[ndimage.binary_erosion(blob, iterations=2)]  # (M, 3)
    if not len(middle):
        return None
    distances = np.linalg.norm(middle[:, None] - PALETTE, axis=-1)  # (M, colours)
    votes = np.bincount(
        distances.argmin(1), weights=distances.min(1) <= COLOUR_TOLERANCE, minlength=len(PALETTE)
    )
    winner = int(votes.argmax())
    if winner == 0 or votes[winner] < PURITY * len(middle):
        return None
    return list(COLOURS)[winner - 1]


def _fit(shape: str, covered: np.ndarray) -> tuple[float, float, float]:
    """The (x, y, radius) at which a shape has the area and the centroid of `covered`."""
    area = float(covered.sum())
    centres = np.arange(len(covered)) + 0.5
    x, y = float(covered.sum(0) @ centres) / area, float(covered.sum(1) @ centres) / area
    if shape == "circle":
        return x, y, (area / np.pi) ** 0.5
    if shape == "square":
        return x, y, area**0.5 / 2
    radius = (area / 2) ** 0.5
    return (
        x,
        y - radius / 3,
        radius,
    )  # a triangle's centroid lies a third of its radius below the box's centre


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())
