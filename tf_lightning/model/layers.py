"""RMSNorm and the rotary embedding, with hand-written derivatives on the CPU.

On a CPU, PyTorch decomposes RMSNorm, and autograd decomposes both: a dozen passes over memory,
which are a fifth of a training step of a small model. On a GPU, PyTorch's own versions are used.

Shapes: (..., D) vectors, (..., H, K) heads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tf_lightning.errors import UserError
from tf_lightning.ranges import Positive, PositiveInt, check_fields


class RMSNormFunction(torch.autograd.Function):
    """y = w x / r with r^2 = mean(x^2) + eps; dx = (w dy - x mean(w dy x) / r^2) / r."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., D), (D,) -> (..., D)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / r, (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of x and of the weight."""
        x, weight, scale = ctx.saved_tensors
        exact = weight.to(scale.dtype)
        products = (grad * x).flatten(0, -2).to(scale.dtype)  # (rows, D)
        means = torch.mv(products, exact).view_as(scale).div_(x.shape[-1])
        grad_weight = torch.mv(products.T, scale.flatten())
        grad_x = (grad * exact).addcmul_(x, means.mul_(scale.square()), value=-1)
        return grad_x.mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm with a faster CPU implementation."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if x.is_cuda:
            return super().forward(x)
        return RMSNormFunction.apply(x, self.weight, self.eps)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding in fp32 (RoFormer Eq. 34, half-split order).

    Args:
        x: queries or keys, (..., H, K).
        cos: cosines of the angles, (..., 1, K).
        sin: sines of the angles, negative in the first half, (..., 1, K).
    """
    return _rotate(x, cos, sin) if x.is_cuda else RotaryFunction.apply(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """Rotate x (..., H, K) by the angles, or by their negatives with sign=-1."""
    rotated = (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin, value=sign)
    return rotated.type_as(x)


class RotaryFunction(torch.autograd.Function):
    """Rotary embedding; its derivative is the rotation by the negative angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(..., H, K), (..., 1, K), (..., 1, K) -> (..., H, K)."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        return _rotate(grad, *ctx.saved_tensors, sign=-1), None, None


@dataclass
class RopeScaling:
    """Rotary frequencies for a longer context."""

    factor: Positive
    """Ratio of the new to the original context length."""
    low_freq_factor: Positive = 1.0
    """Below this number of turns over `original_length`, a frequency is divided by `factor`."""
    high_freq_factor: Positive = 4.0
    """Above this number of turns over `original_length`, a frequency is unchanged."""
    original_length: PositiveInt = 8192
    """Context length of the pretraining in tokens."""
    rope_type: Literal["llama3", "linear"] = "llama3"
    """"llama3" (Llama 3.1): frequencies with few turns over the original context are divided by
    `factor`, those with many turns are unchanged, and those in between are interpolated linearly.
    "linear" (position interpolation): all frequencies are divided by `factor`."""

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be less than "
                f"high_freq_factor={self.high_freq_factor}; Llama 3.1 has 1 and 4"
            )

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Scale frequencies (K / 2,) in radians per position."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies
