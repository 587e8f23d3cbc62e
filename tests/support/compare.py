"""Comparison of what runs leave behind."""

import torch
from torch import Tensor


def bit_equal(a, b) -> bool:
    """Equal in every bit, down to the last tensor of nested dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(bit_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(bit_equal, a, b))
    return a == b
