"""Weights, gradients and optimizer state in shares, one a rank (FSDP2): applied from outside."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from tf_lightning.model.transfusion import TransfusionModel


def shard(net: TransfusionModel, mesh: DeviceMesh) -> None:
    """Share a network's parameters among the ranks of a mesh of one dimension.

    Each block is gathered when it runs and given back behind it; what is left, with the network.
    Blocks whose patches have weights of their own are run part by part, which no hook sees: these
    are all gathered with the network.

    Args:
        net: the same on every rank, weights included.
        mesh: the ranks.
    """
    if net.transformer.config.modality_weights == "shared":
        for block in net.transformer.layers:
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for method in ("next_logits", "denoise"):  # generation's, beside `forward`
        register_fsdp_forward_method(net, method)
