"""Precisions of the trainer, and what depends on them.

Weights, their moving average, noise levels, noise schedules and losses are fp32, or fp64 with
"64-true"; only the network computes in less. With "16-mixed" the trainer multiplies the loss by a
large factor, so that gradients do not vanish in fp16, and divides the gradients by it before they
are clipped.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tf_lightning.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def check_precision(precision: str) -> None:
    """Refuse precisions that round weights, moving averages or noise levels to 16 bits.

    Raises:
        UserError: the precision is not one of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise UserError(
            f"precision={precision} is not supported, because weights, their moving average and "
            f"noise levels need fp32; use {', '.join(PRECISIONS)}"
        )


@contextmanager
def fp32_by_default() -> Iterator[None]:
    """Create tensors in fp32, so that initial weights are the same with every precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def loss_scale(trainer: L.Trainer) -> float:
    """Return the factor of the loss: a power of two under "16-mixed", 1 otherwise."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler else 1.0


def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float | None, algorithm: str | None
) -> Tensor:
    """Clip gradients in place as the trainer's options say.

    Args:
        parameters: whose gradients to clip.
        limit: gradient_clip_val; None or 0: do not clip.
        algorithm: gradient_clip_algorithm. "value" limits the magnitude of each element; "norm", or
            None, the norm of all gradients together.

    Returns:
        The norm of all gradients before clipping, a scalar.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    by_value = algorithm == "value"
    max_norm = float("inf") if by_value else limit or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if by_value and limit and parameters:  # torch refuses an empty list
        torch.nn.utils.clip_grad_value_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP: over all shards
