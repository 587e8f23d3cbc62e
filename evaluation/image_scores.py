"""One pass of the extractor over the pictures, whose features several metrics share."""

from collections.abc import Sequence

from torch import Tensor, nn

from evaluation.features import Extractor, as_uint8
from evaluation.fid import FID
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID


class ImageScores(nn.Module):
    """Extracts each batch's features once and gives them to every metric.

    For a new validation `reset` the scores; the real pictures stay once `keep_real` was called.

    Args:
        extractor: network of all the metrics.
        metrics: FID, KID and InceptionScore of this extractor, with different names.
    """

    def __init__(self, extractor: Extractor, metrics: Sequence[FID | KID | InceptionScore]):
        super().__init__()
        self.extractor = extractor
        self.metrics = nn.ModuleList(metrics)

    def update(self, images: Tensor, real: bool) -> None:
        """Adds pictures: uint8 (B, 3, H, W), or floats in [-1, 1].

        Raises:
            ValueError: pictures or features that are not finite.
        """
        features = self.extractor(as_uint8(images))
        if not features.pooled.isfinite().all():
            raise ValueError(f"{self.extractor.name} gave NaN or infinity; its weights are broken")
        for metric in self.metrics:
            metric.update(features, real=real)

    @property
    def needs_real(self) -> bool:
        """Whether real pictures must still be added, and kept, before `compute`."""
        return any(metric.reference.statistics is None for metric in self.against_real)

    @property
    def against_real(self) -> list[FID | KID]:
        """The metrics that compare with real pictures."""
        return [metric for metric in self.metrics if not isinstance(metric, InceptionScore)]

    def keep_real(self) -> None:
        """Fixes the real pictures added so far and writes the references' files; on every rank."""
        for metric in self.against_real:
            metric.keep_real()

    def compute(self) -> dict[str, float]:
        """Every metric's value over all ranks, by its name."""
        return {metric.name: float(metric.compute()) for metric in self.metrics}

    def reset(self) -> None:
        """Forgets the drawn pictures, and real ones not kept."""
        for metric in self.metrics:
            metric.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """Every metric's protocol by its name."""
        return {metric.name: metric.protocol for metric in self.metrics}
