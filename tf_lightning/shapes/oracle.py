"""Oracle: reads a 64 x 64 image back into objects and their relation, to judge generated images.

The color of a blob that differs from the background is read from its interior. Its shape is the
one whose rendering, fitted to the blob's area and centroid, overlaps it most. A blob that fits no
shape is counted as unreadable.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tf_lightning.errors import UserError
from tf_lightning.shapes.world import (
    BACKGROUND,
    COLORS,
    IMAGE_SIZE,
    RADII,
    SHAPES,
    Meaning,
    Object,
    Scene,
    coverage,
)

# Distance from the background in RGB; that of a pixel half covered by a yellow object is 103.
FOREGROUND = 60.0
MIN_BLOB = 6  # pixels; smaller blobs are ignored
COLOR_TOLERANCE = 60.0  # distance in RGB; the two closest colors are 100 apart
PURITY = 0.9  # smallest share of a blob's interior that has its color
MIN_IOU = 0.85  # smallest overlap of a blob with its fitted shape
MIN_LEAD = 0.02  # smallest lead of this overlap over that of the second best shape
RADIUS_SLACK = 1.5  # pixels by which a radius may be outside RADII
MAX_SHIFT = 2.0  # maximum shift or growth, in pixels, of an unedited object

PALETTE = np.float32([BACKGROUND, *COLORS.values()])
NEIGHBORS = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Reading:
    """Objects in an image, and the number of blobs that are not objects of the world.

    `meaning` is None unless every blob is readable and there are one or two different objects.
    """

    objects: tuple[Object, ...]
    unreadable: int

    @property
    def meaning(self) -> Meaning | None:
        """Meaning of the image, or None if it has none."""
        kinds = {(thing.shape, thing.color) for thing in self.objects}
        if self.unreadable or not 1 <= len(self.objects) <= 2 or len(kinds) < len(self.objects):
            return None
        return Scene(self.objects).meaning

    def __str__(self) -> str:
        """Return the meaning in words, or a list of the objects and unreadable blobs."""
        if self.meaning:
            return str(self.meaning)
        found = [f"{thing.color} {thing.shape}" for thing in self.objects]
        found += [f"{self.unreadable} unreadable"] if self.unreadable else []
        return ", ".join(found) or "nothing"


def read(image: np.ndarray) -> Reading:
    """Read an image, uint8 (64, 64, 3).

    Raises:
        UserError: the image has another size.
    """
    height, width = image.shape[:2]
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(
            f"an image has {width} x {height} pixels, but the oracle of the shapes world reads "
            f"{IMAGE_SIZE} x {IMAGE_SIZE}; generate images of this size"
        )
    pixels = image.astype(np.float32)
    labels, count = ndimage.label(
        np.linalg.norm(pixels - PALETTE[0], axis=-1) > FOREGROUND, structure=NEIGHBORS
    )
    blobs = [labels == label for label in range(1, count + 1)]
    readings = [_read_blob(pixels, blob) for blob in blobs if blob.sum() >= MIN_BLOB]
    objects = tuple(thing for thing in readings if thing)
    return Reading(objects, len(readings) - len(objects))


def carried_out(image: np.ndarray, before: Scene, after: Scene) -> bool:
    """Return whether an image, uint8 (64, 64, 3), shows the scene `before` edited into `after`.

    Its meaning must be that of `after`, and unchanged objects must keep their position and size
    within MAX_SHIFT pixels.
    """
    reading = read(image)
    if reading.meaning != after.meaning:
        return False
    found = {(thing.shape, thing.color): thing for thing in reading.objects}
    kept = [thing for thing in after.objects if thing in before.objects]
    return all(_near(found[thing.shape, thing.color], thing) for thing in kept)


def _near(a: Object, b: Object) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y), abs(a.radius - b.radius)) <= MAX_SHIFT


def _read_blob(pixels: np.ndarray, blob: np.ndarray) -> Object | None:
    color = _read_color(pixels, blob)
    if color is None:
        return None
    # Share of each pixel that the object covers: position of its color between background and
    # object color.
    direction = np.float32(COLORS[color]) - PALETTE[0]
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
        return Object(SHAPES[best], color, x, y, radius)
    return None


def _read_color(pixels: np.ndarray, blob: np.ndarray) -> str | None:
    # Use the interior: edge pixels are mixed with the background, and pale red resembles orange.
    interior = pixels[ndimage.binary_erosion(blob, iterations=2)]  # (M, 3)
    if not len(interior):
        return None
    distances = np.linalg.norm(interior[:, None] - PALETTE, axis=-1)  # (M, colors)
    votes = np.bincount(
        distances.argmin(1), weights=distances.min(1) <= COLOR_TOLERANCE, minlength=len(PALETTE)
    )
    winner = int(votes.argmax())
    if winner == 0 or votes[winner] < PURITY * len(interior):
        return None
    return list(COLORS)[winner - 1]


def _fit(shape: str, covered: np.ndarray) -> tuple[float, float, float]:
    """Compute the (x, y, radius) for which a shape has the area and centroid of `covered`."""
    area = float(covered.sum())
    centers = np.arange(len(covered)) + 0.5
    x, y = float(covered.sum(0) @ centers) / area, float(covered.sum(1) @ centers) / area
    if shape == "circle":
        return x, y, (area / np.pi) ** 0.5
    if shape == "square":
        return x, y, area**0.5 / 2
    radius = (area / 2) ** 0.5
    # The centroid of a triangle is a third of its radius below the center of its box.
    return x, y - radius / 3, radius


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())
