"""Fully sharded data parallelism (FSDP2) for a Transfusion network."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from tf_lightning.model.transfusion import TransfusionModel


def apply_fsdp(net: TransfusionModel, mesh: DeviceMesh) -> None:
    """Shard a network's parameters, gradients and optimizer state over the ranks of a mesh.

    Each block is gathered when it runs and freed afterwards; the remaining parameters are gathered
    with the whole network. With separate image weights, the parts of a block are called one by one,
    which FSDP's hooks do not see, so these blocks are gathered with the network too.

    Args:
        net: the network, with the same weights on every rank.
        mesh: one-dimensional mesh of the ranks.
    """
    if net.transformer.config.modality_weights == "shared":
        for block in net.transformer.layers:
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for method in ("next_logits", "denoise"):  # called by generation in place of `forward`
        register_fsdp_forward_method(net, method)
