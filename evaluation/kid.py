"""Kernel distance of features extracted once; the arithmetic is torch-fidelity's.

Shapes: B pictures, N of all ranks, F features.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torchmetrics import Metric

from evaluation.features import Extractor, Features, facts_of
from evaluation.gather import all_rows, canonical, take_part
from evaluation.reference import Facts, Reference


class KID(Metric):
    """Unbiased squared MMD between features under a cubic kernel (Binkowski 2018).

    Lower is better, about 0 for equal distributions (it may be negative); unlike FID its
    expectation does not depend on the count. Features are
    kept as they come and compared in float64.

    Args:
        extractor: what the features come from; it is not run here.
        name: the metric's name in logs.
        reference: file of the real pictures' features, read if it exists, else written by
            `keep_real`.
        about: what the real pictures are, such as dataset, count and resize; a file must agree.
        subsets: random subsets averaged over.
        subset_size: pictures of each kind in a subset; at most as many as there are.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        extractor: Extractor,
        name: str = "kid",
        reference: str | Path | None = None,
        about: Facts | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
    ):
        super().__init__()
        self.name = name
        self.how = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": 2020}
        facts = {"metric": "kid", **facts_of(extractor), **(about or {})}
        self.reference = Reference(reference, facts)
        self.num_features = extractor.num_features
        self.add_state("real_features", [], "cat")
        self.add_state("drawn_features", [], "cat")
        self.found: dict[str, int | float] = {}

    def update(self, features: Features, real: bool) -> None:
        """Adds the features of some pictures, real or drawn."""
        (self.real_features if real else self.drawn_features).append(features.pooled)

    def sync(self, *args, **kwargs) -> None:
        """Gathers the features of all ranks."""
        for kept in (self.real_features, self.drawn_features):
            take_part(kept, torch.zeros(0, self.num_features, device=self.device))
        super().sync(*args, **kwargs)

    def keep_real(self) -> None:
        """Fixes the real pictures to those added so far, on all ranks; writes the reference."""
        with self.sync_context():
            features = all_rows(self.real_features)
        self.reference.keep({"features": features, "count": torch.tensor(len(features))})

    def compute(self) -> Tensor:
        """The mean over subsets, a float64 scalar; their spread is in `protocol`."""
        fixed = self.reference.statistics
        real = fixed["features"] if fixed else all_rows(self.real_features)
        drawn = all_rows(self.drawn_features)
        size = max(2, self.how["kid_subset_size"])
        if min(len(real), len(drawn)) < size:
            raise ValueError(
                f"{self.name} was given {len(drawn)} drawn and {len(real)} real pictures, fewer "
                f"than a subset of {size}; give it more or a smaller subset_size"
            )
        both = [canonical(features).double() for features in (real, drawn)]
        scores = kid_features_to_metric(*both, **self.how, verbose=False)
        spread = {"std_over_subsets": scores[KEY_METRIC_KID_STD]}
        self.found = {"num_real": len(real), "num_drawn": len(drawn), **spread}
        return torch.tensor(scores[KEY_METRIC_KID_MEAN], dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """What the number depends on; counts and spread are those of the last `compute`."""
        return {**self.reference.facts, **self.how, **self.found}
