"""The trainable autoencoder: diffusers' `AutoencoderKL`, or `VQModel` with the same layers.

In this order: the network and its config, encoding and decoding, the noise of training, the usage
of the codebook, and saving to a folder that diffusers and `data.autoencoder` load.

Shapes: B images of H x W pixels, C latent channels, h = H / downsample, w = W / downsample.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from tf_lightning.autoencoder.statistics import Moments
from tf_lightning.diffusion.timesteps import row_generator
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_folder
from tf_lightning.ranges import PositiveInt, Range, check_fields


@dataclass
class AutoencoderConfig:
    """Sizes of an autoencoder.

    The defaults match the paper's: 84 M parameters, downsampling by 8 (Transfusion App. A).

    Attributes:
        channels: channels at each resolution, from the full resolution down; each entry after the
            first halves the side.
        layers_per_block: residual blocks of the encoder at each resolution; the decoder has one
            more.
        latent_channels: channels C of the latents. In a VQ, the encoder's output channels, which
            are projected to `code_dim` before quantization.
        norm_groups: groups of group norm; must divide every entry of `channels`.
        mid_attention: use one attention layer at the lowest resolution of the encoder and of the
            decoder.
        num_codes: codebook size of a VQ (paper: 16,384); None for a VAE.
        code_dim: dimension of a code (paper: 8).

    Raises:
        UserError: a size is out of its range, or sizes do not fit each other.
    """

    channels: tuple[PositiveInt, ...] = (128, 256, 512, 512)
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 8
    norm_groups: PositiveInt = 32
    mid_attention: bool = True
    num_codes: Annotated[int, Range(ge=2, note="null makes a VAE")] | None = None
    code_dim: PositiveInt = 8

    def __post_init__(self) -> None:
        check_fields(self, "network.")
        wrong = [width for width in self.channels if width % self.norm_groups]
        if wrong or not self.channels:
            raise UserError(
                f"channels={list(self.channels)} must be multiples of "
                f"norm_groups={self.norm_groups}; change one of them"
            )

    @property
    def downsample(self) -> int:
        """Side of a latent in pixels."""
        return 2 ** (len(self.channels) - 1)


def build_autoencoder(config: AutoencoderConfig, image_size: int = 256) -> nn.Module:
    """Build a diffusers model with random weights.

    Args:
        config: sizes.
        image_size: training resolution in pixels, which is only recorded in the model's config.
    """
    from diffusers import AutoencoderKL, VQModel  # imported here because it takes seconds

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
        # With legacy=True, diffusers' 0.25 weighs the codebook loss, not the commitment loss.
        network.quantize.legacy = False
    return network.to(memory_format=torch.channels_last)


class LatentPosterior(NamedTuple):
    """The normal distribution that a VAE's encoder outputs for each latent element."""

    mean: Tensor  # (B, C, h, w)
    logvar: Tensor  # (B, C, h, w)

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents for standard normal noise (B, C, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32 for the losses; keep float32 and float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def encode_posterior(network: nn.Module, images: Tensor) -> LatentPosterior:
    """Return a VAE's posterior of images (B, 3, H, W) in [-1, 1]."""
    posterior = network.encode(images).latent_dist
    return LatentPosterior(at_least_float32(posterior.mean), at_least_float32(posterior.logvar))


class Quantized(NamedTuple):
    """The nearest codes of a VQ's encoder outputs z; e are the code vectors."""

    latents: Tensor  # (B, code_dim, h, w) code vectors, with the straight-through gradient
    loss: Tensor  # |sg(z) - e|^2 + 0.25 |z - sg(e)|^2, means over elements
    ids: Tensor  # (B, h, w) codebook indices


def encode_vq(network: nn.Module, images: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) with a VQ, before quantization, to (B, code_dim, h, w)."""
    return at_least_float32(network.encode(images).latents)


def quantize(network: nn.Module, encoded: Tensor) -> Quantized:
    """Replace encoder outputs (B, code_dim, h, w) by their nearest codes."""
    with torch.autocast(encoded.device.type, enabled=False):  # distances need full precision
        latents, loss, (_, _, ids) = network.quantize(encoded)
    return Quantized(latents, loss, ids.view(len(encoded), *encoded.shape[2:]))


def decode_latents(network: nn.Module, latents: Tensor) -> Tensor:
    """Decode latents or code vectors to images (B, 3, H, W), which are not clipped."""
    latents = latents.contiguous(memory_format=torch.channels_last)
    options = {"force_not_quantize": True} if hasattr(network, "quantize") else {}
    return at_least_float32(network.decode(latents, **options).sample)


def row_noise(like: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random numbers that depend on (seed, row) only, not on the rank of the row.

    Args:
        like: latents, (B, C, h, w).
        rows: positions of the images in the data stream, (B,).
        seed: seed of the run.

    Returns:
        Two standard normal tensors of the latents' shape, and uniform numbers in [0, 1), (B,).
    """
    drawn = []
    for row in rows.tolist():
        generator = row_generator(seed, row)
        noises = torch.randn(2, *like.shape[1:], generator=generator)
        drawn.append((noises, torch.rand((), generator=generator)))
    noises, uniform = (torch.stack(parts).to(like.device) for parts in zip(*drawn, strict=True))
    return noises[:, 0], noises[:, 1], uniform


def channel_std(means: Tensor) -> Tensor:
    """Return the std of each channel, (1, C, 1, 1), of posterior means (B, C, h, w)."""
    return means.detach().std((0, 2, 3), keepdim=True)


def add_latent_noise(latents: Tensor, std: Tensor, strength: Tensor, noise: Tensor) -> Tensor:
    """Add noise to latents, so that the decoder learns to tolerate a diffusion model's errors.

    Noise-augmented decoding: Diffusion Transformers with Representation Autoencoders, Sec. 4.3.

    Args:
        latents: samples of the posterior, (B, C, h, w).
        std: see `channel_std`; of all images of an optimizer step.
        strength: noise of each image, (B,), in units of `std`.
        noise: standard normal, (B, C, h, w).
    """
    return latents + strength.view(-1, 1, 1, 1) * std * noise


class CodebookUsage(nn.Module):
    """Counts the steps since each code was last used, and restarts the codes that are dead.

    The quantizer's loss moves only the codes that are used. An unused code would stay where it was
    initialized, far from the encoder's outputs, so it is moved to one of them (random restarts:
    Jukebox, Dhariwal 2020, Sec. 3.1). All codes are dead at the start, so the codebook is
    initialized from the first batch.

    The counts are a buffer, so that a resumed run continues with them.

    Args:
        num_codes: codebook size.
        dead_after: number of steps without use after which a code is dead.
    """

    def __init__(self, num_codes: int, dead_after: int):
        super().__init__()
        self.dead_after = dead_after
        self.register_buffer("idle", torch.full((num_codes,), dead_after))

    @property
    def dead(self) -> Tensor:
        """Mask of the dead codes, (num_codes,) bool."""
        return self.idle >= self.dead_after

    def update(self, counts: Tensor) -> None:
        """Record one optimizer step.

        Args:
            counts: how often each code was used in this step on all ranks, (num_codes,).
        """
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))

    @torch.no_grad()
    def restart(self, codebook: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
        """Move each dead code to a random encoder output, in place.

        None is moved where an output is not finite: its step is left out, and codes stay.

        Args:
            codebook: code vectors, (num_codes, code_dim).
            vectors: encoder outputs, (N, code_dim); N may be smaller than the number of dead codes.
            generator: CPU generator of the random choice.
        """
        dead = self.dead.nonzero().flatten()
        if not len(dead) or not torch.isfinite(vectors).all():
            return
        # Permutations in a row, so that no vector is chosen twice more than another.
        num_rounds = -(-len(dead) // len(vectors))
        order = torch.cat(
            [torch.randperm(len(vectors), generator=generator) for _ in range(num_rounds)]
        )
        chosen = vectors[order[: len(dead)].to(vectors.device)]
        codebook[dead] = chosen.to(codebook.dtype)


@torch.no_grad()
def latent_statistics(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """Measure the mean and the standard deviation of each latent channel of a VAE.

    Args:
        network: a diffusers AutoencoderKL.
        batches: batches of images (B, 3, H, W) in [-1, 1].

    Returns:
        `latents_mean` and `latents_std` of the diffusers config, each a list of C numbers.
    """
    moments = Moments()
    for images in batches:
        moments.update(encode_posterior(network, images).mean)
    unbiased = moments.std * math.sqrt(moments.num_values / (moments.num_values - 1))
    return {"latents_mean": moments.mean.tolist(), "latents_std": unbiased.tolist()}


def save_network(network: nn.Module, folder: Path, report: dict) -> None:
    """Write diffusers' files and report.json to a folder, replacing an existing one atomically."""
    with atomic_folder(folder) as partial:
        network.save_pretrained(partial)
        (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n")
