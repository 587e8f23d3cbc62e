"""Frechet distance between extracted features; torch-fidelity does the arithmetic.

Shapes: B images, F features.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torchmetrics import Metric

from evaluation.features import Extractor, Features, extractor_facts
from evaluation.reference import Facts, Reference


class FID(Metric):
    """Frechet distance between Gaussians fitted to features of real and generated images.

    Lower is better, 0 for equal statistics (Heusel 2017). The value falls with the number of
    images, so only compare values of equal counts.

    Args:
        extractor: network that the features come from; this metric does not run it.
        name: name of the metric in logs.
        reference: file of the real images' mean and covariance. It is read if it exists, and
            written by `keep_real` otherwise. None: keep them in memory.
        real_facts: facts about the real images, such as dataset, count and resize; an existing
            reference file must have the same facts.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        extractor: Extractor,
        name: str = "fid",
        reference: str | Path | None = None,
        real_facts: Facts | None = None,
    ):
        super().__init__()
        self.name = name
        facts = {"metric": "fid", **extractor_facts(extractor), **(real_facts or {})}
        self.reference = Reference(reference, facts)
        size = extractor.num_features
        for kind in ("real", "generated"):
            self.add_state(f"{kind}_sum", torch.zeros(size).double(), "sum")
            self.add_state(f"{kind}_outer", torch.zeros(size, size).double(), "sum")
            self.add_state(f"{kind}_count", torch.tensor(0), "sum")
        self.counts: dict[str, int] = {}

    def update(self, features: Features, real: bool) -> None:
        """Add features of real or generated images."""
        rows = features.pooled.double()  # (B, F)
        kind = "real" if real else "generated"
        for state, value in (("sum", rows.sum(0)), ("outer", rows.T @ rows), ("count", len(rows))):
            setattr(self, f"{kind}_{state}", getattr(self, f"{kind}_{state}") + value)

    def moments(self, kind: str) -> dict[str, Tensor]:
        """Return mean (F,), unbiased covariance (F, F) and count of "real" or "generated" images.

        Raises:
            ValueError: fewer than two images were added.
        """
        total, outer, count = (getattr(self, f"{kind}_{s}") for s in ("sum", "outer", "count"))
        if count < 2:
            raise ValueError(
                f"{self.name} was given {int(count)} {kind} images but needs at least 2"
            )
        mean = total / count
        covariance = (outer - count * mean.outer(mean)) / (count - 1)
        return {"mean": mean, "covariance": covariance, "count": count}

    def keep_real(self) -> None:
        """Fix the statistics of the real images added so far on all ranks; write the reference."""
        with self.sync_context():
            moments = self.moments("real")
        self.reference.keep(moments)

    def compute(self) -> Tensor:
        """Return the distance, a float64 scalar.

        Raises:
            ValueError: fewer than two real or generated images were added.
        """
        real = self.reference.statistics or self.moments("real")
        generated = self.moments("generated")
        self.counts = {"num_real": int(real["count"]), "num_generated": int(generated["count"])}
        if generated["count"] <= len(generated["mean"]):
            warnings.warn(
                f"{self.name} of {int(generated['count'])} images in {len(generated['mean'])} "
                "dimensions is biased upwards; compare it only with values of the same count",
                stacklevel=2,
            )
        statistics = [
            {"mu": moments["mean"].cpu().numpy(), "sigma": moments["covariance"].cpu().numpy()}
            for moments in (real, generated)
        ]
        distance = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
        return torch.tensor(distance, dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """Facts about extractor and real images, and the counts at the last `compute`."""
        return {**self.reference.facts, **self.counts}
