"""Images of several sizes in one batch: those of a size stand together and are computed together.

Shapes: M images, M' clean copies of some of them, C x h x w latents of an image, C x H x W of all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Size(NamedTuple):
    """How many images of a batch have one size, and how many clean copies of these there are."""

    images: int
    copies: int
    height: int
    width: int


def sizes_of(images: list[Tensor], copied: list[int]) -> tuple[list[Size], Tensor, Tensor]:
    """The sizes of a batch's images, and the order in which those of a size stand together.

    Args:
        images: as they are read, each (C, h, w).
        copied: which of them a clean copy follows, in that order.

    Returns:
        The sizes, smallest first; which image, or from M on which copy, comes at each place of that
        order, (M + M',); and for each place when its patches have their turn, (M + M',): size by
        size, of each first the images, then the copies.
    """
    shapes = [tuple(image.shape[-2:]) for image in images]
    found = sorted(set(shapes))
    which = torch.tensor([found.index(shape) for shape in shapes], dtype=torch.long)
    which_copied = which[torch.tensor(copied, dtype=torch.long)]
    order = [which.argsort(stable=True), len(images) + which_copied.argsort(stable=True)]
    turns = torch.cat([2 * which.sort().values, 2 * which_copied.sort().values + 1])
    counts = [torch.bincount(x, minlength=len(found)).tolist() for x in (which, which_copied)]
    sizes = [Size(*count, *shape) for *count, shape in zip(*counts, found, strict=True)]
    return sizes, torch.cat(order), turns


def renumber(ids: Tensor, order: Tensor) -> Tensor:
    """Numbers of images and copies, as places in `order`; -1 stays what it is."""
    places = torch.cat([order.argsort(), torch.tensor([-1])])  # what stands last is found at -1
    return places[ids]


def stack(images: list[Tensor], order: Tensor) -> Tensor:
    """Images (C, h, w) in an order, (M, C, H, W), zeros below and to the right of smaller ones."""
    if not images:
        return torch.empty(0, 1, 1, 1)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack([pad(images[place], height, width) for place in order.tolist()])


def pad(images: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) -> (..., H, W)."""
    if images.shape[-2:] == (height, width):
        return images
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def split(values: Tensor, sizes: list[Size]) -> list[Tensor]:
    """Values of the images, (M, ...), of those of each size; all as one where there are none."""
    return list(values.split([size.images for size in sizes])) if sizes else [values]


def by_size(images: Tensor, sizes: list[Size]) -> list[Tensor]:
    """Padded images (M, C, H, W) -> those of each size, (m, C, h, w)."""
    if not sizes:
        return [images]
    parts = zip(split(images, sizes), sizes, strict=True)
    return [part[..., : size.height, : size.width] for part, size in parts]
