"""The network: one Transformer between a text side and an image side.

Images are patches of latents with a coder of their own (Transfusion), or codes in the vocabulary of
the text, which needs none (Chameleon).

This is what is trained, averaged (EMA), sharded and exported; it knows no loss and no trainer.

Shapes: B rows, T positions, M images, m of one size, N patches an image of it, P of all, K targets
of text and K' of codes, D dim, V vocabulary, of which the last are codes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tf_lightning.batch import Batch, crop_by_bucket, pad_images, split_by_bucket
from tf_lightning.errors import UserError
from tf_lightning.model.attention import Attention
from tf_lightning.model.patches import LinearConfig, LinearPatchCoder, has_time_token
from tf_lightning.model.transformer import Transformer, TransformerConfig
from tf_lightning.model.unet import UNetConfig, UNetPatchCoder


class TransfusionModel(nn.Module):
    """Text tokens and noised patches in, next-token logits and the denoiser's output out.

    Args:
        config: sizes of the Transformer.
        patch_size: side of a patch in latent pixels.
        latent_channels: C.
        unet: sizes of a U-Net patch coder; None: the linear one.
        learned_sigma: 2 C output channels, the second half for the variance.
        linear: how the linear patch coder is told noise level and place; None: as Transfusion does.
        num_codes: so many entries behind the text's are images' codes; 0: images are latents.
    """

    def __init__(
        self,
        config: TransformerConfig,
        patch_size: int,
        latent_channels: int,
        unet: UNetConfig | None = None,
        learned_sigma: bool = False,
        linear: LinearConfig | None = None,
        num_codes: int = 0,
    ):
        super().__init__()
        self.num_codes, self.text_vocab_size = num_codes, config.vocab_size
        self.transformer = Transformer(replace(config, vocab_size=config.vocab_size + num_codes))
        self.time_token = has_time_token(linear)
        self.outputs = 2 if learned_sigma else 1
        self.patch_coder = None
        if num_codes:
            return
        sizes = latent_channels, patch_size, config.dim, self.outputs * latent_channels
        self.patch_coder = (
            UNetPatchCoder(unet, *sizes) if unet else LinearPatchCoder(*sizes, linear)
        )

    def forward(
        self, batch: Batch, noised_latents: Tensor, t: Tensor, attend: Attention
    ) -> tuple[Tensor, Tensor]:
        """Logits (K, V) at `batch.target_index` and the denoiser's output (M, C or 2 C, h, w).

        Each head runs only where its loss is: no vocabulary head on patches. With images of codes,
        logits are (K + K', V), also at `batch.code_index`, and there is no denoiser.

        Args:
            batch: packed rows.
            noised_latents: x_t of the batch's images, (M, C, h, w); clean copies are the batch's.
            t: their noise levels, (M,) in [0, 1].
            attend: attention built for this batch.
        """
        if self.num_codes:
            return self._code_logits(batch, attend), noised_latents.new_empty(0, dtype=torch.float)
        parts = self._encode(batch, noised_latents, t)
        patches = torch.cat([part.flatten(0, 1) for part, *_ in parts])
        x = self.transformer.tok_embeddings(batch.input_ids)  # (B, T, D)
        flat = x.flatten(0, 1).index_copy(0, batch.patch_index, patches.type_as(x))
        hidden = self.transformer(flat.view_as(x), batch.positions, attend).flatten(0, 1)
        logits = self.transformer.logits(hidden[batch.target_index])
        return logits, self._decode(hidden[batch.patch_index], parts, noised_latents.shape)

    def _encode(self, batch: Batch, noised_latents: Tensor, t: Tensor) -> list[tuple]:
        """Of the images of each size, then their clean copies: patches (m + m', N, D) and skips.

        Behind these m, which is only of the noised images, and h, w.
        """
        buckets, coder = batch.buckets, self.patch_coder
        if not buckets:  # data without images does not know their shape; the coder has a gradient
            empty = noised_latents.new_empty(0, coder.latent_channels, *[coder.patch_size] * 2)
            return [(*coder.encode(empty, t), 0, empty.shape[-2:])]
        copied = batch.copied.split([bucket.num_copies for bucket in buckets])
        found, images = [], crop_by_bucket(noised_latents, buckets)
        for noised, times, copies in zip(images, split_by_bucket(t, buckets), copied, strict=True):
            size = noised.shape[-2:]
            if len(copies):
                clean = batch.latents[copies][..., : size[0], : size[1]]
                both = torch.cat([noised, clean.type_as(noised)])
                encoded = coder.encode(both, torch.cat([times, times.new_zeros(len(copies))]))
            else:
                encoded = coder.encode(noised, times)
            found.append((*encoded, len(noised), size))
        return found

    def _decode(self, hidden: Tensor, parts: list[tuple], shape: torch.Size) -> Tensor:
        """Hidden states of all patches, (P, D) -> output (M, C or 2 C, H, W), as `shape` has it."""
        outputs = []
        lengths = [patches.shape[0] * patches.shape[1] for patches, *_ in parts]
        for mine, (patches, skips, count, size) in zip(hidden.split(lengths), parts, strict=True):
            mine = mine.unflatten(0, patches.shape[:2])[:count]
            skips = [skip[:count] for skip in skips]  # nobody asks what a copy's noise is
            outputs.append(pad_images(self.patch_coder.decode(mine, size, skips), *shape[-2:]))
        return torch.cat(outputs).view(shape[0], self.outputs * shape[1], *shape[2:])

    def _code_logits(self, batch: Batch, attend: Attention) -> Tensor:
        x = self.transformer.tok_embeddings(batch.input_ids)
        hidden = self.transformer(x, batch.positions, attend).flatten(0, 1)
        return self.transformer.logits(hidden[torch.cat([batch.target_index, batch.code_index])])

    def next_logits(self, input_ids: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Logits (n, L, V) behind ids (n, L) that continue what `attend` has cached."""
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
        if self.patch_coder is not None:
            self.patch_coder.reset_parameters()


def build_network(hparams: Mapping[str, Any]) -> TransfusionModel:
    """Build the network that a run's hyper-parameters describe; its weights are not initialised.

    Args:
        hparams: arguments of `tf_lightning.training.module.Transfusion`, as a checkpoint keeps
            them; each config is a dataclass or a plain dict.
    """

    def config(name: str, kind: type) -> Any:
        value = hparams.get(name)
        return kind(**value) if isinstance(value, dict) else value

    return TransfusionModel(
        config("transformer", TransformerConfig),
        hparams["patch_size"],
        hparams["latent_channels"],
        unet=config("unet", UNetConfig),
        learned_sigma=hparams["learned_sigma"],
        linear=config("linear", LinearConfig),
        num_codes=hparams["num_codes"] or 0,
    )


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * net, elementwise (so shards need no communication)."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def check_codes(
    num_codes: int, patch_size: int, unet: UNetConfig | None, config: TransformerConfig
) -> None:
    """Refuse what there is no network of codes of."""
    if num_codes < 2:
        raise UserError(f"num_codes={num_codes} is no codebook; give 2 or more, or null")
    if patch_size != 1 or unet is not None or config.modality_weights != "shared":
        raise UserError(
            f"num_codes={num_codes} makes each code a token like those of text; give "
            "patch_size: 1 (the data too), unet: null and modality_weights: shared"
        )
