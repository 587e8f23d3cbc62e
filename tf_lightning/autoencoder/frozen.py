"""Frozen autoencoders, which map images to latents or codes and back.

The three classes have one interface: `encode`, `decode`, `to`, `latent_channels`, `downsample`,
`num_codes` (None for continuous latents) and `fingerprint`.

    KLAutoencoder     diffusers' `AutoencoderKL`: continuous latents of unit variance
    VQAutoencoder     diffusers' `VQModel`: one code per latent position, for images as tokens
    PixelAutoencoder  no network: the latents are the pixels

They are not part of the LightningModule, so no checkpoint and no optimizer holds their weights.

Shapes: B images of H x W pixels, C latent channels, h = H / downsample, w = W / downsample.
"""

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tf_lightning.autoencoder.network import decode_latents, encode_vq, quantize
from tf_lightning.errors import UserError
from tf_lightning.hub import find_folder, first_sentence, is_hub_name, read_json

ASSETS = Path(__file__).parents[1] / "shapes" / "assets"
SHAPES_FOLDER = ASSETS / "shapes-autoencoder"
SHIPPED = {"shapes": SHAPES_FOLDER, "shapes_vq": ASSETS / "shapes-vq"}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class KLAutoencoder:
    """An `AutoencoderKL` whose latents are normalized to zero mean and unit variance.

    Args:
        model: the diffusers model. Its config has the mean and the standard deviation of each
            latent channel (`latents_mean`, `latents_std`), or one `shift_factor` and one
            `scaling_factor` for all channels.
    """

    num_codes = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config = model.config
        self.latent_channels: int = config.latent_channels
        self.downsample: int = 2 ** (len(config.block_out_channels) - 1)
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        else:
            mean = torch.tensor(config.shift_factor or 0.0)
            std = torch.tensor(1 / config.scaling_factor)
        self.mean, self.std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and of the normalization."""
        return hash_tensors(*self.model.state_dict().values(), self.mean, self.std)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the mode of the posterior.

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
        """Return the mean and the standard deviation of the posterior.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Mean and standard deviation of the normalized latents, (B, 2, C, h, w) float32.

        Raises:
            UserError: `downsample` does not divide H or W.
        """
        check_divisible(*images.shape[-2:], self.downsample)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        # Latents are data: they must not depend on the precision of the run.
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.model.encode(images).latent_dist
        mean, std = (posterior.mode() - self.mean) / self.std, posterior.std / self.std
        return torch.stack([mean, std], 1)  # (B, 2, C, h, w)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) of unit variance to images (B, 3, H, W) in [-1, 1]."""
        latents = latents.float() * self.std + self.mean
        with torch.autocast(latents.device.type, enabled=False):
            images = self.model.decode(latents.to(memory_format=torch.channels_last)).sample
        return images.clamp(-1, 1).contiguous()

    def to(self, device: torch.device | str) -> "KLAutoencoder":
        """Move the weights to a device and return self."""
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self


class VQAutoencoder:
    """A `VQModel`, which encodes an image to codebook indices.

    The codes have the shape of latents with one channel, so data and batches store both alike.

    Args:
        model: the diffusers model.
    """

    latent_channels = 1

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.num_codes: int = model.config.num_vq_embeddings
        self.downsample: int = 2 ** (len(model.config.block_out_channels) - 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return hash_tensors(*self.model.state_dict().values())

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
        # Codes are data: they must not depend on the precision of the run.
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
    fingerprint = "pixels"
    num_codes = None

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


Autoencoder = KLAutoencoder | VQAutoencoder | PixelAutoencoder


def hash_tensors(*tensors: Tensor) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of tensor values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_divisible(height: int, width: int, downsample: int) -> None:
    """Raise UserError unless `downsample` divides the height and the width in pixels."""
    if height % downsample or width % downsample:
        raise UserError(
            f"images of {height}x{width} pixels are not divisible by the autoencoder's "
            f"downsampling factor {downsample}; give an image size that is a multiple of "
            f"{downsample}"
        )


def load_autoencoder(name: str) -> Autoencoder:
    """Load an autoencoder by name.

    Args:
        name: one of
            "shapes" or "shapes_vq", the autoencoders of the shapes world (64 x 64 pixels);
            "pixels", the identity;
            a folder with config.json and diffusion_pytorch_model.safetensors;
            a .safetensors file with config.json beside it, which is an autoencoder under its
            original names or diffusers' names, or a whole Stable Diffusion checkpoint;
            a name "owner/model" on the Hugging Face hub.

    Raises:
        UserError: the autoencoder does not exist or cannot be loaded.
    """
    if name == "pixels":
        return PixelAutoencoder()
    model = load_diffusers_model(name)
    return VQAutoencoder(model) if hasattr(model, "quantize") else KLAutoencoder(model)


def load_matching_autoencoder(
    name: str, latent_channels: int, num_codes: int | None
) -> Autoencoder:
    """Load an autoencoder and check that it fits a Transfusion model.

    Args:
        name: see `load_autoencoder`.
        latent_channels: latent channels of the model; ignored for discrete image tokens.
        num_codes: codebook size of the model; None for continuous latents.

    Raises:
        UserError: the autoencoder cannot be loaded, or its latents do not fit the model.
    """
    autoencoder = load_autoencoder(name)
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
    return autoencoder


def load_diffusers_model(name: str) -> nn.Module:
    """Load the `AutoencoderKL` or `VQModel` that `load_autoencoder` wraps.

    Raises:
        UserError: the model does not exist or cannot be loaded.
    """
    path = SHIPPED.get(name, Path(name))
    try:
        if is_hub_name(name):
            path = find_folder(name, ["config.json", WEIGHTS_FILE])
        if path.exists():
            # The model is built with random weights, which the file's weights then replace. They
            # must not advance the run's generator: a run starts from the same weights whether or
            # not it encodes images.
            with torch.random.fork_rng(devices=()):
                return _load_path(path)
    except UserError:
        raise
    except Exception as error:  # diffusers and safetensors raise many types
        raise UserError(
            f'autoencoder "{name}" cannot be loaded ({first_sentence(error)}); check its '
            "config.json and its weights, or download it again"
        ) from error
    raise UserError(
        f'there is no autoencoder "{name}"; give "shapes", "shapes_vq", "pixels", a folder, a '
        ".safetensors file with its config.json beside it, or a hub name such as "
        "stabilityai/sd-vae-ft-mse"
    )


def _load_path(path: Path) -> nn.Module:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise UserError(
            f"autoencoder {path} has no config.json in {folder}; copy the config.json of the "
            "autoencoder into that folder"
        )
    if path.is_dir() or path.name == WEIGHTS_FILE:
        return _load_folder(folder)
    if path.suffix != ".safetensors":
        raise UserError(f"autoencoder file {path} is not a .safetensors file; convert it to one")
    return _load_file(path)


# Both functions import diffusers when they are called, because the import takes seconds and most
# commands load no autoencoder. Both also look for missing weights, which diffusers replaces by
# random ones with only a log message.


def _load_folder(folder: Path) -> nn.Module:
    from diffusers import AutoencoderKL, VQModel

    class_name = read_json(folder / "config.json").get("_class_name")
    model, info = (VQModel if class_name == "VQModel" else AutoencoderKL).from_pretrained(
        folder,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=False,  # True needs accelerate, which is not a dependency
        use_safetensors=True,  # never a pickle
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError("its weights do not match its config.json")
    return model


def _load_file(path: Path) -> nn.Module:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    # As diffusers' `from_single_file`, which does not report missing weights.
    model = AutoencoderKL.from_config(AutoencoderKL.load_config(path.parent))
    weights = load_file(path)
    if not model.state_dict().keys() <= weights.keys():  # original names, not diffusers'
        weights = convert_ldm_vae_checkpoint(weights, model.config)
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # a tensor has another shape
        raise ValueError("its weights do not match its config.json") from error
    if missing:
        raise ValueError("its weights do not match its config.json")
    return model
