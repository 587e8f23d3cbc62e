"""Activation checkpointing: memory for the activations of a block is traded for time.

A block keeps its inputs and, with "selective", the outputs of its matrix products, convolutions and
attention. The backward pass computes the rest once more, from the same numbers, so the gradients
are the same (Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198).
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tf_lightning.model.transfusion import TransfusionModel

aten = torch.ops.aten
EXPENSIVE = {
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
    *(aten._scaled_mm.default, aten.max.default),  # of fp8, whose scales need the largest value
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.higher_order.inductor_compiled_code,  # FlexAttention outside of a compiled network
}


def checkpoint_activations(net: TransfusionModel, mode: str) -> None:
    """Let the blocks of a network keep fewer activations for the backward pass.

    Modules and their weights keep their names. Call it before `apply_fsdp`, so that the weights of
    a block are gathered once for both of its passes.

    Args:
        net: the network, changed in place.
        mode: "none": keep all activations. "selective": keep the outputs of matrix products,
            convolutions and attention. "full": keep only the inputs of each block.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    options["preserve_rng_state"] = net.transformer.config.dropout > 0
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_or_recompute)
    for (block, *_), method in net.blocks():
        setattr(block, method, partial(checkpoint, getattr(block, method), **options))


def keep_or_recompute(
    context: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Return whether the output of an operation is kept for the backward pass."""
    kept = operation in EXPENSIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
