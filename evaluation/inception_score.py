"""Inception Score of extracted logits; torch-fidelity does the arithmetic."""

import torch
from torch import Tensor
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)
from torchmetrics import Metric

from evaluation.features import Extractor, Features, extractor_facts
from evaluation.gather import all_rows, canonical_order, fill_if_empty


class InceptionScore(Metric):
    """Exponential of the mean KL divergence of p(class | image) from p(class) (Salimans 2016).

    Higher is better, from 1 to the number of classes. It uses generated images only.

    Args:
        extractor: network that the logits come from; this metric does not run it.
        name: name of the metric in logs.
        splits: number of parts whose scores are averaged; at most the number of images.

    Raises:
        ValueError: the extractor has no logits.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, extractor: Extractor, name: str = "inception_score", splits: int = 10):
        super().__init__()
        if not extractor.num_classes:
            raise ValueError(
                f"{extractor.name} has no logits but {name} needs them; use the extractor inception"
            )
        self.name, self.splits, self.num_classes = name, splits, extractor.num_classes
        self.facts = {"metric": "inception_score", **extractor_facts(extractor), "splits": splits}
        self.add_state("logits", [], "cat")
        self.found: dict[str, int | float] = {}

    def update(self, features: Features, real: bool = False) -> None:
        """Add the logits of generated images; real images are ignored."""
        if not real:
            self.logits.append(features.logits)

    def sync(self, *args, **kwargs) -> None:
        """Gather the logits of all ranks."""
        fill_if_empty(self.logits, torch.zeros(0, self.num_classes, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Return the mean over splits, a float64 scalar; `protocol` has the standard deviation.

        Raises:
            ValueError: there are fewer images than splits.
        """
        logits = all_rows(self.logits)  # (N, K)
        if len(logits) < self.splits:
            raise ValueError(
                f"{self.name} was given {len(logits)} images, fewer than its {self.splits} "
                "splits; give it more images or lower splits"
            )
        scores = isc_features_to_metric(canonical_order(logits).cpu(), self.splits)
        spread = {"std_over_splits": scores[KEY_METRIC_ISC_STD]}
        self.found = {"num_generated": len(logits), **spread}
        return torch.tensor(scores[KEY_METRIC_ISC_MEAN], dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """Facts about the metric, and count and standard deviation at the last `compute`."""
        return {**self.facts, **self.found}
