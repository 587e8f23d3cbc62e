"""Pictures of the embedded world as tensors."""

import numpy as np
import torch
from torch import Tensor

from tf_lightning.shapes.world import render, scene


def pictures(indices: range, *, split: str = "train", seed: int = 0) -> Tensor:
    """Pictures of the scenes with these indices, (B, 3, 64, 64) in [-1, 1]."""
    images = np.stack([render(scene(seed, index, split=split)) for index in indices])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
