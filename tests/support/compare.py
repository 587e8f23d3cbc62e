"""Comparison of checkpoints."""

import torch
from torch import Tensor


def bit_equal(a, b) -> bool:
    """Whether two nested structures of dicts, lists and tensors are equal in every bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(bit_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(bit_equal, a, b))
    return a == b
