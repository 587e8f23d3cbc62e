"""The linear patch coder: latents <-> patch vectors, and what an image's noise level adds to them.

A patch coder has `encode(latents, t) -> patches, skips` and `decode(hidden, size, skips)`: `skips`
are tensors (M, ...) that its second half needs of its first; the linear coder has the embedding of
t, and only where it scales and shifts by it.

Shapes: M images, C x h x w latents, P patch size, N = (h / P) * (w / P) patches, D model dim. A
time token is one more position, before the N patches.

How the linear patch coder is told an image's noise level and a patch's place.

Transfusion adds both to the patch vectors; MonoFormer (Sec. 3.1, 4.1) and DiT (Sec. 3.2), whose
choices these are, scale and shift by the one and take sinusoids for the other.

Shapes: M images, N patches, D model dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
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
    pos_embed: Literal["learned", "sincos"] = "learned"
    """A learned row and column embedding, or fixed 2-D sinusoids (MonoFormer, DiT)."""
    zero_init: Literal["output", "input"] = "output"
    """Which end of the image side is silent at the start: its output and every scale and shift
    (DiT), or the patches' content and the noise level (MonoFormer)."""


def has_time_token(config: LinearConfig | None) -> bool:
    """Whether a position for the noise level precedes an image's patches."""
    return config is not None and config.time == "token"


def check_linear_config(config: LinearConfig, dim: int) -> None:
    """Refuse what a linear patch coder has not."""
    choices = {
        "time": ("added", "token", "adaln"),
        "pos_embed": ("learned", "sincos"),
        "zero_init": ("output", "input"),
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise UserError(f"linear.{name}={value!r} must be one of {', '.join(known)}")
    if config.pos_embed == "sincos" and dim % 4:
        raise UserError(
            f"linear.pos_embed='sincos' needs a width that 4 divides and transformer.dim={dim} is "
            "none; change it, or use 'learned'"
        )


def sinusoids(places: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of places (N,) at frequencies 1 .. 1/10,000, as (N, dim), fp32."""
    half = torch.arange(dim // 2, device=places.device)
    angles = places.float().unsqueeze(-1) * 10_000 ** (-half / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_pos_embed(
    height: int, width: int, dim: int, device: torch.device | None = None
) -> Tensor:
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


TIMESTEP_DIM = 256
MAX_GRID = 64  # patches a side of the largest image: 512 pixels at f8, patch size 1


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(M, C, h, w) -> (M, N, C * P * P), patches in raster order."""
    return F.unfold(latents, patch_size, stride=patch_size).transpose(1, 2)


def learned_pos_embed(rows: nn.Embedding, columns: nn.Embedding, height: int, width: int) -> Tensor:
    """The learned place of each patch of a grid, (N, D)."""
    return (rows.weight[:height].unsqueeze(1) + columns.weight[:width]).flatten(0, 1)


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """(M, N, C * P * P) -> (M, C, h, w); the inverse of `patchify`, `size` = (h, w)."""
    return F.fold(patches.transpose(1, 2), size, patch_size, stride=patch_size)


def timestep_embedding(t: Tensor, dim: int = TIMESTEP_DIM) -> Tensor:
    """Sinusoids of noise levels t (M,) in [0, 1], as (M, dim), fp32.

    Frequencies 1 .. 1/10,000 over t * 1000, so that t counts as a DDPM step (DDPM App. B).
    """
    half = torch.arange(dim // 2, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * half / (dim // 2))
    angles = 1000 * t.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LinearPatchCoder(nn.Module):
    """One linear layer in, one out; t and the place in the image are added to the patch vectors.

    The paper adds "an embedding of the timestep t to every patch vector" (footnote 6); a
    256 -> D -> D network fits the parameter shares of its Table 7. The learned row and column
    embedding is ours: the paper names no position beyond the sequence's.

    Args:
        latent_channels: C.
        patch_size: P.
        dim: D.
        out_channels: of the output; None: C.
        config: other ways to tell it the noise level and the place; None: these.

    Raises:
        UserError: there is no such way.
    """

    def __init__(
        self,
        latent_channels: int,
        patch_size: int,
        dim: int,
        out_channels: int | None = None,
        config: LinearConfig | None = None,
    ):
        super().__init__()
        self.config = config or LinearConfig()
        check_linear_config(self.config, dim)
        self.patch_size, self.latent_channels = patch_size, latent_channels
        self.patch_encoder = nn.Linear(latent_channels * patch_size**2, dim)
        self.patch_decoder = nn.Linear(dim, (out_channels or latent_channels) * patch_size**2)
        self.time_embedder = nn.Sequential(
            nn.Linear(TIMESTEP_DIM, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        if self.config.pos_embed == "learned":
            self.row_embedding = nn.Embedding(MAX_GRID, dim)
            self.column_embedding = nn.Embedding(MAX_GRID, dim)
        if self.config.time == "adaln":
            self.input_norm, self.output_norm = AdaptiveNorm(dim), AdaptiveNorm(dim)

    def encode(self, latents: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Latents (M, C, h, w) at noise levels t (M,) -> patch vectors (M, N, D), and skips."""
        patches = self.patch_encoder(patchify(latents, self.patch_size)) + self._pos_embed(latents)
        time = self.time_embedder(timestep_embedding(t).type_as(latents))
        if self.config.time == "token":
            return torch.cat([time.unsqueeze(1), patches], dim=1), []
        if self.config.time == "adaln":
            return self.input_norm(patches, time), [time]
        return patches + time.unsqueeze(1), []

    def _pos_embed(self, latents: Tensor) -> Tensor:
        height, width = (side // self.patch_size for side in latents.shape[-2:])
        if self.config.pos_embed == "sincos":
            dim = self.patch_encoder.out_features
            return sincos_pos_embed(height, width, dim, latents.device).type_as(latents)
        return learned_pos_embed(self.row_embedding, self.column_embedding, height, width)

    def decode(self, hidden: Tensor, size: tuple[int, int], skips: Sequence[Tensor] = ()) -> Tensor:
        """Hidden states (M, N, D) -> the network's output (M, C, h, w), `size` = (h, w)."""
        if self.config.time == "token":
            hidden = hidden[:, 1:]
        if self.config.time == "adaln":
            hidden = self.output_norm(hidden, *skips)
        return unpatchify(self.patch_decoder(hidden), self.patch_size, size)

    def reset_parameters(self) -> None:
        """Unit-variance patch vectors; a zero output, the mean of every target.

        A patch's place is as loud as half its content: at 0.02, the usual for embeddings, models
        learned late what is above and what is left. With `zero_init="input"` the patches' content
        and the noise level are what is zero.
        """
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.5)
        norms = [part for part in self.modules() if isinstance(part, AdaptiveNorm)]
        outputs = [self.patch_decoder, *(norm.modulation[1] for norm in norms)]
        if self.config.zero_init == "output":
            for part in outputs:
                nn.init.zeros_(part.weight)
        else:
            for part in outputs:
                nn.init.normal_(part.weight, std=INIT_STD)
            nn.init.zeros_(self.patch_encoder.weight)
            nn.init.zeros_(self.time_embedder[2].weight)
