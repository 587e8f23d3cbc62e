"""The network: Transformer, text embeddings and patch coder.

Images are either patches of latents, which need a patch coder (Transfusion), or codes in the
vocabulary of the text, which need none (Chameleon).

This module is trained, averaged (EMA), sharded and exported. It knows no loss and no trainer.

Shapes: B rows, T positions, M images, m images of one resolution, C x h x w latents (H x W of the
largest), N patches per image, P patches in the batch, K text targets, K' code targets, D model
dim, V vocabulary including image codes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tf_lightning.batch import Batch, crop_by_bucket, pad_images, split_by_bucket
from tf_lightning.errors import UserError
from tf_lightning.model.attention import Attention
from tf_lightning.model.patches import LinearConfig, LinearPatchCoder, has_time_token
from tf_lightning.model.transformer import Transformer, TransformerConfig
from tf_lightning.model.unet import UNetConfig, UNetPatchCoder

Score = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Logits (k, V) and targets (k,) -> values of each target, (k,) each."""
MAX_LOGITS = 2**26  # computed at once where they are scored: 256 MiB in fp32


class EncodedBucket(NamedTuple):
    """Encoded images of one resolution: m noised images, then their m' clean copies."""

    patches: Tensor  # (m + m', N, D)
    skips: Sequence[Tensor]  # (m + m', ...) each
    num_noised: int  # m
    size: tuple[int, int]  # (h, w)


class TransfusionModel(nn.Module):
    """Text tokens and noised latents in, next-token logits and the denoiser's output out.

    Args:
        config: sizes of the Transformer; its vocab_size is without image codes.
        patch_size: side of a patch in latent pixels.
        latent_channels: C.
        unet: sizes of a U-Net patch coder; None for the linear one.
        learned_sigma: output 2 C channels, the second half of which is for the variance.
        linear: options of the linear patch coder; None for the defaults.
        num_codes: number of image codes, whose ids follow the text vocabulary; 0 for latents.
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
        self.num_outputs = 2 if learned_sigma else 1  # outputs per latent channel
        self.patch_coder = None
        if num_codes:
            return
        sizes = latent_channels, patch_size, config.dim, self.num_outputs * latent_channels
        self.patch_coder = (
            UNetPatchCoder(unet, *sizes) if unet else LinearPatchCoder(*sizes, linear)
        )

    def forward(
        self,
        batch: Batch,
        noised_latents: Tensor,
        t: Tensor,
        attend: Attention,
        score: Score | None = None,
    ) -> tuple[Any, Tensor]:
        """Run the network on packed rows; each head runs only where its loss is.

        Args:
            batch: packed rows, with the clean latents of the copies.
            noised_latents: x_t of the batch's images, (M, C, H, W).
            t: noise levels of the images, (M,) in [0, 1].
            attend: attention of this batch.
            score: a function of logits and their targets, such as the loss of each target.
                The logits of many targets are then never in memory together.

        Returns:
            Logits (K, V) at `batch.target_index`, or their score, and the denoiser's output
            (M, C or 2 C, H, W). With image codes: logits (K + K', V) at `target_index` and
            `code_index`, or their score, and an empty tensor.
        """
        if self.num_codes:
            x = self.transformer.tok_embeddings(batch.input_ids)
            hidden = self.transformer(x, batch.positions, attend).flatten(0, 1)
            index = torch.cat([batch.target_index, batch.code_index])
            empty = noised_latents.new_empty(0, dtype=torch.float)
            return self._head(hidden, batch.labels, index, score), empty
        encoded = self._encode(batch, noised_latents, t)
        patches = torch.cat([bucket.patches.flatten(0, 1) for bucket in encoded])  # (P, D)
        x = self.transformer.tok_embeddings(batch.input_ids)  # (B, T, D)
        flat = x.flatten(0, 1).index_copy(0, batch.patch_index, patches.type_as(x))
        hidden = self.transformer(flat.view_as(x), batch.positions, attend).flatten(0, 1)
        logits = self._head(hidden, batch.labels, batch.target_index, score)
        return logits, self._decode(hidden[batch.patch_index], encoded, noised_latents.shape)

    def _encode(self, batch: Batch, noised_latents: Tensor, t: Tensor) -> list[EncodedBucket]:
        """Encode the noised images and the clean copies, one resolution after another."""
        buckets, coder = batch.buckets, self.patch_coder
        if not buckets:
            # Without images, encode an empty batch so that every rank has gradients (DDP).
            empty = noised_latents.new_empty(0, coder.latent_channels, *[coder.patch_size] * 2)
            return [EncodedBucket(*coder.encode(empty, t), 0, empty.shape[-2:])]
        copied = batch.copied.split([bucket.num_copies for bucket in buckets])
        noised = crop_by_bucket(noised_latents, buckets)
        encoded = []
        for x_t, times, copies in zip(noised, split_by_bucket(t, buckets), copied, strict=True):
            size, num_noised = x_t.shape[-2:], len(x_t)
            if len(copies):
                clean = batch.latents[copies][..., : size[0], : size[1]]
                x_t = torch.cat([x_t, clean.type_as(x_t)])
                times = torch.cat([times, times.new_zeros(len(copies))])
            encoded.append(EncodedBucket(*coder.encode(x_t, times), num_noised, size))
        return encoded

    def _decode(self, hidden: Tensor, encoded: list[EncodedBucket], shape: torch.Size) -> Tensor:
        """Decode the hidden states of the noised images; clean copies have no output.

        Args:
            hidden: hidden states of all patches, (P, D).
            encoded: from `_encode`.
            shape: (M, C, H, W) of the noised latents.

        Returns:
            (M, C or 2 C, H, W).
        """
        outputs = []
        lengths = [bucket.patches.shape[0] * bucket.patches.shape[1] for bucket in encoded]
        for part, bucket in zip(hidden.split(lengths), encoded, strict=True):
            part = part.unflatten(0, bucket.patches.shape[:2])[: bucket.num_noised]  # (m, N, D)
            skips = [skip[: bucket.num_noised] for skip in bucket.skips]
            output = self.patch_coder.decode(part, bucket.size, skips)  # (m, C or 2 C, h, w)
            outputs.append(pad_images(output, *shape[-2:]))
        return torch.cat(outputs).view(shape[0], self.num_outputs * shape[1], *shape[2:])

    def _head(
        self, hidden: Tensor, labels: Tensor, index: Tensor, score: Score | None
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the logits at the flat positions `index`, or their score, chunk by chunk.

        The backward pass computes the logits of each chunk again.

        Args:
            hidden: hidden states of all positions, (B * T, D).
            labels: the targets of all positions, (B, T).
            index: flat indices of the positions that have a target, (K,).
            score: see `forward`.
        """

        def scored(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return score(self.transformer.logits(hidden), targets)

        hidden = hidden[index]  # (K, D)
        if score is None:
            return self.transformer.logits(hidden)
        targets = labels.flatten()[index]
        size = max(1, MAX_LOGITS // self.transformer.config.vocab_size)
        if len(index) <= size:
            return scored(hidden, targets)
        how = {"use_reentrant": False, "preserve_rng_state": False}
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        parts = [checkpoint(scored, *chunk, **how) for chunk in chunks]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def next_logits(self, input_ids: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Return next-token logits after tokens that continue a cached prefix.

        Args:
            input_ids: new token ids, (n, L).
            positions: their positions in the document, (n, L).
            attend: attention with the cache.

        Returns:
            (n, L, V).
        """
        x = self.transformer.tok_embeddings(input_ids)
        return self.transformer.logits(self.transformer(x, positions, attend))

    def denoise(
        self, noised_latents: Tensor, t: Tensor, positions: Tensor, attend: Attention
    ) -> Tensor:
        """Return the denoiser's output for images that continue a cached prefix.

        Args:
            noised_latents: x_t, (n, C, h, w).
            t: noise levels, (n,) in [0, 1].
            positions: positions of the patches in the document, (n, N).
            attend: attention with the cache.

        Returns:
            (n, C or 2 C, h, w).
        """
        patches, skips = self.patch_coder.encode(noised_latents, t)  # (n, N, D)
        hidden = self.transformer(patches, positions, attend)
        return self.patch_coder.decode(hidden, noised_latents.shape[-2:], skips)

    def blocks(self) -> Iterator[tuple[list[nn.Module], str]]:
        """Yield the parts that run one after another, for sharding and activation checkpointing.

        They are the blocks of the Transformer and of a U-Net coder; see `Transformer.blocks`.
        """
        yield from self.transformer.blocks()
        for name in ("down_blocks", "up_blocks"):
            yield from (([block], "forward") for block in getattr(self.patch_coder, name, ()))

    def reset_parameters(self) -> None:
        """Initialize every weight, also of a network that was built on the meta device."""
        self.transformer.reset_parameters()
        if self.patch_coder is not None:
            self.patch_coder.reset_parameters()


def build_network(hparams: Mapping[str, Any]) -> TransfusionModel:
    """Build the network of a run's hyper-parameters, without initializing its weights.

    Args:
        hparams: arguments of `tf_lightning.training.module.Transfusion`, as in a checkpoint. Each
            config is a dataclass or a plain dict.
    """

    def config(name: str, cls: type) -> Any:
        value = hparams.get(name)
        return cls(**value) if isinstance(value, dict) else value

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
def update_ema(ema: nn.Module, net: nn.Module, decay: float, unless: Tensor | None = None) -> None:
    """Set ema to decay * ema + (1 - decay) * net, elementwise, on the device of `ema`.

    Shards need no communication.

    Args:
        ema: the moving average.
        net: the network.
        decay: share of the average that stays, in [0, 1].
        unless: a boolean on the network's device; where it is true, the average stays as it is.
    """
    averages, weights = (
        [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
        for module in (ema, net)
    )
    weights = [w.to(average.device) for w, average in zip(weights, averages, strict=True)]
    if unless is None:
        torch._foreach_lerp_(averages, weights, 1 - decay)
        return
    for average, weight in zip(averages, weights, strict=True):  # needs memory for one of them
        kept = torch.where(unless.to(average.device), average, weight)
        average.lerp_(kept, 1 - decay)


def check_code_options(
    num_codes: int, patch_size: int, unet: UNetConfig | None, config: TransformerConfig
) -> None:
    """Validate the options of a model with discrete image tokens.

    Raises:
        UserError: an option needs continuous latents.
    """
    if patch_size != 1 or unet is not None or config.modality_weights != "shared":
        raise UserError(
            f"num_codes={num_codes} makes each image code a token of the vocabulary; give "
            "patch_size: 1 (for the data too), unet: null and modality_weights: shared"
        )
