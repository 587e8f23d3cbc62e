"""Aspect-ratio buckets: image sizes of many shapes and nearly one area.

An image is resized and cropped to the bucket nearest to its aspect ratio, so that little of it is
lost and each image takes about as many patches (NovelAI 2022; SDXL, Podell et al. 2023, Sec. 2.3).
"""

import math
from collections.abc import Iterable

Size = tuple[int, int]
"""Width and height in pixels, as in Pillow."""


def bucket_sizes(image_size: int, multiple: int, max_aspect_ratio: float) -> tuple[Size, ...]:
    """List the buckets around image_size x image_size pixels, the narrowest first.

    The longer side takes every multiple from `image_size` on. The shorter side is the multiple
    that brings the area nearest to image_size**2, so the two areas differ by at most
    `multiple` / 2 times the longer side. Each bucket exists as portrait and as landscape. Few sides
    fit a small square, so the longest bucket may be well below `max_aspect_ratio`: 64 pixels of
    patches of 8 have 112 x 40, which is 2.8, and then 120 x 32, which is 3.75.

    Args:
        image_size: side of the square bucket in pixels, a multiple of `multiple`.
        multiple: pixels that divide both sides: patch size times the autoencoder's downsampling.
        max_aspect_ratio: longer side divided by shorter side at most, >= 1; 1: only the square.
    """
    side = image_size // multiple
    sizes = set()
    for longer in range(side, side**2 + 1):
        shorter = max(1, round(side**2 / longer))
        if longer / shorter > max_aspect_ratio:
            break
        sizes |= {(longer * multiple, shorter * multiple), (shorter * multiple, longer * multiple)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def nearest_size(size: Size, sizes: Iterable[Size]) -> Size:
    """Return the one of `sizes` nearest to `size` in log aspect ratio."""
    return min(sizes, key=lambda other: abs(math.log(size[0] * other[1] / (size[1] * other[0]))))
