"""CIDEr-D of captions (Vedantam 2015) as the COCO caption evaluation computes it."""

import json
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.bleu import MAX_N, ngrams
from evaluation.gather import all_rows, take_part
from evaluation.ptb import Tokens, tokenized

SIGMA = 6.0  # words; of the penalty on a difference in length

Weights = list[dict[tuple[str, ...], float]]  # for n = 1 to 4, the tf-idf of each n-gram


class CIDEr(Metric):
    """CIDEr-D: tf-idf similarity of a caption to its picture's references (Vedantam 2015).

    Higher is better, from 0 to 10; papers print it times 100. Document frequencies are those of the
    references of all ranks, so the score depends on which pictures are examined together.

    Args:
        name: the metric's name in logs.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, name: str = "cider"):
        super().__init__()
        self.name = name
        self.add_state("written", [], "cat")  # captions and references as UTF-8 bytes of JSON lines
        self.counts: dict[str, int] = {}

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds written captions, each with its picture's reference captions."""
        lines = [json.dumps(pair) + "\n" for pair in tokenized(captions, references)]
        content = list("".join(lines).encode())
        self.written.append(torch.tensor(content, dtype=torch.uint8, device=self.device))

    def sync(self, *args, **kwargs) -> None:
        """Gathers the captions of all ranks."""
        take_part(self.written, torch.zeros(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """The mean over captions, a float64 scalar."""
        lines = bytes(all_rows(self.written).byte().flatten().tolist()).decode().splitlines()
        if not lines:
            raise ValueError(f"{self.name} was given no caption")
        pairs = [json.loads(line) for line in lines]
        self.counts = {"num_captions": len(pairs)}
        scores = cider_d([tokens for tokens, _ in pairs], [others for _, others in pairs])
        return torch.tensor(math.fsum(scores) / len(scores), dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """What the number depends on; the count is that of the last `compute`."""
        how = {"tokenizer": "ptb-like, without Java", "sigma": SIGMA, "scale": 10}
        return {"metric": "cider-d", **how, **self.counts}


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """The score of each caption against its references (Eq. 4, mean over n)."""
    frequency = Counter()  # in how many pictures' references an n-gram occurs
    for others in references:
        frequency.update(
            {gram for other in others for n in range(1, MAX_N + 1) for gram in ngrams(other, n)}
        )
    scores = []
    for caption, others in zip(captions, references, strict=True):
        weights = tf_idf(caption, frequency, len(references))
        similarities = [
            similarity(weights, tf_idf(other, frequency, len(references)))
            * math.exp(-((runs(caption) - runs(other)) ** 2) / (2 * SIGMA**2))
            for other in others
        ]
        scores.append(10 * sum(similarities) / len(others))
    return scores


def tf_idf(tokens: Tokens, frequency: Counter, num_pictures: int) -> Weights:
    """The weight of each n-gram (Eq. 1): its count times log(pictures / pictures that have it)."""
    return [
        {
            gram: count * (math.log(num_pictures) - math.log(max(1, frequency[gram])))
            for gram, count in ngrams(tokens, n).items()
        }
        for n in range(1, MAX_N + 1)
    ]


def similarity(caption: Weights, reference: Weights) -> float:
    """Clipped cosine of two captions' weights, mean over n (Eq. 4 without the penalty)."""
    total = 0.0
    for ours, theirs in zip(caption, reference, strict=True):
        product = sum(
            min(weight, theirs[gram]) * theirs[gram]
            for gram, weight in ours.items()
            if gram in theirs
        )
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        total += product / norm if norm else 0.0
    return total / MAX_N


def runs(tokens: Tokens) -> int:
    """A caption's length as pycocoevalcap has it: its bigrams."""
    return max(0, len(tokens) - 1)
