"""The frozen autoencoder between pictures and latents: a diffusers `AutoencoderKL`, or none.

`codes` has its twin, whose pictures are codes of a codebook.

Kept outside every LightningModule, so its weights enter no checkpoint and no optimizer.
Shapes: B pictures of H x W pixels, C latent channels of h = H / downsample by w = W / downsample.

The frozen VQ autoencoder between pictures and codes: a diffusers `VQModel`.

Its ids stand where the continuous one of `autoencoder` has latents of one channel; so whatever
stores, packs or hands on pictures knows one form.
Shapes: B pictures of H x W pixels, h = H / downsample by w = W / downsample codes.
"""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tf_lightning.autoencoder.network import decode, project, quantize
from tf_lightning.errors import UserError


class Codes:
    """A trained VQ autoencoder: `encode` pictures to ids, `decode` ids to pictures.

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
        """Identifies the weights, wherever they were loaded from."""
        return digest_of(*self.model.state_dict().values())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The nearest codes of pictures, row by row from the top.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            ids (B, 1, h, w) int64 in {0..num_codes-1}.

        Raises:
            UserError: if H or W is no multiple of `downsample`.
        """
        check_size(*images.shape[-2:], self.downsample)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):  # codes are data, ever the same
            return quantize(self.model, project(self.model, images)).ids.unsqueeze(1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), clipped to [-1, 1], of ids (B, 1, h, w).

        Raises:
            UserError: if an id is not of the codebook.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_codes:
            raise UserError(
                f"ids from {int(ids.min())} to {int(ids.max())} are not all codes of a codebook of "
                f"{self.num_codes}; give those of this autoencoder"
            )
        latents = self.model.quantize.embedding(ids[:, 0]).permute(0, 3, 1, 2)
        with torch.autocast(ids.device.type, enabled=False):
            return decode(self.model, latents).clamp(-1, 1).contiguous()

    def to(self, device: torch.device | str) -> "Codes":
        """Moves the weights, and returns itself."""
        self.model.to(device)
        return self


ASSETS = Path(__file__).parents[1] / "shapes" / "assets"
SHAPES = ASSETS / "shapes-autoencoder"
SHIPPED = {"shapes": SHAPES, "shapes_vq": ASSETS / "shapes-vq"}
HUB_TIMEOUT = 10.0  # seconds


class Pixels:
    """The autoencoder that does nothing: latents are the pictures themselves."""

    latent_channels = 3
    downsample = 1
    fingerprint = "pixels"
    num_codes = None

    def encode(self, images: Tensor) -> Tensor:
        """Returns the pictures, (B, 3, H, W) in [-1, 1]."""
        return images

    def moments(self, images: Tensor) -> Tensor:
        """The pictures, and 0 for the spread around them, (B, 2, 3, H, W)."""
        return torch.stack([images, torch.zeros_like(images)], 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the latents clipped to [-1, 1], (B, 3, H, W)."""
        return latents.clamp(-1, 1)

    def to(self, device: torch.device | str) -> "Pixels":
        """Returns itself: it has no weights."""
        return self


class Autoencoder:
    """An `AutoencoderKL` whose latents are shifted and scaled to zero mean and unit variance.

    Args:
        model: the diffusers model. Its config says the mean and the standard deviation of each
            latent channel (`latents_mean`, `latents_std`), or else one `shift_factor` and
            `scaling_factor` for all.
    """

    num_codes = None  # its latents are continuous

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
        """Identifies the weights and the scaling, wherever they were loaded from."""
        return digest_of(*self.model.state_dict().values(), self.mean, self.std)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The mode of the posterior of pictures.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Latents with unit variance, float32 (B, C, h, w).

        Raises:
            UserError: if H or W is no multiple of `downsample`.
        """
        return self.moments(images)[:, 0].contiguous()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean (which `encode` returns) and standard deviation of the posterior of pictures.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Of latents with unit variance, float32 (B, 2, C, h, w).

        Raises:
            UserError: if H or W is no multiple of `downsample`.
        """
        height, width = images.shape[-2:]
        check_size(height, width, self.downsample)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        # Full precision whatever the trainer's is: latents are data, the same in every run.
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.model.encode(images).latent_dist
        mean, std = (posterior.mode() - self.mean) / self.std, posterior.std / self.std
        return torch.stack([mean, std], 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), clipped to [-1, 1], of latents (B, C, h, w) with unit variance."""
        latents = latents.float() * self.std + self.mean
        with torch.autocast(latents.device.type, enabled=False):
            images = self.model.decode(latents.to(memory_format=torch.channels_last)).sample
        return images.clamp(-1, 1).contiguous()

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Moves the weights, and returns itself."""
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self


def digest_of(*tensors: Tensor) -> str:
    """16 hexadecimal digits that differ where the tensors do."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_size(height: int, width: int, downsample: int) -> None:
    """UserError unless pictures divide into an autoencoder's cells."""
    if height % downsample or width % downsample:
        raise UserError(
            f"pictures of {height}x{width} do not divide into cells of {downsample}; "
            f"give an image size that is a multiple of {downsample}"
        )


def load_autoencoder(name: str):
    """Loads an autoencoder by name: an `Autoencoder`, `Pixels`, or `Codes` where it has a codebook.

    Args:
        name: "shapes" or "shapes_vq" for those of the embedded world (64 x 64 pictures), "pixels"
            for none, a folder with config.json and diffusion_pytorch_model.safetensors, a
            .safetensors file with config.json beside it (an autoencoder's, with the original names
            or diffusers', or a whole Stable Diffusion checkpoint), or a name "owner/model" on the
            Hugging Face hub.

    Raises:
        UserError: if there is no such autoencoder, or it does not load.
    """
    if name == "pixels":
        return Pixels()
    network = load_network(name)
    return Codes(network) if hasattr(network, "quantize") else Autoencoder(network)


def load_fitting(name: str, latent_channels: int, num_codes: int | None):
    """Loads an autoencoder for a model, as `load_autoencoder`.

    Args:
        name: of the autoencoder.
        latent_channels: of the model, where its pictures are continuous.
        num_codes: of the model's codebook; None: its pictures are continuous.

    Raises:
        UserError: also if its latents are not the model's.
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


def load_network(name: str) -> nn.Module:
    """The diffusers model that `load_autoencoder` names: an AutoencoderKL or a VQModel.

    Raises:
        UserError: if there is none, or it does not load.
    """
    path = SHIPPED.get(name, Path(name))
    try:
        # A run starts with the same weights whether or not it has pictures to encode: the random
        # weights that are built to be replaced are not drawn from its own generator.
        with torch.random.fork_rng(devices=()):
            if path.exists():
                return _from_disk(path)
            if name.count("/") == 1 and path.suffix != ".safetensors" and not path.is_absolute():
                return _from_hub(name)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # diffusers, safetensors and the hub's transport each raise their own kinds
        reason = re.split(r"\n|\. ", str(error).strip())[0].rstrip(".") or type(error).__name__
        raise UserError(
            f'autoencoder "{name}" does not load ({reason}); '
            "check the files, the network and HF_HUB_OFFLINE"
        ) from error
    raise UserError(
        f'there is no autoencoder "{name}"; give "shapes", "shapes_vq", "pixels", a folder, a '
        ".safetensors file with its config.json beside it, or a hub name such as "
        "stabilityai/sd-vae-ft-mse"
    )


def _from_disk(path: Path) -> nn.Module:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise UserError(
            f"autoencoder {path} has no config.json in {folder}; put the one of its training there"
        )
    if path.is_dir() or path.name == "diffusion_pytorch_model.safetensors":
        return _from_folder(folder)
    if path.suffix != ".safetensors":
        raise UserError(f"autoencoder file {path} is not a .safetensors file; convert it to one")
    return _from_file(path)


# diffusers is imported late because it takes seconds and most commands need no autoencoder. Where
# weights are missing it fills in random ones and only logs it, so both functions look for them.


def _from_folder(folder: Path) -> nn.Module:
    from diffusers import AutoencoderKL, VQModel

    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    model, info = (VQModel if kind == "VQModel" else AutoencoderKL).from_pretrained(
        folder,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=False,  # accelerate, which this needs, is no dependency
        use_safetensors=True,  # never a pickle
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError("its weights are not those of its config.json")
    return model


def _from_file(path: Path) -> nn.Module:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    # What `from_single_file` does, which keeps random weights where the file lacks some.
    model = AutoencoderKL.from_config(AutoencoderKL.load_config(path.parent))
    weights = load_file(path)
    if not model.state_dict().keys() <= weights.keys():  # named as outside diffusers
        weights = convert_ldm_vae_checkpoint(weights, model.config)
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # of other shapes
        raise ValueError("its weights are not those of its config.json") from error
    if missing:
        raise ValueError("its weights are not those of its config.json")
    return model


def _from_hub(name: str) -> nn.Module:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    try:
        folder = snapshot_download(name, allow_patterns=files, local_files_only=True)
    except LocalEntryNotFoundError:
        folder = snapshot_download(name, allow_patterns=files, etag_timeout=HUB_TIMEOUT)
    return _from_disk(Path(folder))
