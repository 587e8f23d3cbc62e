"""Floating-point operations (FLOPs) of a network, computed from its sizes.

A matrix of N weights costs 2 N at each position that it is applied to. Attention with H heads of
dim K costs 4 H K L^2 in each layer for each document of length L, or for each image in a U-Net.

The rules follow torch.utils.flop_counter: attention counts every pair of positions although
the mask hides some of them, and norms, activations, embeddings and rotary angles count nothing.
Padding is not counted: the CPU does not compute it, and on a GPU it is wasted.

Shapes: B rows, T positions, M images, C latent channels, h x w latent grid, D model dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tf_lightning.batch import Batch
from tf_lightning.model.patches import LinearPatchCoder
from tf_lightning.model.transformer import Transformer
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetPatchCoder

# A backward pass costs twice a forward pass: gradients of inputs and gradients of weights.
BACKWARD = 2


@dataclass
class Workload:
    """Work of a network for some batches: sums over documents and images."""

    num_tokens: float = 0  # positions that are not padding
    squared_lengths: float = 0  # sum of L^2 over documents of L positions
    num_targets: int = 0  # positions with a vocabulary head
    num_images: int = 0
    num_copies: int = 0  # clean copies, which are encoded but not decoded


def squared_lengths(batch: Batch) -> Tensor:
    """Sum of L^2 over the documents of a batch: a scalar on its device, without synchronizing."""
    real = (batch.document_ids >= 0).double()
    lengths = torch.zeros_like(real).scatter_add_(1, batch.document_ids.clamp(min=0), real)
    return lengths.square().sum()


def training_flops(net: TransfusionModel, work: Workload, size: tuple[int, int] | None) -> float:
    """FLOPs of a forward and a backward pass; slightly too many if weights are frozen."""
    return (1 + BACKWARD) * forward_flops(net, work, size)


def forward_flops(net: TransfusionModel, work: Workload, size: tuple[int, int] | None) -> float:
    """FLOPs of a forward pass.

    Args:
        net: the network.
        work: the work of the network.
        size: (h, w) of the latents of all images; None: there are no images.
    """
    total = transformer_flops(net.transformer, work)
    if size and net.patch_coder is not None:
        num_encoded = work.num_images + work.num_copies
        total += num_encoded * encoder_flops(net.patch_coder, size)
        total += work.num_images * decoder_flops(net.patch_coder, size)
    return total


def flops_6nd(net: TransfusionModel, tokens: float) -> float:
    """6 N D: N Transformer parameters used per token, D tokens."""
    return 6 * sum(p.numel() for p in net.transformer.text_parameters()) * tokens


# ---------------------------------------------------------------- parts of the network


def num_matmul_params(module: nn.Module) -> int:
    """Number of weights of all matrices and convolutions in a module, without biases."""
    kinds = (nn.Linear, nn.Conv2d)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))


def transformer_flops(transformer: Transformer, work: Workload) -> float:
    """FLOPs of the Transformer; separate image weights do not change them."""
    config = transformer.config
    q_dim = config.num_heads * config.head_size
    attention = 4 * q_dim * config.num_layers * work.squared_lengths
    matrices = num_matmul_params(transformer.layers) * work.num_tokens
    return attention + 2 * (matrices + num_matmul_params(transformer.output) * work.num_targets)


def encoder_flops(coder: LinearPatchCoder | UNetPatchCoder, size: tuple[int, int]) -> float:
    """FLOPs from one image with latents of `size` (h, w) to its patches."""
    area = size[0] * size[1]
    num_patches = area // coder.patch_size**2
    total = 2 * num_matmul_params(coder.time_embedder)  # once per image
    total += 2 * num_matmul_params(coder.patch_encoder) * num_patches
    if hasattr(coder, "input_norm"):
        total += 2 * num_matmul_params(coder.input_norm)  # once per image
    if isinstance(coder, UNetPatchCoder):
        total += 2 * num_matmul_params(coder.conv_in) * area
        for index, block in enumerate(coder.down_blocks):
            block_area = area // 4**index
            total += block_flops(block, block_area)
            if index < len(coder.down_blocks) - 1:
                total += 2 * num_matmul_params(block.downsamplers) * block_area // 4
    return total


def decoder_flops(coder: LinearPatchCoder | UNetPatchCoder, size: tuple[int, int]) -> float:
    """FLOPs from the patches of one image to an output of `size` (h, w)."""
    area = size[0] * size[1]
    total = 2 * num_matmul_params(coder.patch_decoder) * (area // coder.patch_size**2)
    if hasattr(coder, "output_norm"):
        total += 2 * num_matmul_params(coder.output_norm)
    if isinstance(coder, UNetPatchCoder):
        total += 2 * num_matmul_params(coder.conv_out) * area
        for index, block in enumerate(reversed(coder.up_blocks)):
            block_area = area // 4**index
            total += block_flops(block, block_area)
            if index > 0:
                total += 2 * num_matmul_params(block.upsamplers) * block_area * 4
    return total


def block_flops(block: nn.Module, area: int) -> float:
    """FLOPs of the residual and attention layers of a diffusers block, at `area` latent pixels."""
    total = 0.0
    for resnet in block.resnets:
        time = num_matmul_params(resnet.time_emb_proj)  # once per image
        total += 2 * (time + (num_matmul_params(resnet) - time) * area)
    for attention in getattr(block, "attentions", ()):
        total += 2 * num_matmul_params(attention) * area + 4 * attention.inner_dim * area**2
    return total
