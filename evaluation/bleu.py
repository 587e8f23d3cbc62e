"""BLEU-4 of captions as the COCO caption evaluation computes it."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.ptb import Tokens, tokenize_all

MAX_N = 4
# pycocoevalcap's constants: they avoid a division by zero, and scores without a match round to 0.
SMALL, TINY = 1e-9, 1e-15


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """Count each n-gram of a caption."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


class BLEU4(Metric):
    """Geometric mean of clipped 1- to 4-gram precisions times brevity penalty (Papineni 2002).

    Higher is better, from 0 to 1. Counts are summed over the corpus. The reference length of a
    caption is that of the reference closest in length.

    Args:
        name: name of the metric in logs.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, name: str = "bleu4"):
        super().__init__()
        self.name = name
        for state in ("matched", "proposed"):
            self.add_state(state, torch.zeros(MAX_N, dtype=torch.long), "sum")
        for state in ("length", "reference_length", "count"):
            self.add_state(state, torch.tensor(0), "sum")
        self.counts: dict[str, int] = {}

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add generated captions, each with the reference captions of its image."""
        for tokens, others in tokenize_all(captions, references):
            self._count(tokens, others)

    def _count(self, tokens: Tokens, references: list[Tokens]) -> None:
        for n in range(1, MAX_N + 1):
            allowed = Counter()
            for reference in references:
                allowed |= ngrams(reference, n)
            found = ngrams(tokens, n)
            self.matched[n - 1] += (found & allowed).total()
            self.proposed[n - 1] += found.total()
        self.length += len(tokens)
        # If two references are equally close in length, the shorter one counts.
        self.reference_length += min((abs(len(r) - len(tokens)), len(r)) for r in references)[1]
        self.count += 1

    def compute(self) -> Tensor:
        """Return the score, a float64 scalar.

        Raises:
            ValueError: no caption was added.
        """
        if not self.count:
            raise ValueError(f"{self.name} was given no caption; give it at least one")
        self.counts = {"num_captions": int(self.count)}
        precisions = (self.matched.double() + TINY) / (self.proposed + SMALL)
        ratio = (self.length.double() + TINY) / (self.reference_length + SMALL)
        return precisions.log().mean().exp() * (1 - 1 / ratio).clamp(max=0).exp()

    @property
    def protocol(self) -> dict:
        """Settings of the metric, and the number of captions at the last `compute`."""
        return {"metric": "bleu4", "tokenizer": "ptb-like, without Java", **self.counts}
