"""The linear patch coder, which maps latents to patch vectors and back.

A patch coder (this one, or `unet.UNetPatchCoder`) has two methods:
    encode(latents, t) -> patches, skips
    decode(hidden, size, skips) -> output
`skips` is a list of tensors (M, ...) that the decoder needs from the encoder. The linear coder has
none, except the embedding of t with `time: adaln`.

Transfusion adds the timestep embedding to the patch vectors. MonoFormer (Sec. 3.1, 4.1) and DiT
(Sec. 3.2) scale and shift by it and use sinusoidal position embeddings. `LinearConfig` has both.

Shapes: M images, C x h x w latents, P patch size, N = (h / P) * (w / P) patches, D model dim. With
a time token, N + 1 vectors represent an image; the first is the time token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.errors import UserError
from tf_lightning.ranges import check_fields

TIMESTEP_DIM = 256  # width of the sinusoidal timestep embedding
MAX_GRID = 64  # rows and columns with an embedding of their own: 512 pixels at f8 and patch size 1
INIT_STD = 0.02  # standard deviation of the output layers with zero_init="input"


@dataclass
class LinearConfig:
    """Options of the linear patch coder; the defaults are Transfusion's.

    Raises:
        UserError: an option is unknown.
    """

    time: Literal["added", "token", "adaln"] = "added"
    """Use of the noise level t. "added": its embedding is added to every patch vector.
    "token": its embedding is an extra position before the patches (MonoFormer's code; needs the
    data's time_token: true). "adaln": it scales and shifts the layer-normalized patch vectors
    before and after the Transformer (MonoFormer's paper)."""
    pos_embed: Literal["learned", "sincos"] = "learned"
    """Position embedding of the patches: learned for rows and columns, or fixed 2-D sinusoids
    (MonoFormer, DiT)."""
    zero_init: Literal["output", "input"] = "output"
    """Layers that are initialized to zero. "output": the coder's output and every scale and shift
    (DiT). "input": the patches' content and the timestep embedding (MonoFormer)."""

    def __post_init__(self) -> None:
        check_fields(self, "linear.")


def has_time_token(config: LinearConfig | None) -> bool:
    """Return whether a time token precedes the patches of each image."""
    return config is not None and config.time == "token"


def check_linear_config(config: LinearConfig, dim: int) -> None:
    """Raise UserError if an option does not fit the model dim D."""
    if config.pos_embed == "sincos" and dim % 4:
        raise UserError(
            f"linear.pos_embed='sincos' needs a multiple of 4 as transformer.dim, which is {dim}; "
            "change it, or use 'learned'"
        )


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(M, C, h, w) -> (M, N, C * P * P), patches in raster order."""
    return F.unfold(latents, patch_size, stride=patch_size).transpose(1, 2)


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """(M, N, C * P * P) -> (M, C, h, w), the inverse of `patchify`; `size` is (h, w)."""
    return F.fold(patches.transpose(1, 2), size, patch_size, stride=patch_size)


def timestep_embedding(t: Tensor, dim: int = TIMESTEP_DIM) -> Tensor:
    """Embed noise levels t (M,) in [0, 1] by sinusoids, (M, dim) fp32.

    The frequencies are 1 .. 1/10,000 over 1000 t, so that 1000 t is a DDPM step (DDPM App. B).
    """
    half = torch.arange(dim // 2, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * half / (dim // 2))
    angles = 1000 * t.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def learned_pos_embed(rows: nn.Embedding, columns: nn.Embedding, height: int, width: int) -> Tensor:
    """Add learned row and column embeddings for a grid of height x width patches, (N, D).

    A side of more than MAX_GRID patches reads the whole table, interpolated to its length.
    """
    sides = (rows.weight, height), (columns.weight, width)
    row, column = (
        table[:side] if side <= len(table) else stretched(table, side / len(table), side)
        for table, side in sides
    )
    return (row.unsqueeze(1) + column).flatten(0, 1)


def stretched(table: Tensor, factor: float, count: int) -> Tensor:
    """Interpolate position embeddings (G, D) for a grid that is `factor` times as fine.

    The patch coder uses it for grids beyond its table, and `InitFrom` for images of another size.

    Patch i of the finer grid has its center at (i + 0.5) / factor - 0.5 of the coarser one. Places
    beyond the ends of the table have the values at the ends.

    Args:
        table: embeddings of G positions.
        factor: patches of the finer grid for each of the coarser one, > 0.
        count: number of positions of the result.

    Returns:
        (count, D).
    """
    centers = (torch.arange(count, device=table.device) + 0.5) / factor - 0.5
    centers = centers.clamp(0, len(table) - 1)
    before = centers.floor().long().clamp(max=max(len(table) - 2, 0))
    after = (before + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[before], table[after], (centers - before).unsqueeze(1).type_as(table))


def sincos_pos_embed(
    height: int, width: int, dim: int, device: torch.device | None = None
) -> Tensor:
    """Embed the positions of a patch grid by 2-D sinusoids (MAE), (N, D) fp32.

    The first half of the channels encodes the column, the second half the row.

    Args:
        height: number of patch rows.
        width: number of patch columns.
        dim: D, a multiple of 4.
        device: device of the result.
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.cat([_sincos(columns, dim // 2), _sincos(rows, dim // 2)], dim=-1)


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of positions (N,) at frequencies 1 .. 1/10,000, (N, dim) fp32."""
    half = torch.arange(dim // 2, device=positions.device)
    angles = positions.float().unsqueeze(-1) * 10_000 ** (-half / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift x (M, N, D) by one vector (M, D) each per image (DiT Sec. 3.2)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift are predicted from the timestep embedding (adaLN).

    Args:
        dim: D.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (M, N, D), timestep embedding (M, D) -> (M, N, D)."""
        shift, scale = self.modulation(time).chunk(2, dim=-1)  # (M, D) each
        return modulate(self.norm(x), shift, scale)


class LinearPatchCoder(nn.Module):
    """One linear layer from patches to vectors and one back, with timestep and position embedding.

    The paper adds "an embedding of the timestep t to every patch vector" (Transfusion footnote 6).
    A 256 -> D -> D network fits the parameter shares of its Table 7. The learned row and column
    embeddings are our addition: the paper names only the positions in the sequence.

    Args:
        latent_channels: C.
        patch_size: P.
        dim: D.
        out_channels: channels of the output; None for C.
        config: options of time and position embedding; None for the defaults.

    Raises:
        UserError: an option does not fit D.
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
        """Encode noised latents.

        Args:
            latents: x_t, (M, C, h, w).
            t: noise levels, (M,) in [0, 1]; 0 is clean.

        Returns:
            Patch vectors (M, N, D), and the skips of `decode`.
        """
        patches = self.patch_encoder(patchify(latents, self.patch_size)) + self._pos_embed(latents)
        time = self.time_embedder(timestep_embedding(t).type_as(latents))  # (M, D)
        if self.config.time == "token":
            return torch.cat([time.unsqueeze(1), patches], dim=1), []  # (M, 1 + N, D)
        if self.config.time == "adaln":
            return self.input_norm(patches, time), [time]
        return patches + time.unsqueeze(1), []

    def _pos_embed(self, latents: Tensor) -> Tensor:
        """Return the position embedding of latents (M, C, h, w), (N, D)."""
        height, width = (side // self.patch_size for side in latents.shape[-2:])
        if self.config.pos_embed == "sincos":
            dim = self.patch_encoder.out_features
            return sincos_pos_embed(height, width, dim, latents.device).type_as(latents)
        return learned_pos_embed(self.row_embedding, self.column_embedding, height, width)

    def decode(self, hidden: Tensor, size: tuple[int, int], skips: Sequence[Tensor] = ()) -> Tensor:
        """Decode hidden states to the denoiser's output.

        Args:
            hidden: outputs of the Transformer at the patches, (M, N, D).
            size: (h, w) of the latents.
            skips: skips from `encode` of the same images.

        Returns:
            (M, out_channels, h, w).
        """
        if self.config.time == "token":
            hidden = hidden[:, 1:]  # (M, N, D)
        if self.config.time == "adaln":
            hidden = self.output_norm(hidden, *skips)
        return unpatchify(self.patch_decoder(hidden), self.patch_size, size)

    def reset_parameters(self) -> None:
        """Initialize patch vectors with unit variance and the output with zero.

        Zero is the mean of every target. The position embeddings have a standard deviation of 0.5:
        with the usual 0.02, models learned late where in the image a patch is. With
        `zero_init="input"`, the patches' content and the timestep embedding are zero instead.
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
