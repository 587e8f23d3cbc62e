"""Rotary frequencies of a language model whose context was stretched after its training."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class RopeScaling:
    """Llama 3.1's rule (`rope_type: llama3`): low frequencies are slowed, high ones are kept."""

    factor: float
    """How many times longer the context became."""
    low_freq_factor: float
    """Waves that turn fewer times than this in `original_length` positions are slowed whole."""
    high_freq_factor: float
    """Waves that turn more often are kept; in between, a linear mixture of both."""
    original_length: int
    """Longest document of the training before, in positions."""

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Frequencies (K / 2,) in radians a position, stretched."""
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies
