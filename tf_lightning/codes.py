"""The frozen VQ autoencoder between pictures and codes: a diffusers `VQModel`.

Its ids stand where the continuous one of `autoencoder` has latents of one channel; so whatever
stores, packs or hands on pictures knows one form.
Shapes: B pictures of H x W pixels, h = H / downsample by w = W / downsample codes.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from tf_lightning.autoencoder import check_size, digest_of
from tf_lightning.autoencoder_network import decode, project, quantize
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
