"""Inception Score of logits extracted once; the arithmetic is torch-fidelity's."""

import torch
from torch import Tensor
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)
from torchmetrics import Metric

from evaluation.features import Extractor, Features, facts_of
from evaluation.gather import all_rows, canonical, take_part


class InceptionScore(Metric):
    """exp of the mean KL divergence of p(class | picture) from p(class) (Salimans 2016).

    Higher is better, from 1 to the number of classes; it looks at drawn pictures only.

    Args:
        extractor: what the logits come from; it is not run here.
        name: the metric's name in logs.
        splits: parts whose scores are averaged; at most the number of pictures.

    Raises:
        ValueError: the extractor has no logits.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, extractor: Extractor, name: str = "inception_score", splits: int = 10):
        super().__init__()
        if not extractor.num_classes:
            raise ValueError(f"{extractor.name} has no logits, which {name} needs; use inception")
        self.name, self.splits, self.num_classes = name, splits, extractor.num_classes
        self.facts = {"metric": "inception_score", **facts_of(extractor), "splits": splits}
        self.add_state("logits", [], "cat")
        self.found: dict[str, int | float] = {}

    def update(self, features: Features, real: bool = False) -> None:
        """Adds the logits of some drawn pictures; real ones are passed over."""
        if not real:
            self.logits.append(features.logits)

    def sync(self, *args, **kwargs) -> None:
        """Gathers the logits of all ranks."""
        take_part(self.logits, torch.zeros(0, self.num_classes, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """The mean over splits, a float64 scalar; their spread is in `protocol`."""
        logits = all_rows(self.logits)  # (N, K)
        if len(logits) < self.splits:
            raise ValueError(
                f"{self.name} was given {len(logits)} pictures, fewer than its {self.splits} "
                "splits; give it more or lower splits"
            )
        scores = isc_features_to_metric(canonical(logits).cpu(), self.splits)
        spread = {"std_over_splits": scores[KEY_METRIC_ISC_STD]}
        self.found = {"num_drawn": len(logits), **spread}
        return torch.tensor(scores[KEY_METRIC_ISC_MEAN], dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """What the number depends on; count and spread are those of the last `compute`."""
        return {**self.facts, **self.found}
