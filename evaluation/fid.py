"""Frechet distance of features extracted once; the arithmetic is torch-fidelity's.

Shapes: B pictures, F features.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torchmetrics import Metric

from evaluation.features import Extractor, Features, facts_of
from evaluation.reference import Facts, Reference


class FID(Metric):
    """Frechet distance between Gaussians fitted to real and drawn pictures' features (Heusel 2017).

    Lower is better, 0 for equal statistics. It falls with the number of pictures: compare equal
    counts only.

    Args:
        extractor: what the features come from; it is not run here.
        name: the metric's name in logs.
        reference: file of the real pictures' mean and covariance, read if it exists, else written
            by `keep_real`.
        about: what the real pictures are, such as dataset, count and resize; a file must agree.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        extractor: Extractor,
        name: str = "fid",
        reference: str | Path | None = None,
        about: Facts | None = None,
    ):
        super().__init__()
        self.name = name
        facts = {"metric": "fid", **facts_of(extractor), **(about or {})}
        self.reference = Reference(reference, facts)
        size = extractor.num_features
        for kind in ("real", "drawn"):
            self.add_state(f"{kind}_sum", torch.zeros(size).double(), "sum")
            self.add_state(f"{kind}_outer", torch.zeros(size, size).double(), "sum")
            self.add_state(f"{kind}_count", torch.tensor(0), "sum")
        self.counts: dict[str, int] = {}

    def update(self, features: Features, real: bool) -> None:
        """Adds the features of some pictures, real or drawn."""
        rows = features.pooled.double()  # (B, F)
        kind = "real" if real else "drawn"
        for state, value in (("sum", rows.sum(0)), ("outer", rows.T @ rows), ("count", len(rows))):
            setattr(self, f"{kind}_{state}", getattr(self, f"{kind}_{state}") + value)

    def moments(self, kind: str) -> dict[str, Tensor]:
        """Mean (F,), unbiased covariance (F, F) and count of the "real" or the "drawn" pictures.

        Raises:
            ValueError: fewer than two.
        """
        total, outer, count = (getattr(self, f"{kind}_{s}") for s in ("sum", "outer", "count"))
        if count < 2:
            raise ValueError(
                f"{self.name} was given {int(count)} {kind} pictures and needs at least 2"
            )
        mean = total / count
        covariance = (outer - count * mean.outer(mean)) / (count - 1)
        return {"mean": mean, "covariance": covariance, "count": count}

    def keep_real(self) -> None:
        """Fixes the real pictures to those added so far, on all ranks; writes the reference."""
        with self.sync_context():
            moments = self.moments("real")
        self.reference.keep(moments)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar."""
        real = self.reference.statistics or self.moments("real")
        drawn = self.moments("drawn")
        self.counts = {"num_real": int(real["count"]), "num_drawn": int(drawn["count"])}
        if drawn["count"] <= len(drawn["mean"]):
            warnings.warn(
                f"{self.name} of {int(drawn['count'])} pictures in {len(drawn['mean'])} dimensions "
                "is biased upwards: compare it with the same count only",
                stacklevel=2,
            )
        statistics = [
            {"mu": moments["mean"].cpu().numpy(), "sigma": moments["covariance"].cpu().numpy()}
            for moments in (real, drawn)
        ]
        distance = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
        return torch.tensor(distance, dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """What the number depends on; the counts are those of the last `compute`."""
        return {**self.reference.facts, **self.counts}
