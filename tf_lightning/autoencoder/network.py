"""The autoencoder's network: diffusers' `AutoencoderKL`, or `VQModel` with the same layers.

Shapes: B pictures of H x W pixels, C latent channels of h = H / downsample by w = W / downsample.

Which codes of a VQ are in use, and new places for those that are not.

A quantiser moves only the codes that it picks; the others stay where they began, far from what the
encoder says, for ever. So a code that was long idle is put where the encoder is (random restarts:
Jukebox, Dhariwal 2020, Sec. 3.1). At the start all are: the codebook begins with the first batch.

An autoencoder made into a folder that diffusers and `data.autoencoder` load.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tf_lightning.diffusion.timesteps import row_generator
from tf_lightning.errors import UserError


@dataclass
class AutoencoderConfig:
    """Sizes of an autoencoder; the defaults are the paper's class, 84 M weights, f8 (App. A).

    Attributes:
        channels: at each resolution, from the pictures' on; each but the first halves the side.
        layers_per_block: residual blocks of the encoder at each resolution; the decoder has one
            more.
        latent_channels: C of the latents; of a VQ, what the codes are projected from and to.
        norm_groups: of group norm; has to divide every number of channels.
        mid_attention: one attention layer at the lowest resolution of each half.
        num_codes: None: a VAE; else a VQ with so many codes (paper: 16,384).
        code_dim: dimensions of a code (paper: 8).
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 8
    norm_groups: int = 32
    mid_attention: bool = True
    num_codes: int | None = None
    code_dim: int = 8

    def __post_init__(self) -> None:
        wrong = [width for width in self.channels if width % self.norm_groups]
        if wrong or not self.channels:
            raise UserError(
                f"channels={list(self.channels)} do not divide into norm_groups={self.norm_groups};"
                " give multiples of it"
            )
        if self.num_codes is not None and self.num_codes < 2:
            raise UserError(f"num_codes={self.num_codes} is no codebook; give 2 or more, or null")

    @property
    def downsample(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(self.channels) - 1)


torch.serialization.add_safe_globals([AutoencoderConfig])


def build_network(config: AutoencoderConfig, image_size: int = 256) -> nn.Module:
    """A new diffusers model; `image_size` only tells others what it was trained on."""
    from diffusers import AutoencoderKL, VQModel  # takes seconds

    sizes = {
        "sample_size": image_size,
        "block_out_channels": tuple(config.channels),
        "down_block_types": ("DownEncoderBlock2D",) * len(config.channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
    }
    if config.num_codes is None:
        network = AutoencoderKL(**sizes)
    else:
        network = VQModel(**sizes, num_vq_embeddings=config.num_codes, vq_embed_dim=config.code_dim)
        network.quantize.legacy = False  # else 0.25 is the codebook's weight, not the commitment's
    return network.to(memory_format=torch.channels_last)


class Posterior(NamedTuple):
    """What a VAE's encoder says of pictures: independent normal distributions."""

    mean: Tensor  # (B, C, h, w)
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents of standard normal noise."""
        return self.mean + (0.5 * self.logvar).exp() * noise


def at_least_float32(values: Tensor) -> Tensor:
    """What losses are computed in: half precision is lifted, double stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def encode_posterior(network: nn.Module, images: Tensor) -> Posterior:
    """The posterior of pictures (B, 3, H, W) in [-1, 1]."""
    posterior = network.encode(images).latent_dist
    return Posterior(at_least_float32(posterior.mean), at_least_float32(posterior.logvar))


class Quantized(NamedTuple):
    """What a VQ's encoder says of pictures."""

    latents: Tensor  # (B, code_dim, h, w) codes, straight-through to the encoder
    loss: Tensor  # |sg(z) - e|^2 + 0.25 |z - sg(e)|^2, means over elements
    ids: Tensor  # (B, h, w)


def project(network: nn.Module, images: Tensor) -> Tensor:
    """What a VQ's encoder says of pictures (B, 3, H, W), before quantising: (B, code_dim, h, w)."""
    return at_least_float32(network.encode(images).latents)


def quantize(network: nn.Module, projected: Tensor) -> Quantized:
    """The nearest codes of (B, code_dim, h, w)."""
    with torch.autocast(projected.device.type, enabled=False):  # distances, in full precision
        latents, loss, (_, _, ids) = network.quantize(projected)
    return Quantized(latents, loss, ids.view(len(projected), *projected.shape[2:]))


def decode(network: nn.Module, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), not clipped, of latents or of codes' vectors."""
    latents = latents.contiguous(memory_format=torch.channels_last)
    known = {"force_not_quantize": True} if hasattr(network, "quantize") else {}
    return at_least_float32(network.decode(latents, **known).sample)


def row_noise(like: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers of pictures that depend on (seed, row) alone, whichever rank has the row.

    Args:
        like: latents, (B, C, h, w).
        rows: the pictures' places in the stream, (B,).
        seed: of the run.

    Returns:
        Two standard normal noises like the latents, and a uniform share in [0, 1), (B,).
    """
    drawn = []
    for row in rows.tolist():
        generator = row_generator(seed, row)
        both = torch.randn(2, *like.shape[1:], generator=generator)
        drawn.append((both, torch.rand((), generator=generator)))
    both, share = (torch.stack(parts).to(like.device) for parts in zip(*drawn, strict=True))
    return both[:, 0], both[:, 1], share


def blur(mean: Tensor, latents: Tensor, strength: Tensor, noise: Tensor) -> Tensor:
    """Latents with noise on top, so that the decoder mends imperfect ones.

    A diffusion model's latents are never exact; a decoder that has only seen exact ones draws
    their errors (noise-augmented decoding: Diffusion Transformers with Representation Autoencoders,
    Sec. 4.3).

    Args:
        mean: of the posterior, (B, C, h, w), whose spread over a channel is the noise's unit.
        latents: samples of it.
        strength: of each picture, (B,), in those units.
        noise: standard normal, like `mean`.
    """
    spread = mean.detach().std((0, 2, 3), keepdim=True)
    return latents + strength.view(-1, 1, 1, 1) * spread * noise


class CodebookUse(nn.Module):
    """Steps since each code was last picked; a buffer, so that a resumed run knows them.

    Args:
        num_codes: of the codebook.
        dead_after: steps without use after which a code is dead.
    """

    def __init__(self, num_codes: int, dead_after: int):
        super().__init__()
        self.dead_after = dead_after
        self.register_buffer("idle", torch.full((num_codes,), dead_after))

    @property
    def dead(self) -> Tensor:
        """Which codes are dead, (num_codes,) bool."""
        return self.idle >= self.dead_after

    def count(self, counts: Tensor) -> None:
        """One step more, in which the codes were picked so often, (num_codes,), on all ranks."""
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))

    @torch.no_grad()
    def restart(self, codebook: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
        """Puts the dead codes where randomly chosen vectors are, in place.

        Args:
            codebook: (num_codes, D).
            vectors: what the encoder says, (N, D); may be fewer than dead codes.
            generator: of the choice, on the CPU.
        """
        places = self.dead.nonzero().flatten()
        if not len(places):
            return
        rounds = -(-len(places) // len(vectors))  # each vector as often as any other, or once more
        order = torch.cat(
            [torch.randperm(len(vectors), generator=generator) for _ in range(rounds)]
        )
        chosen = vectors[order[: len(places)].to(vectors.device)]
        codebook[places] = chosen.to(codebook.dtype)


@torch.no_grad()
def measure_latents(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel of a VAE, as keys of its config.

    Args:
        network: a diffusers AutoencoderKL.
        batches: pictures (B, 3, H, W) in [-1, 1].
    """
    sums = torch.zeros(3, network.config.latent_channels, dtype=torch.float64)
    for images in batches:
        modes = encode_posterior(network, images).mean.double().cpu()
        count = torch.full_like(sums[0], modes[:, 0].numel())
        sums += torch.stack([modes.sum((0, 2, 3)), modes.square().sum((0, 2, 3)), count])
    mean, square = sums[0] / sums[2], sums[1] / sums[2]
    std = ((square - mean.square()) * sums[2] / (sums[2] - 1)).sqrt()
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def save_network(network: nn.Module, folder: Path, report: dict) -> None:
    """Write diffusers' files and report.json, whole or not at all; what is there is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        network.save_pretrained(new)
        (new / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if folder.exists():
            os.rename(folder, Path(scratch) / "old")
        os.rename(new, folder)
        shutil.rmtree(Path(scratch) / "old", ignore_errors=True)
