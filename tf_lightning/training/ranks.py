"""Checks that all ranks hold the same weights.

DDP copies rank 0's weights once and then relies on equal updates. A rank that differs, from a
memory error or a part of the network that is not synchronized, would go unnoticed.
"""

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tf_lightning.errors import UserError

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def checksum(values: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers, () int64 on its device."""
    bits = values.detach().contiguous().view(INTEGERS[values.element_size()])
    return bits.sum(dtype=torch.int64)


def check_same_weights(module: L.LightningModule, alone: bool = False) -> None:
    """Compare all weights and buffers that every rank holds completely.

    Args:
        module: the trained module.
        alone: the other ranks do not call this; then only an earlier result counts.

    Raises:
        UserError: on every rank that calls it, if the ranks differ in a tensor.
    """
    if getattr(module, "ranks_differ", False):
        raise UserError("the weights are not the same on all ranks, so they are not saved")
    if module.trainer.world_size == 1 or alone:
        return
    # FSDP gives each rank a part of a tensor of its own.
    whole = {n: x for n, x in module.state_dict().items() if not isinstance(x, DTensor)}
    if not whole:
        return
    ours = torch.stack([checksum(x).to(module.device) for x in whole.values()])
    gathered = module.all_gather(ours)  # (ranks, tensors)
    differs = (gathered != gathered[0]).any(0).tolist()
    if any(differs):
        module.ranks_differ = True
        first = next(name for name, is_other in zip(whole, differs, strict=True) if is_other)
        raise UserError(
            f"{sum(differs)} of {len(whole)} tensors are not the same on all ranks, the first is "
            f"{first}; resume from an older checkpoint, and if it happens again, look for a "
            "faulty device or for weights that are trained outside the strategy"
        )
