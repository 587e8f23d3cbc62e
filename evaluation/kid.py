"""Kernel distance between extracted features; torch-fidelity does the arithmetic.

Shapes: N images of all ranks, F features.
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

from evaluation.features import Extractor, Features, extractor_facts
from evaluation.gather import all_rows, canonical_order, fill_if_empty
from evaluation.reference import Facts, Reference


class KID(Metric):
    """Unbiased squared MMD between features under a cubic kernel (Binkowski 2018).

    Lower is better. The value is about 0 for equal distributions and may be negative. Unlike FID,
    its expectation does not depend on the number of images. Features are compared in float64.

    Args:
        extractor: network that the features come from; this metric does not run it.
        name: name of the metric in logs.
        reference: file of the real images' features. It is read if it exists, and written by
            `keep_real` otherwise. None: keep them in memory.
        real_facts: facts about the real images, such as dataset, count and resize; an existing
            reference file must have the same facts.
        subsets: number of random subsets that the value is averaged over.
        subset_size: real and generated images in a subset; at most the number of each.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        extractor: Extractor,
        name: str = "kid",
        reference: str | Path | None = None,
        real_facts: Facts | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
    ):
        super().__init__()
        self.name = name
        self.options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": 2020}
        facts = {"metric": "kid", **extractor_facts(extractor), **(real_facts or {})}
        self.reference = Reference(reference, facts)
        self.num_features = extractor.num_features
        self.add_state("real_features", [], "cat")
        self.add_state("generated_features", [], "cat")
        self.found: dict[str, int | float] = {}

    def update(self, features: Features, real: bool) -> None:
        """Add features of real or generated images."""
        (self.real_features if real else self.generated_features).append(features.pooled)

    def sync(self, *args, **kwargs) -> None:
        """Gather the features of all ranks."""
        for rows in (self.real_features, self.generated_features):
            fill_if_empty(rows, torch.zeros(0, self.num_features, device=self.device))
        super().sync(*args, **kwargs)

    def keep_real(self) -> None:
        """Fix the features of the real images added so far on all ranks; write the reference."""
        with self.sync_context():
            features = all_rows(self.real_features)
        self.reference.keep({"features": features, "count": torch.tensor(len(features))})

    def compute(self) -> Tensor:
        """Return the mean over subsets, a float64 scalar; `protocol` has the standard deviation.

        Raises:
            ValueError: there are fewer real or generated images than a subset has.
        """
        kept = self.reference.statistics
        real = kept["features"] if kept else all_rows(self.real_features)
        generated = all_rows(self.generated_features)
        size = max(2, self.options["kid_subset_size"])
        if min(len(real), len(generated)) < size:
            raise ValueError(
                f"{self.name} was given {len(generated)} generated and {len(real)} real images, "
                f"fewer than a subset of {size}; give it more images or a smaller subset_size"
            )
        both = [canonical_order(features).double() for features in (real, generated)]
        scores = kid_features_to_metric(*both, **self.options, verbose=False)
        spread = {"std_over_subsets": scores[KEY_METRIC_KID_STD]}
        self.found = {"num_real": len(real), "num_generated": len(generated), **spread}
        return torch.tensor(scores[KEY_METRIC_KID_MEAN], dtype=torch.float64)

    @property
    def protocol(self) -> dict:
        """Facts about the metric, and counts and standard deviation at the last `compute`."""
        return {**self.reference.facts, **self.options, **self.found}
