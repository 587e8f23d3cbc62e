"""The network: one Transformer between a text side and an image side.

This is what is trained, averaged (EMA), sharded and exported; it knows no loss and no trainer.

Shapes: B rows, T positions, M images, N patches an image, K text targets, D dim, V vocabulary.
"""

import torch
from torch import Tensor, nn

from tf_lightning.attention import Attention
from tf_lightning.batch import Batch
from tf_lightning.patches import LinearPatchCoder
from tf_lightning.transformer import Transformer, TransformerConfig
from tf_lightning.unet import UNetConfig, UNetPatchCoder


class Net(nn.Module):
    """Text tokens and noised patches in, next-token logits and the denoiser's output out.

    Args:
        config: sizes of the Transformer.
        patch_size: side of a patch in latent pixels.
        latent_channels: C.
        unet: sizes of a U-Net patch coder; None: the linear one.
        learned_sigma: 2 C output channels, the second half for the variance.
    """

    def __init__(
        self,
        config: TransformerConfig,
        patch_size: int,
        latent_channels: int,
        unet: UNetConfig | None = None,
        learned_sigma: bool = False,
    ):
        super().__init__()
        self.transformer = Transformer(config)
        self.outputs = 2 if learned_sigma else 1
        sizes = latent_channels, patch_size, config.dim, self.outputs * latent_channels
        self.patch_coder = UNetPatchCoder(unet, *sizes) if unet else LinearPatchCoder(*sizes)

    def forward(
        self, batch: Batch, noised_latents: Tensor, t: Tensor, attend: Attention
    ) -> tuple[Tensor, Tensor]:
        """Logits (K, V) at `batch.target_index` and the denoiser's output (M, C or 2 C, h, w).

        Each head runs only where its loss is: no vocabulary head on patches.

        Args:
            batch: packed rows.
            noised_latents: x_t of the batch's images, (M, C, h, w); clean copies are the batch's.
            t: their noise levels, (M,) in [0, 1].
            attend: attention built for this batch.
        """
        shape = noised_latents.shape
        if len(noised_latents) == 0:  # data without images does not know their shape
            coder = self.patch_coder
            noised_latents = noised_latents.new_empty(
                0, coder.latent_channels, coder.patch_size, coder.patch_size
            )
        if len(batch.copied):
            clean = batch.latents[batch.copied]
            noised_latents = torch.cat([noised_latents, clean.type_as(noised_latents)])
            t = torch.cat([t, t.new_zeros(len(clean))])
        patches, skips = self.patch_coder.encode(noised_latents, t)  # (M + M', N, D)
        x = self.transformer.tok_embeddings(batch.input_ids)  # (B, T, D)
        flat = x.flatten(0, 1).index_copy(0, batch.patch_index, patches.flatten(0, 1).type_as(x))
        hidden = self.transformer(flat.view_as(x), batch.positions, attend).flatten(0, 1)
        logits = self.transformer.logits(hidden[batch.target_index])
        hidden_patches = hidden[batch.patch_index].unflatten(0, patches.shape[:2])[: shape[0]]
        skips = [skip[: shape[0]] for skip in skips]  # nobody asks what a clean copy's noise is
        output = self.patch_coder.decode(hidden_patches, noised_latents.shape[-2:], skips)
        return logits, output.view(shape[0], self.outputs * shape[1], *shape[2:])

    def next_logits(self, input_ids: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Logits (n, L, V) behind text ids (n, L) that continue what `attend` has cached."""
        x = self.transformer.tok_embeddings(input_ids)
        return self.transformer.logits(self.transformer(x, positions, attend))

    def denoise(
        self, noised_latents: Tensor, t: Tensor, positions: Tensor, attend: Attention
    ) -> Tensor:
        """The denoiser's output (n, C or 2 C, h, w) for images that continue what is cached."""
        patches, skips = self.patch_coder.encode(noised_latents, t)  # (n, N, D)
        hidden = self.transformer(patches, positions, attend)
        return self.patch_coder.decode(hidden, noised_latents.shape[-2:], skips)

    def reset_parameters(self) -> None:
        """Initialise every weight; also what fills a net built on the meta device."""
        self.transformer.reset_parameters()
        self.patch_coder.reset_parameters()


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * net, elementwise (so shards need no communication)."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
