"""The U-Net patch coder: the down blocks before the Transformer, the up blocks after it.

This is the U-Net of Nichol & Dhariwal (2021), made of diffusers' blocks, with the Transformer as
its middle (Transfusion Sec. 4.1; LMFusion Sec. 3.1: h_in = UNetDown(x_t, t), eps = UNetUp(h_out, t,
h_in)). Every residual block adds the timestep embedding and every norm is a plain layer norm; the
original scales and shifts the norms by t (Transfusion footnote 7). At the patches' resolution it
has bidirectional attention within the image, also if the Transformer is causal.

Shapes: M images, C x h x w latents, P patch size, N = (h / P) * (w / P) patches, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.errors import UserError
from tf_lightning.model.patches import MAX_GRID, TIMESTEP_DIM, learned_pos_embed, timestep_embedding
from tf_lightning.ranges import PositiveInt, check_fields


@dataclass
class UNetConfig:
    """Sizes of the U-Net patch coder; the defaults are the paper's 0.27B with patch size 2.

    Raises:
        UserError: a size is out of its range.
    """

    channels: tuple[PositiveInt, ...] = (512, 960)
    """Channels at each resolution, from the latents to the patches. Each entry after the first
    halves the side, so 1, 2, 3 or 4 entries make a patch size of 1, 2, 4 or 8."""
    num_blocks: PositiveInt = 3
    """Residual blocks at each resolution of the down path; the up path has one more."""
    head_dim: PositiveInt = 64
    """Dim of an attention head; must divide the last entry of `channels`."""

    def __post_init__(self) -> None:
        check_fields(self, "unet.")
        if not self.channels:
            raise UserError("unet.channels must have an entry for each resolution; give 1 to 4")


def check_unet_config(config: UNetConfig, patch_size: int) -> None:
    """Raise UserError if the sizes do not make a U-Net with this patch size."""
    side = 2 ** (len(config.channels) - 1)
    if side != patch_size:
        raise UserError(
            f"unet.channels={list(config.channels)} make patches of {side} but "
            f"patch_size={patch_size}; give 1, 2, 3 or 4 channels for patch size 1, 2, 4 or 8"
        )
    if config.channels[-1] % config.head_dim:
        raise UserError(
            f"unet.head_dim={config.head_dim} must divide the last of "
            f"unet.channels={list(config.channels)}; change one of them"
        )


def pad_empty(x: Tensor) -> Tensor:
    """Return x (M, ...), or one zero image if M is 0; diffusers' attention needs at least one."""
    return x if len(x) else x.new_zeros(1, *x.shape[1:])


def down_blocks(config: UNetConfig, time_dim: int) -> nn.ModuleList:
    """Build the down path: residual blocks and a downsampler at each resolution but the last.

    The last resolution has attention and no downsampler. One norm group makes a layer norm.
    """
    # Imported here because it takes 2.5 seconds.
    from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, DownBlock2D

    shared = {"temb_channels": time_dim, "num_layers": config.num_blocks, "resnet_groups": 1}
    in_channels = (config.channels[0], *config.channels[:-1])
    pairs = list(zip(in_channels, config.channels, strict=True))
    blocks: list[nn.Module] = [DownBlock2D(*pair, **shared) for pair in pairs[:-1]]
    attention = {"attention_head_dim": config.head_dim, "downsample_type": None}
    return nn.ModuleList([*blocks, AttnDownBlock2D(*pairs[-1], **shared, **attention)])


def up_blocks(config: UNetConfig, time_dim: int) -> nn.ModuleList:
    """Build the up path, the mirror of `down_blocks`; each residual block also reads one skip."""
    from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, UpBlock2D

    shared = {"temb_channels": time_dim, "num_layers": config.num_blocks + 1, "resnet_groups": 1}
    channels, last = config.channels, len(config.channels) - 1
    blocks: list[nn.Module] = []
    for level in range(last, -1, -1):
        sizes = {
            "in_channels": channels[max(level - 1, 0)],  # channels of the last skip it reads
            "prev_output_channel": channels[min(level + 1, last)],
            "out_channels": channels[level],
        }
        if level == last:
            upsample = {"upsample_type": "conv" if level else None}
            head = {"attention_head_dim": config.head_dim}
            blocks.append(AttnUpBlock2D(**sizes, **shared, **head, **upsample))
        else:
            blocks.append(UpBlock2D(**sizes, **shared, add_upsample=level > 0))
    return nn.ModuleList(blocks)


class UNetPatchCoder(nn.Module):
    """Convolutions and attention within an image, down to patch resolution and up again.

    Patches get learned row and column embeddings, as in the linear coder.

    Args:
        config: sizes.
        latent_channels: C.
        patch_size: P, a power of two.
        dim: D.
        out_channels: channels of the output; None for C.

    Raises:
        UserError: the sizes do not make a U-Net with this patch size.
    """

    def __init__(
        self,
        config: UNetConfig,
        latent_channels: int,
        patch_size: int,
        dim: int,
        out_channels: int | None = None,
    ):
        super().__init__()
        check_unet_config(config, patch_size)
        self.patch_size, self.latent_channels = patch_size, latent_channels
        first, last = config.channels[0], config.channels[-1]
        time_dim = 4 * first
        self.time_embedder = nn.Sequential(
            nn.Linear(TIMESTEP_DIM, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.conv_in = nn.Conv2d(latent_channels, first, 3, padding=1)
        self.down_blocks = down_blocks(config, time_dim)
        self.patch_encoder = nn.Linear(last, dim)
        self.row_embedding = nn.Embedding(MAX_GRID, dim)
        self.column_embedding = nn.Embedding(MAX_GRID, dim)
        self.patch_decoder = nn.Linear(dim, last)
        self.up_blocks = up_blocks(config, time_dim)
        self.norm_out = nn.GroupNorm(1, first, eps=1e-6)
        self.conv_out = nn.Conv2d(first, out_channels or latent_channels, 3, padding=1)

    def encode(self, latents: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode noised latents.

        Args:
            latents: x_t, (M, C, h, w).
            t: noise levels, (M,) in [0, 1].

        Returns:
            Patch vectors (M, N, D), and the skips of `decode`: the timestep embedding, then the
            states that the up path reads, from last to first.
        """
        count, latents, t = len(latents), pad_empty(latents), pad_empty(t)
        time = self.time_embedder(timestep_embedding(t).type_as(latents))
        x = self.conv_in(latents)  # (M, channels[0], h, w)
        skips = [time, x]
        for block in self.down_blocks:
            x, states = block(x, time)
            skips += states
        # x is (M, channels[-1], h / P, w / P).
        pos_embed = learned_pos_embed(self.row_embedding, self.column_embedding, *x.shape[-2:])
        patches = self.patch_encoder(x.flatten(2).transpose(1, 2)) + pos_embed  # (M, N, D)
        return patches[:count], [skip[:count] for skip in skips]

    def decode(self, hidden: Tensor, size: tuple[int, int], skips: Sequence[Tensor]) -> Tensor:
        """Decode hidden states (M, N, D) with the skips of `encode`; see `LinearPatchCoder`."""
        time, *states = map(pad_empty, skips)
        grid = [side // self.patch_size for side in size]
        x = self.patch_decoder(pad_empty(hidden)).transpose(1, 2).unflatten(2, grid)
        for block in self.up_blocks:
            count = len(block.resnets)
            states, read = states[:-count], states[-count:]
            x = block(x, tuple(read), time)
        return self.conv_out(F.silu(self.norm_out(x)))[: len(hidden)]

    def reset_parameters(self) -> None:
        """Initialize activations with unit variance; residual branches and the output with zero."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            elif isinstance(part, nn.GroupNorm):
                part.reset_parameters()
        for name, part in self.named_modules():
            if name.endswith((".conv2", ".to_out.0")) or part is self.conv_out:
                nn.init.zeros_(part.weight)
