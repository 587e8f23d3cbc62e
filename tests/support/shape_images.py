"""Scenes of the shapes world by index, and their images as tensors."""

import numpy as np
import torch
from torch import Tensor

from tf_lightning.shapes.world import Scene, Split, draw_scene, generator, render


def scene(
    seed: int, index: int, num_objects: int | None = None, *, split: Split = "train", **options
) -> Scene:
    """Scene `index` of a split; the options are those of `draw_scene`."""
    return draw_scene(generator(seed, index, split), num_objects, split=split, **options)


def shape_images(indices: range, *, split: str = "train", seed: int = 0) -> Tensor:
    """Images of the scenes with these indices, (B, 3, 64, 64) in [-1, 1]."""
    images = np.stack([render(scene(seed, index, split=split)) for index in indices])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
