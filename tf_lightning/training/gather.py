"""A whole copy of a sharded network on each rank, which samples without the other ranks.

Ranks sample different prompts in different numbers of forward passes. A sharded network needs all
ranks in each pass, so the ranks that finish early would leave the others waiting forever.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from tf_lightning.errors import UserError
from tf_lightning.model.transfusion import TransfusionModel, build_network
from tf_lightning.training.fsdp import reshard

COPY_SHARE = 0.8  # of a device's free memory; the rest is for activations and cached keys


@torch.no_grad()
def gather_network(
    net: TransfusionModel, hparams: Mapping[str, Any], device: torch.device, precision: str
) -> TransfusionModel:
    """Return a copy of a sharded network with all weights, in evaluation mode.

    All ranks must call this together. The weights keep their dtype if the copy fits into the free
    memory of every rank's device. Otherwise they are bf16 if the trainer computes in bf16 anyway.

    Args:
        net: the network, sharded by `apply_fsdp`.
        hparams: hyper-parameters that `build_network` builds it from.
        device: this rank's device.
        precision: the trainer's precision.

    Raises:
        UserError: the copy does not fit.
    """
    reshard(net)  # the optimizer updates the shards, so gathered parameters may be stale
    weights = net.state_dict(keep_vars=True)
    dtype = copy_dtype([*net.parameters()], device, precision)
    whole = {id(w): gather(w, device, dtype) for w in weights.values()}  # tied weights once
    with torch.device("meta"):
        copy = build_network(hparams)
    copy.load_state_dict({name: whole[id(w)] for name, w in weights.items()}, assign=True)
    return copy.requires_grad_(False).eval()


def gather(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a weight with all its shards; each rank sends its own shard in `dtype`."""
    weight = weight.detach().to(device, dtype)
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()


def copy_dtype(weights: Sequence[Tensor], device: torch.device, precision: str) -> torch.dtype:
    """Choose the dtype of a copy of all weights by its size, and say which.

    Raises:
        UserError: there is too little free memory for the copy.
    """
    count, own = sum(weight.numel() for weight in weights), weights[0].dtype
    free = free_memory(device)
    dtypes = [own, torch.bfloat16] if precision == "bf16-mixed" else [own]
    for dtype in dtypes:
        if count * dtype.itemsize <= COPY_SHARE * free:
            name, size = str(dtype).removeprefix("torch."), count * dtype.itemsize / 2**30
            rank_zero_info(f"Sampling from a whole copy of the weights: {name}, {size:.2f} GiB.")
            return dtype
    raise UserError(
        f"a whole copy of the network for sampling takes {count * dtype.itemsize / 2**30:.1f} GiB, "
        f"but a device has {free / 2**30:.1f} GiB free, of which a copy may take "
        f"{COPY_SHARE:.0%}; train on more ranks, or set the callbacks that sample to null and "
        "`validate` the checkpoint on one device"
    )


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on every rank's device; infinite on CPUs, which can swap."""
    if device.type == "cpu":
        return float("inf")
    torch.accelerator.empty_cache()  # memory that torch holds but does not use is free too
    free = torch.tensor(torch.accelerator.get_memory_info(device)[0], device=device)
    torch.distributed.all_reduce(free, torch.distributed.ReduceOp.MIN)
    return free.item()
