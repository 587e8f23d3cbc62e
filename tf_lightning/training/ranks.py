"""Checks that all ranks hold the same weights.

DDP copies rank 0's weights once and then relies on equal updates, and so do the groups of HSDP. A
rank that differs, from a memory error or a part of the network that is not synchronized, would go
unnoticed.
"""

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tf_lightning.errors import UserError

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def checksum(values: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers, () int64 on its device."""
    values = values.to_local() if isinstance(values, DTensor) else values
    bits = values.detach().contiguous().view(INTEGERS[values.element_size()])
    return bits.sum(dtype=torch.int64)


def ranks_of_copy(tensor: Tensor) -> int:
    """Return how many consecutive ranks share one copy of a tensor."""
    return tensor.device_mesh.size(-1) if isinstance(tensor, DTensor) else 1


def check_same_weights(module: L.LightningModule, alone: bool = False) -> None:
    """Compare all weights and buffers of which there are several copies: not those of FSDP2.

    Args:
        module: the trained module.
        alone: the other ranks do not call this; then only an earlier result counts.

    Raises:
        UserError: on every rank that calls it, if the copies of a tensor differ.
    """
    if getattr(module, "ranks_differ", False):
        raise UserError("the weights are not the same on all ranks, so they are not saved")
    ranks = module.trainer.world_size
    if ranks == 1 or alone:
        return
    copied = {n: x for n, x in module.state_dict().items() if ranks_of_copy(x) < ranks}
    if not copied:
        return
    ours = torch.stack([checksum(x).to(module.device) for x in copied.values()])
    of_tensors = module.all_gather(ours).T.cpu()  # (tensors, ranks)
    found = []
    for (name, tensor), sums in zip(copied.items(), of_tensors, strict=True):
        copies = sums.view(-1, ranks_of_copy(tensor))
        if (copies != copies[0]).any():
            found.append(name)
    if found:
        module.ranks_differ = True
        raise UserError(
            f"{len(found)} of {len(copied)} tensors are not the same on all ranks, the first is "
            f"{found[0]}; resume from an older checkpoint, and if it happens again, look for a "
            "faulty device or for weights that are trained outside the strategy"
        )
