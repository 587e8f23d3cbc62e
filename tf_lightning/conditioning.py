"""How the linear patch coder is told an image's noise level and a patch's place.

Transfusion adds both to the patch vectors; MonoFormer (Sec. 3.1, 4.1) and DiT (Sec. 3.2), whose
choices these are, scale and shift by the one and take sinusoids for the other.

Shapes: M images, N patches, D model dim.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tf_lightning.errors import UserError

INIT_STD = 0.02  # of what is not zero where the input is


@dataclass
class LinearConfig:
    """What a linear patch coder does beside its two layers; the defaults are Transfusion's."""

    time: Literal["added", "token", "adaln"] = "added"
    """The noise level is added to every patch vector; or it is a vector of its own before the
    patches (MonoFormer's code; the data's time_token must be true); or it scales and shifts the
    patch vectors before the Transformer and after it, each behind a layer norm (MonoFormer)."""
    place: Literal["learned", "sincos"] = "learned"
    """A learned row and column embedding, or fixed 2-D sinusoids (MonoFormer, DiT)."""
    zero_init: Literal["output", "input"] = "output"
    """Which end of the image side is silent at the start: its output and every scale and shift
    (DiT), or the patches' content and the noise level (MonoFormer)."""


torch.serialization.add_safe_globals([LinearConfig])  # hparams load with weights_only=True


def has_time_token(config: LinearConfig | None) -> bool:
    """Whether a position for the noise level precedes an image's patches."""
    return config is not None and config.time == "token"


def check(config: LinearConfig, dim: int) -> None:
    """Refuse what a linear patch coder has not."""
    choices = {
        "time": ("added", "token", "adaln"),
        "place": ("learned", "sincos"),
        "zero_init": ("output", "input"),
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise UserError(f"linear.{name}={value!r} must be one of {', '.join(known)}")
    if config.place == "sincos" and dim % 4:
        raise UserError(
            f"linear.place='sincos' needs a width that 4 divides and transformer.dim={dim} is "
            "none; change it, or use 'learned'"
        )


def sinusoids(places: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of places (N,) at frequencies 1 .. 1/10,000, as (N, dim), fp32."""
    half = torch.arange(dim // 2, device=places.device)
    angles = places.float().unsqueeze(-1) * 10_000 ** (-half / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_place(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """2-D sinusoids of each patch of a grid, (N, D): half for its column, half for its row (MAE).

    Args:
        height: rows of patches.
        width: columns.
        dim: D, a multiple of 4.
        device: of the result.
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.cat([sinusoids(columns, dim // 2), sinusoids(rows, dim // 2)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (M, N, D) scaled and shifted image by image, both (M, D) (DiT Sec. 3.2)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift are told by the noise level (AdaLN).

    Args:
        dim: D.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (M, N, D) at embedded noise levels time (M, D) -> (M, N, D)."""
        shift, scale = self.modulation(time).chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)
