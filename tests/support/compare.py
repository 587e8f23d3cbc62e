"""Comparison of checkpoints and batches."""

import torch
from torch import Tensor

from tf_lightning.batch import Batch


def bit_equal(a, b) -> bool:
    """Return whether two nested structures of dicts, lists and tensors are equal in every bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(bit_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(bit_equal, a, b))
    return a == b


def same_batch(a: Batch, b: Batch) -> bool:
    """Return whether two batches are equal in every bit."""
    return bit_equal(vars(a), vars(b))
