"""Floating-point operations of a network, from its sizes.

2 for each weight of a matrix at each position it is applied to, and 4 D L^2 for the attention of a
layer in a document, or in a U-Net's image, of length L.

As torch.utils.flop_counter counts: the whole square of attention although the rule leaves some of
it out, and nothing for norms, activations, embeddings and rotary angles. Padding is not counted,
since the CPU does not compute it and a GPU computes it in vain.

Shapes: B rows, T positions, M images, C x h x w latents, D dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tf_lightning.batch import Batch
from tf_lightning.model.patches import LinearPatchCoder
from tf_lightning.model.transformer import Transformer
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetPatchCoder

BACKWARD = 2  # a backward pass costs two forward passes: the inputs' gradient and the weights'


@dataclass
class Work:
    """What some batches ask of a network; sums over documents and images."""

    tokens: float = 0  # positions that are not padding
    squared_lengths: float = 0  # of documents, in positions
    targets: int = 0  # positions with a vocabulary head
    images: int = 0
    copies: int = 0  # clean ones, which are encoded alone


def squared_lengths(batch: Batch) -> Tensor:
    """Sum of L^2 over the documents, a scalar on the batch's device; nothing waits for it."""
    real = (batch.document_ids >= 0).double()
    lengths = torch.zeros_like(real).scatter_add_(1, batch.document_ids.clamp(min=0), real)
    return lengths.square().sum()


def weights(module: nn.Module) -> int:
    """Weights of all matrices and convolutions, without biases."""
    kinds = (nn.Linear, nn.Conv2d)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))


def transformer_flops(transformer: Transformer, work: Work) -> float:
    """Forward. Patches with weights of their own cost what text does."""
    attention = 4 * transformer.config.dim * len(transformer.layers) * work.squared_lengths
    matrices = weights(transformer.layers) * work.tokens
    return attention + 2 * (matrices + weights(transformer.output) * work.targets)


def encoder_flops(coder: LinearPatchCoder | UNetPatchCoder, size: tuple[int, int]) -> float:
    """Forward, from one image with latents of `size` = (h, w) to its patches."""
    area = size[0] * size[1]
    patches = area // coder.patch_size**2
    total = 2 * (weights(coder.time_embedder) + weights(coder.patch_encoder) * patches)
    if hasattr(coder, "input_norm"):
        total += 2 * weights(coder.input_norm)  # once an image
    if isinstance(coder, UNetPatchCoder):
        total += 2 * weights(coder.conv_in) * area
        for index, block in enumerate(coder.down_blocks):
            here = area // 4**index
            total += block_flops(block, here)
            if index < len(coder.down_blocks) - 1:
                total += 2 * weights(block.downsamplers) * here // 4
    return total


def decoder_flops(coder: LinearPatchCoder | UNetPatchCoder, size: tuple[int, int]) -> float:
    """Forward, from the patches of one image to the output of `size` = (h, w)."""
    area = size[0] * size[1]
    total = 2 * weights(coder.patch_decoder) * (area // coder.patch_size**2)
    if hasattr(coder, "output_norm"):
        total += 2 * weights(coder.output_norm)
    if isinstance(coder, UNetPatchCoder):
        total += 2 * weights(coder.conv_out) * area
        for index, block in enumerate(reversed(coder.up_blocks)):
            here = area // 4**index
            total += block_flops(block, here)
            if index > 0:
                total += 2 * weights(block.upsamplers) * here * 4
    return total


def block_flops(block: nn.Module, area: int) -> float:
    """The residual blocks and attentions of one of diffusers' blocks, at `area` pixels."""
    total = 0.0
    for resnet in block.resnets:
        time = weights(resnet.time_emb_proj)  # once an image
        total += 2 * (time + (weights(resnet) - time) * area)
    for attention in getattr(block, "attentions", ()):
        total += 2 * weights(attention) * area + 4 * attention.inner_dim * area**2
    return total


def forward_flops(net: TransfusionModel, work: Work, size: tuple[int, int] | None) -> float:
    """Forward FLOPs of `work`, whose images have latents of `size` = (h, w)."""
    total = transformer_flops(net.transformer, work)
    if size and net.patch_coder is not None:
        total += (work.images + work.copies) * encoder_flops(net.patch_coder, size)
        total += work.images * decoder_flops(net.patch_coder, size)
    return total


def training_flops(net: TransfusionModel, work: Work, size: tuple[int, int] | None) -> float:
    """Forward and backward; a little too many where weights are frozen."""
    return (1 + BACKWARD) * forward_flops(net, work, size)


def positions_ratio(codes: int, patches: int, words: float) -> float:
    """How many times as long a captioned picture is in codes as in patches.

    Of a matched pair (one trunk, one token budget) the one of codes sees that many times fewer
    pictures at equal tokens, and so at equal 6 N D; at equal pictures it takes as many times the
    tokens and FLOPs. Neither is fair to both: a comparison says which it is.

    Args:
        codes: of a picture, N of the one.
        patches: N of the other.
        words: tokens of a caption.
    """
    rest = words + 4  # <bos>, <boi>, <eoi>, <eos>
    return (rest + codes) / (rest + patches)


def flops_6nd(net: TransfusionModel, tokens: float) -> float:
    """6 N D, the papers' estimate: N the Transformer's weights that a token meets, D tokens."""
    return 6 * sum(p.numel() for p in net.transformer.text_parameters()) * tokens
