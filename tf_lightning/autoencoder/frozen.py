"""Frozen autoencoders, which map images to latents or codes and back.

The three classes have one interface: `encode`, `decode`, `to`, `latent_channels`, `downsample`,
`num_codes` (None for continuous latents), `unit_variance` (whether latents should have it),
`deterministic` (whether there is no posterior to sample) and `fingerprint`.

    LatentAutoencoder  a network of diffusers with continuous latents of unit variance
    VQAutoencoder      diffusers' `VQModel`: one code per latent position, for images as tokens
    PixelAutoencoder   no network: the latents are the pixels

They are not part of the LightningModule, so no checkpoint and no optimizer holds their weights.
Latents are data, which must not depend on the precision of a run: every network runs in float32,
also one that was saved in half precision.

Shapes: B images of H x W pixels, C latent channels, h = H / downsample, w = W / downsample.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.autoencoder.network import decode_latents, encode_vq, quantize
from tf_lightning.autoencoder.weights import load_network
from tf_lightning.errors import UserError, first_sentence

ASSETS = Path(__file__).parents[1] / "shapes" / "assets"
SHAPES_FOLDER = ASSETS / "shapes-autoencoder"
SHIPPED = {"shapes": SHAPES_FOLDER, "shapes_vq": ASSETS / "shapes-vq"}

# Settings that change the output of a network but neither the names nor the shapes of its weights.
SETTINGS = ("act_fn", "norm_num_groups", "norm_type", "upsample_fn", "attention_head_dim")
SETTINGS += ("decoder_act_fns", "decoder_norm_types", "decoder_conv_act_fn", "upsample_block_type")
SETTINGS += ("downsample_block_type", "encoder_out_shortcut", "decoder_in_shortcut")


class LatentAutoencoder:
    """A network whose continuous latents are normalized to zero mean and unit variance.

    Supported are diffusers' `AutoencoderKL`, `AsymmetricAutoencoderKL`, `AutoencoderKLFlux2`,
    `AutoencoderDC` and `AutoencoderTiny`. The latents of FLUX.2 are those of its pipeline: the
    network's latents with 2 x 2 positions folded into the channels, normalized by the statistics of
    its batch norm.

    Args:
        model: the diffusers model.
        config: more items of its config.json than `model.config` has. The mean and the standard
            deviation of each latent channel are `latents_mean` and `latents_std`; without them,
            `shift_factor` and `scaling_factor` hold for all channels.

    Raises:
        UserError: the normalization is missing or not finite, or the decoder does not return images
            of the size that was encoded.
    """

    num_codes = None
    unit_variance = True

    def __init__(self, model: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        self.model = frozen(model)
        config = {**(config or {}), **model.config}
        self.fold = fold_factor(config)
        self.latent_channels: int = config["latent_channels"] * self.fold**2
        self.downsample: int = downsampling(config) * self.fold
        self.mean, self.std = normalization(model, config, self.latent_channels)
        # The other classes return a posterior.
        self.deterministic = type(model).__name__ in ("AutoencoderDC", "AutoencoderTiny")
        check_sizes(self)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights, of the normalization and of other settings that change latents."""
        return hash_network(self.model, self.mean, self.std)

    @cached_property
    def old_fingerprint(self) -> str:
        """Fingerprint in corpora of version 0.1, which did not cover the settings."""
        return hash_network(self.model, self.mean, self.std, settings=())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents, for a posterior its mode.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Latents of unit variance, (B, C, h, w) float32.

        Raises:
            UserError: `downsample` does not divide H or W.
        """
        return self.moments(images)[:, 0].contiguous()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return the mean and the standard deviation of the posterior, 0 without a posterior.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Mean and standard deviation of the normalized latents, (B, 2, C, h, w) float32.

        Raises:
            UserError: `downsample` does not divide H or W.
        """
        check_divisible(*images.shape[-2:], self.downsample)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            encoded = self.model.encode(images, return_dict=False)[0]
        if self.deterministic:
            mean, std = encoded, torch.zeros_like(encoded)
        else:
            mean, std = encoded.mode(), encoded.std
        mean, std = F.pixel_unshuffle(mean, self.fold), F.pixel_unshuffle(std, self.fold)
        return torch.stack([(mean - self.mean) / self.std, std / self.std], 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) of unit variance to images (B, 3, H, W) in [-1, 1]."""
        latents = F.pixel_shuffle(latents.float() * self.std + self.mean, self.fold)
        with torch.autocast(latents.device.type, enabled=False):
            images = self.model.decode(latents.to(memory_format=torch.channels_last)).sample
        return images.clamp(-1, 1).contiguous()

    def to(self, device: torch.device | str) -> "LatentAutoencoder":
        """Move the weights to a device and return self."""
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self


class VQAutoencoder:
    """A `VQModel`, which encodes an image to codebook indices.

    The codes have the shape of latents with one channel, so data and batches store both alike.

    Args:
        model: the diffusers model.

    Raises:
        UserError: the decoder does not return images of the size that was encoded.
    """

    latent_channels = 1
    unit_variance = False
    deterministic = True

    def __init__(self, model: nn.Module):
        self.model = frozen(model)
        # `decode` gets the vectors of the codes, which it must not look up again.
        model.register_to_config(lookup_from_codebook=False)
        self.num_codes: int = model.config.num_vq_embeddings
        self.downsample: int = downsampling(model.config)
        check_sizes(self)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and of other settings that change the codes or the images."""
        return hash_network(self.model)

    @cached_property
    def old_fingerprint(self) -> str:
        """Fingerprint in corpora of version 0.1, which did not cover the settings."""
        return hash_network(self.model, settings=())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the index of the nearest code at each latent position.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Codes (B, 1, h, w) int64 in {0..num_codes-1}.

        Raises:
            UserError: `downsample` does not divide H or W.
        """
        check_divisible(*images.shape[-2:], self.downsample)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            return quantize(self.model, encode_vq(self.model, images)).ids.unsqueeze(1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Decode codes (B, 1, h, w) to images (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: a code is not in {0..num_codes-1}.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_codes:
            raise UserError(
                f"image codes from {int(ids.min())} to {int(ids.max())} are outside the codebook "
                f"of {self.num_codes}; decode them with the autoencoder that encoded them"
            )
        latents = self.model.quantize.embedding(ids[:, 0]).permute(0, 3, 1, 2)  # (B, C, h, w)
        with torch.autocast(ids.device.type, enabled=False):
            return decode_latents(self.model, latents).clamp(-1, 1).contiguous()

    def to(self, device: torch.device | str) -> "VQAutoencoder":
        """Move the weights to a device and return self."""
        self.model.to(device)
        return self


class PixelAutoencoder:
    """The identity: the latents are the pixels."""

    latent_channels = 3
    downsample = 1
    fingerprint = old_fingerprint = "pixels"
    num_codes = None
    unit_variance = False
    deterministic = True

    def encode(self, images: Tensor) -> Tensor:
        """Return the images, (B, 3, H, W) in [-1, 1]."""
        return images

    def moments(self, images: Tensor) -> Tensor:
        """Return the images and a standard deviation of 0, (B, 2, 3, H, W)."""
        return torch.stack([images, torch.zeros_like(images)], 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the latents clipped to [-1, 1], (B, 3, H, W)."""
        return latents.clamp(-1, 1)

    def to(self, device: torch.device | str) -> "PixelAutoencoder":
        """Return self; there are no weights to move."""
        return self


Autoencoder = LatentAutoencoder | VQAutoencoder | PixelAutoencoder


# ---------------------------------------------------------------- what a network's config says


def frozen(model: nn.Module) -> nn.Module:
    """Return a network for inference in float32."""
    model = model.eval().requires_grad_(False).float()
    return model.to(memory_format=torch.channels_last)


def fold_factor(config: Mapping[str, Any]) -> int:
    """Return the side of the positions that FLUX.2 folds into channels; 1 for other networks."""
    height, width = config.get("patch_size", (1, 1))
    if height != width:
        raise UserError(
            f"the autoencoder's config.json has patch_size={[height, width]}; only squares are "
            "supported"
        )
    return height


def downsampling(config: Mapping[str, Any]) -> int:
    """Return the side in pixels of a position of the network's latents."""
    names = ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels")
    widths = next(config[name] for name in names if name in config)
    return 2 ** (len(widths) - 1)


def normalization(
    model: nn.Module, config: Mapping[str, Any], channels: int
) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation that normalize latents, (1, C or 1, 1, 1) each.

    Raises:
        UserError: a value is missing, not a number or not finite, or a scale is not positive.
    """
    if isinstance(norm := getattr(model, "bn", None), nn.BatchNorm2d):
        mean, std = norm.running_mean, (norm.running_var + norm.eps).sqrt()
        names = ("bn.running_mean", "bn.running_var")
    elif config.get("latents_mean") is not None or config.get("latents_std") is not None:
        names = ("latents_mean", "latents_std")
        mean, std = (numbers(config, name, channels) for name in names)
    else:
        names = ("shift_factor", "scaling_factor")
        mean = numbers({"shift_factor": config.get("shift_factor") or 0}, "shift_factor")
        std = 1 / numbers(config, "scaling_factor")  # infinite for 0
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(
            f"the autoencoder's {names[1]} must be positive and {names[0]} finite, or latents have "
            "no variance; correct its config.json, or download it again"
        )
    return tuple(values.detach().float().reshape(1, -1, 1, 1) for values in (mean, std))


def numbers(config: Mapping[str, Any], name: str, count: int | None = None) -> Tensor:
    """Return a number of a config.json, or `count` numbers, in float64.

    Raises:
        UserError: the value is missing or of another type.
    """
    value = config.get(name)
    values = value if count and isinstance(value, list | tuple) else [value]
    right = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not right or len(values) != (count or 1):
        wanted = f"a list of {count} numbers, one for each channel" if count else "a number"
        raise UserError(
            f"the autoencoder's config.json has {name}={str(value)[:80]}, which must be {wanted}; "
            "correct it, or download the file again"
        )
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def check_sizes(autoencoder: "LatentAutoencoder | VQAutoencoder") -> None:
    """Encode and decode a grey image of 2 x 2 latent positions.

    Raises:
        UserError: the sizes or channels are not those of the config, or a value is not finite.
    """
    side = 2 * autoencoder.downsample
    latents = autoencoder.encode(torch.zeros(1, 3, side, side, dtype=torch.float32))
    images = autoencoder.decode(latents)
    shapes = tuple(latents.shape), tuple(images.shape)
    if shapes != ((1, autoencoder.latent_channels, 2, 2), (1, 3, side, side)):
        raise UserError(
            f"the autoencoder turns images of {side} x {side} pixels into latents of shape "
            f"{shapes[0][1:]} and these into images of shape {shapes[1][1:]}, which its "
            "config.json does not say; use another autoencoder"
        )
    if not (latents.isfinite().all() and images.isfinite().all()):
        raise UserError(
            "the autoencoder's output for a grey image is not finite; download its weights again"
        )


def hash_network(
    model: nn.Module, *normalization: Tensor, settings: tuple[str, ...] = SETTINGS
) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of all that determines latents.

    Args:
        model: the network.
        normalization: mean and standard deviation of its latents.
        settings: items of its config that count if they differ from diffusers' defaults.
    """
    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), *normalization):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    defaults = inspect.signature(type(model).__init__).parameters
    changed = {
        name: model.config[name]
        for name in settings
        if name in defaults and model.config[name] != defaults[name].default
    }
    if changed:
        digest.update(json.dumps(changed, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def check_divisible(height: int, width: int, downsample: int) -> None:
    """Raise UserError unless `downsample` divides the height and the width in pixels."""
    if height % downsample or width % downsample:
        raise UserError(
            f"images of {height}x{width} pixels are not divisible by the autoencoder's "
            f"downsampling factor {downsample}; give an image size that is a multiple of "
            f"{downsample}"
        )


# ---------------------------------------------------------------- loading


def load_autoencoder(name: str) -> Autoencoder:
    """Load an autoencoder by name.

    Args:
        name: one of
            "shapes" or "shapes_vq", the autoencoders of the shapes world (64 x 64 pixels);
            "pixels", the identity;
            a folder with config.json and safetensors, or of a diffusers pipeline that has one;
            a safetensors file with config.json beside it, which is an autoencoder under diffusers'
            or its original names, or a whole Stable Diffusion checkpoint;
            a name "owner/model" or "owner/model/subfolder" on the Hugging Face hub.

    Raises:
        UserError: the autoencoder does not exist or cannot be loaded.
    """
    if name == "pixels":
        return PixelAutoencoder()
    model, config = load_network(SHIPPED.get(name, name))
    try:
        return (
            VQAutoencoder(model) if hasattr(model, "quantize") else LatentAutoencoder(model, config)
        )
    except Exception as error:  # the first image fails for a config with wrong values
        failed = f"it cannot encode an image ({first_sentence(error)}); check its config.json"
        reason = error if isinstance(error, UserError) else failed
        raise UserError(f'autoencoder "{name}": {reason}') from error


def load_matching_autoencoder(
    name: str, latent_channels: int, num_codes: int | None
) -> Autoencoder:
    """Load an autoencoder and check that it fits a Transfusion model, see `check_matching`.

    Raises:
        UserError: the autoencoder cannot be loaded, or its latents do not fit the model.
    """
    autoencoder = load_autoencoder(name)
    check_matching(name, autoencoder, latent_channels, num_codes)
    return autoencoder


def check_matching(
    name: str, autoencoder: Autoencoder, latent_channels: int, num_codes: int | None
) -> None:
    """Check that an autoencoder fits a Transfusion model.

    Args:
        name: name of the autoencoder, for messages.
        autoencoder: the autoencoder.
        latent_channels: latent channels of the model; ignored for discrete image tokens.
        num_codes: codebook size of the model; None for continuous latents.

    Raises:
        UserError: its latents do not fit the model.
    """
    channels, codes = autoencoder.latent_channels, autoencoder.num_codes
    if codes != num_codes:
        theirs, ours = (f"{n} codes" if n else "continuous latents" for n in (codes, num_codes))
        raise UserError(
            f'autoencoder "{name}" has {theirs} but the model has {ours}; '
            f"give --model.num_codes {codes or 'null'} or another autoencoder"
        )
    if not num_codes and channels != latent_channels:
        raise UserError(
            f'autoencoder "{name}" has {channels} channels but the model has '
            f"latent_channels={latent_channels}; give --model.latent_channels {channels} or "
            "another autoencoder"
        )
