"""Several metrics that share one pass of the extractor over the images."""

from collections.abc import Sequence

from torch import Tensor, nn

from evaluation.compute import compute_each
from evaluation.features import Extractor, as_uint8
from evaluation.fid import FID
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID


class ImageScores(nn.Module):
    """Extracts the features of each batch once and passes them to every metric.

    Call `reset` before a new validation; real images stay once `keep_real` was called.

    Args:
        extractor: network of all metrics.
        metrics: FID, KID and InceptionScore of this extractor, with different names.
    """

    def __init__(self, extractor: Extractor, metrics: Sequence[FID | KID | InceptionScore]):
        super().__init__()
        self.extractor = extractor
        self.metrics = nn.ModuleList(metrics)

    def update(self, images: Tensor, real: bool) -> None:
        """Add real or generated images (B, 3, H, W), uint8 in [0, 255] or float in [-1, 1].

        Raises:
            ValueError: images or features are not finite.
        """
        features = self.extractor(as_uint8(images))
        if not features.pooled.isfinite().all():
            raise ValueError(
                f"{self.extractor.name} computed NaN or infinity; download its weights again"
            )
        for metric in self.metrics:
            metric.update(features, real=real)

    @property
    def needs_real(self) -> bool:
        """Whether real images must be added and kept before `compute`."""
        return any(metric.reference.statistics is None for metric in self.reference_metrics)

    @property
    def reference_metrics(self) -> list[FID | KID]:
        """Metrics that compare with real images."""
        return [metric for metric in self.metrics if not isinstance(metric, InceptionScore)]

    def keep_real(self) -> None:
        """Fix the real images added so far and write the reference files; call on every rank."""
        for metric in self.reference_metrics:
            metric.keep_real()

    def compute(self) -> tuple[dict[str, float], list[str]]:
        """Return the values over all ranks by name, and the reasons of metrics without a value."""
        return compute_each(self.metrics)

    def reset(self) -> None:
        """Remove the generated images, and real images that were not kept."""
        for metric in self.metrics:
            metric.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """Protocol of every metric, by name."""
        return {metric.name: metric.protocol for metric in self.metrics}
