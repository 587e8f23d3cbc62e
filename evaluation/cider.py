"""CIDEr-D of captions (Vedantam 2015) as the COCO caption evaluation computes it."""

import json
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.bleu import MAX_N, ngrams
from evaluation.gather import all_rows, fill_if_empty
from evaluation.ptb import Tokens, tokenize_all

SIGMA = 6.0  # words; standard deviation of the Gaussian length penalty

Weights = list[dict[tuple[str, ...], float]]  # for n = 1 to 4, the tf-idf weight of each n-gram


class CIDEr(Metric):
    """CIDEr-D: tf-idf similarity between a caption and the references of its image (Vedantam 2015).

    Higher is better, from 0 to 10; papers multiply it by 100. Document frequencies come from the
    references of all ranks, so the score depends on which images are evaluated together.

    Args:
        name: name of the metric in logs.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, name: str = "cider"):
        super().__init__()
        self.name = name
        # Captions and references as the UTF-8 bytes of JSON lines: ranks can gather tensors only.
        self.add_state("encoded", [], "cat")
        self.counts: dict[str, int] = {}

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add generated captions, each with the reference captions of its image."""
        lines = [json.dumps(pair) + "\n" for pair in tokenize_all(captions, references)]
        content = list("".join(lines).encode())
        self.encoded.append(torch.tensor(content, dtype=torch.uint8, device=self.device))

    def sync(self, *args, **kwargs) -> None:
        """Gather the captions of all ranks."""
        fill_if_empty(self.encoded, torch.zeros(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Return the mean score over all captions, a float64 scalar.

        Raises:
            ValueError: no caption was added.
        """
        lines = bytes(all_rows(self.encoded).byte().flatten().tolist()).decode().splitlines()
        if not lines:
            raise ValueError(f"{self.name} was given no caption; give it at least one")
        pairs = [json.loads(line) for line in lines]
        self.counts = {"num_captions": len(pairs)}
        scores = cider_d([tokens for tokens, _ in pairs], [others for _, others in pairs])
        return torch.tensor(math.fsum(scores) / len(scores), dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """Settings of the metric, and the number of captions at the last `compute`."""
        settings = {"tokenizer": "ptb-like, without Java", "sigma": SIGMA, "scale": 10}
        return {"metric": "cider-d", **settings, **self.counts}


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Score each caption against its references (Eq. 4, mean over n)."""
    frequency = Counter()  # number of images whose references contain an n-gram
    for others in references:
        frequency.update(
            {gram for other in others for n in range(1, MAX_N + 1) for gram in ngrams(other, n)}
        )
    scores = []
    for caption, others in zip(captions, references, strict=True):
        weights = tf_idf(caption, frequency, len(references))
        similarities = [
            similarity(weights, tf_idf(other, frequency, len(references)))
            * math.exp(-((num_bigrams(caption) - num_bigrams(other)) ** 2) / (2 * SIGMA**2))
            for other in others
        ]
        scores.append(10 * sum(similarities) / len(others))
    return scores


def tf_idf(tokens: Tokens, frequency: Counter, num_images: int) -> Weights:
    """Weight each n-gram by its count times log(images / images that contain it) (Eq. 1)."""
    return [
        {
            gram: count * (math.log(num_images) - math.log(max(1, frequency[gram])))
            for gram, count in ngrams(tokens, n).items()
        }
        for n in range(1, MAX_N + 1)
    ]


def similarity(caption: Weights, reference: Weights) -> float:
    """Clipped cosine similarity of two captions' weights, mean over n (Eq. 4 without penalty)."""
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


def num_bigrams(tokens: Tokens) -> int:
    """Count the bigrams of a caption, which pycocoevalcap uses as its length."""
    return max(0, len(tokens) - 1)
