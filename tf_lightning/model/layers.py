"""RMSNorm and the rotary embedding with derivatives written out, for CPUs.

There PyTorch takes RMSNorm apart, and autograd both: a dozen passes over memory, in a small model a
fifth of a step. On a GPU PyTorch's own are used.

Shapes: (..., D) vectors, (..., H, K) heads.

Rotary frequencies of a language model whose context was stretched after its training.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class RMSNormFunction(torch.autograd.Function):
    """y = w x / r with r^2 = mean(x^2) + eps; dx = (w dy - x mean(w dy x) / r^2) / r."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., D), (D,) -> (..., D)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / r
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of x and of the weight."""
        x, weight, scale = ctx.saved_tensors
        exact = weight.to(scale.dtype)
        products = (grad * x).flatten(0, -2).to(scale.dtype)  # (rows, D)
        means = torch.mv(products, exact).view_as(scale).div_(x.shape[-1])
        grad_weight = torch.mv(products.T, scale.flatten())
        grad_x = (grad * exact).addcmul_(x, means.mul_(scale.square()), value=-1)
        return grad_x.mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    """PyTorch's, faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if x.is_cuda:
            return super().forward(x)
        return RMSNormFunction.apply(x, self.weight, self.eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """x (..., H, K) rotated by angles of which cos and signed sin (..., 1, K) are given."""
    turned = (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin, value=sign)
    return turned.type_as(x)


class RotateFunction(torch.autograd.Function):
    """A rotation, whose derivative is the rotation back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(..., H, K), (..., 1, K), (..., 1, K) -> (..., H, K)."""
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of x alone."""
        return turn(grad, *ctx.saved_tensors, sign=-1), None, None


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., H, K) by cos, sin (..., 1, K) (RoFormer Eq. 34), in fp32."""
    return turn(x, cos, sin) if x.is_cuda else RotateFunction.apply(x, cos, sin)


@dataclass
class RopeScaling:
    """Llama 3.1's rule (`rope_type: llama3`): low frequencies are slowed, high ones are kept."""

    factor: float
    """How many times longer the context became."""
    low_freq_factor: float
    """Waves that turn fewer times than this in `original_length` positions are slowed whole."""
    high_freq_factor: float
    """Waves that turn more often are kept; in between, a linear mixture of both."""
    original_length: int
    """Longest document of the training before, in positions."""

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Frequencies (K / 2,) in radians a position, stretched."""
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies
