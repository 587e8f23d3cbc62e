"""Perplexity and bits per byte from sums, exact over batches and ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """exp(sum of nll / sum of tokens); lower is better, 1 is certainty.

    What counts is the caller's: text targets only, no patches, padding or document starts.

    Args:
        name: the metric's name in logs.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, name: str = "perplexity"):
        super().__init__()
        self.name = name
        self.add_state("nll", torch.tensor(0.0).double(), "sum")
        self.add_state("num_tokens", torch.tensor(0), "sum")
        self.add_state("num_bytes", torch.tensor(0), "sum")
        self.counts: dict[str, int] = {}

    def update(self, nll_sum: Tensor | float, num_tokens: int, num_bytes: int = 0) -> None:
        """Adds some text: its summed nll in nats, its tokens, its UTF-8 bytes."""
        self.nll += nll_sum
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes

    def compute(self) -> Tensor:
        """The perplexity, a float64 scalar."""
        if not self.num_tokens:
            raise ValueError(f"{self.name} was given no token; the validation set has no text")
        self.counts = {"num_tokens": int(self.num_tokens), "num_bytes": int(self.num_bytes)}
        return (self.nll / self.num_tokens).exp()

    def bits_per_byte(self) -> Tensor:
        """Sum of nll in bits over bytes, whatever the tokenizer; call it on every rank."""
        with self.sync_context():
            nll, num_bytes = self.nll, self.num_bytes
        if not num_bytes:
            raise ValueError(f"{self.name} was given no number of bytes")
        return nll / math.log(2) / num_bytes

    @property
    def protocol(self) -> dict:
        """What the number depends on; the counts are those of the last `compute`."""
        return {"metric": "perplexity", **self.counts}
