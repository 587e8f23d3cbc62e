"""Perplexity and bits per byte from sums, exact over batches and ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """Perplexity and bits per byte of text under a model; lower is better.

    perplexity = exp(sum of nll / number of tokens). It is at least 1 and depends on the tokenizer.
    bits_per_byte = sum of nll / ln 2 / number of UTF-8 bytes. It is at least 0 and can be compared
    between tokenizers.

    The caller chooses the text targets, and all three sums must use the same ones.

    Args:
        name: name of the text in messages.
        options: options of torchmetrics.Metric, such as `sync_on_compute`.
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
        """Add text targets.

        Args:
            nll: -log p of each token in nats, (K,).
            num_bytes: total number of UTF-8 bytes of the tokens.
        """
        self.nll += nll.double().sum()
        self.num_tokens += len(nll)
        self.num_bytes += num_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return float64 scalars: `perplexity`, and `bits_per_byte` if bytes were counted.

        Raises:
            ValueError: no token was added.
        """
        if not self.num_tokens:
            raise ValueError(f"{self.name} has no text tokens; validate on data with text")
        self.counts = {"num_tokens": int(self.num_tokens), "num_bytes": int(self.num_bytes)}
        found = {"perplexity": (self.nll / self.num_tokens).exp()}
        if self.num_bytes:
            found["bits_per_byte"] = self.nll / math.log(2) / self.num_bytes
        return found

    @property
    def protocol(self) -> dict[str, int]:
        """Counts at the last `compute`."""
        return self.counts
