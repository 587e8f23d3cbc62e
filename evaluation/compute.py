"""Compute several metrics independently of each other."""

from collections.abc import Sequence

from torchmetrics import Metric


def compute_each(metrics: Sequence[Metric]) -> tuple[dict[str, float], list[str]]:
    """Compute every metric, also if another one cannot be computed.

    Args:
        metrics: metrics with different `name`s.

    Returns:
        The values by name, and the reasons of the metrics without a value.
    """
    values: dict[str, float] = {}
    reasons: list[str] = []
    for metric in metrics:
        try:
            values[metric.name] = float(metric.compute())
        except ValueError as error:
            reasons.append(str(error))
    return values, reasons
