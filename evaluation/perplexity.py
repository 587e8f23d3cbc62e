"""Perplexity and bits per byte from sums, exact over batches and ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """How well text is foretold; lower is better.

    perplexity = exp(sum of nll / number of tokens): 1 is certainty; it depends on the tokenizer.
    bits_per_byte = sum of nll / ln 2 / number of UTF-8 bytes: 0 is certainty, and models of
    different tokenizers compare.

    What counts is the caller's: the same text targets in all three sums.

    Args:
        name: the text's name in messages.
        options: torchmetrics' own, such as `sync_on_compute`.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, name: str = "text", **options):
        super().__init__(**options)
        self.name = name
        self.add_state("nll", torch.tensor(0.0).double(), "sum")
        self.add_state("num_tokens", torch.tensor(0), "sum")
        self.add_state("num_bytes", torch.tensor(0), "sum")
        self.counts: dict[str, int] = {}

    def update(self, nll: Tensor, num_bytes: Tensor | int = 0) -> None:
        """Adds some text.

        Args:
            nll: -log p of each token in nats, (K,).
            num_bytes: UTF-8 bytes of the tokens together.
        """
        self.nll += nll.double().sum()
        self.num_tokens += len(nll)
        self.num_bytes += num_bytes

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars: `perplexity`, and `bits_per_byte` where bytes were given.

        Raises:
            ValueError: there was no token.
        """
        if not self.num_tokens:
            raise ValueError(f"{self.name} has no token to foretell; give text to validate on")
        self.counts = {"num_tokens": int(self.num_tokens), "num_bytes": int(self.num_bytes)}
        found = {"perplexity": (self.nll / self.num_tokens).exp()}
        if self.num_bytes:
            found["bits_per_byte"] = self.nll / math.log(2) / self.num_bytes
        return found

    @property
    def protocol(self) -> dict[str, int]:
        """The counts of the last `compute`."""
        return self.counts
