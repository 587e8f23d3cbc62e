"""Arguments of the data that no run can have."""

from tf_lightning.data.corpus import Source
from tf_lightning.errors import UserError


def check_weights(sources: dict[str, Source], weights: dict[str, float] | None) -> None:
    """UserError unless each source has a weight >= 0 and one is positive."""
    if weights is None:
        return
    if set(weights) != set(sources):
        raise UserError(
            f"weights are given for {sorted(weights)} but the sources are {sorted(sources)}; "
            "give one for each"
        )
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"weights are {weights}; give numbers >= 0, one of them positive")


def check_image_size(name: str, source: Source, pixels: int) -> None:
    """UserError where a source says how large its pictures are and patches do not divide them."""
    side = getattr(source, "image_size", 0)
    if side % pixels:
        raise UserError(
            f"{name}: image_size={side} does not divide into patches of {pixels} pixels; give a "
            f"multiple of {pixels}"
        )


def check_probability(name: str, value: float) -> None:
    """UserError unless a value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value} is not a probability; give a number from 0 to 1")


def check_times(time_shift: float, time_distribution: str) -> None:
    """UserError where noise levels cannot be drawn so."""
    if time_shift <= 0:
        raise UserError(f"time_shift={time_shift} must be above 0; 1 leaves noise levels alone")
    if time_distribution not in ("uniform", "logit_normal"):
        raise UserError(
            f"time_distribution={time_distribution!r} must be 'uniform' or 'logit_normal'"
        )
