"""Fully sharded data parallelism (FSDP2) for a Transfusion network."""

from itertools import chain

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tf_lightning.errors import UserError
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


def reshard(net: nn.Module) -> None:
    """Free the gathered parameters of a sharded network; any other network stays as it is.

    After a forward pass without a backward pass, such as in validation, the parameters outside the
    blocks would stay gathered, and neither the moving average nor a checkpoint could use them.
    """
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def number_states_by_module(state: dict, optimizer: Optimizer, module: nn.Module) -> None:
    """Number the parameters in an optimizer's state by their place in `module.parameters()`.

    A plain optimizer numbers them by their place in its parameter groups. The trainer saves and
    loads the state of a sharded module by the place in the module; with the same numbers in every
    checkpoint, each kind of run resumes the other. A plain optimizer ignores the numbers.

    Args:
        state: the optimizer's state dict, changed in place.
        optimizer: the optimizer; a sharded one has these numbers already.
        module: the LightningModule.
    """
    places = {id(p): place for place, p in enumerate(module.parameters())}
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return
    numbers = [places[id(parameter)] for parameter in parameters]
    state["state"] = {numbers[old]: values for old, values in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [numbers[old] for old in group["params"]]


def check_numbers(checkpoint: dict) -> None:
    """Refuse to resume with FSDP2 a checkpoint whose optimizer numbers parameters by its groups.

    Raises:
        UserError: an older version wrote the checkpoint on one device or with DDP.
    """
    for state in checkpoint.get("optimizer_states", []):
        groups = [group["params"] for group in state["param_groups"] if group["params"]]
        numbers = list(chain.from_iterable(groups))
        if len(groups) > 1 and numbers == list(range(len(numbers))):
            raise UserError(
                "this checkpoint is of an older version, which could not continue with FSDP2 what "
                "ran without it; resume it with the strategy auto or ddp until it has saved "
                "another checkpoint, and resume that with FSDP2"
            )
