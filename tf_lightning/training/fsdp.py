"""Fully sharded data parallelism (FSDP2, and HSDP with replicas) for a Transfusion network."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from tf_lightning.errors import UserError
from tf_lightning.model.transfusion import TransfusionModel


def apply_fsdp(
    net: TransfusionModel, mesh: DeviceMesh, precision: str, reshard_after_forward: bool
) -> None:
    """Shard a network's parameters, gradients and optimizer state over the ranks of a mesh.

    Each block is gathered when it runs. The remaining parameters are gathered with the whole
    network.

    Args:
        net: the network; all ranks have the same weights, or none yet (the meta device).
        mesh: the ranks, from `sharding_mesh`.
        precision: the trainer's. With "bf16-mixed", weights are gathered and blocks compute in
            bf16; the shards, their gradients and the sums of gradients over ranks stay in fp32.
        reshard_after_forward: free the gathered weights of a block after its forward pass, and
            gather them again in the backward pass.
    """
    # Noise levels and rotary angles stay in fp32; autocast casts what a layer needs in bf16.
    in_bf16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(
        **(in_bf16 if precision == "bf16-mixed" else {}), cast_forward_inputs=False
    )
    for modules, method in net.blocks():
        fully_shard(
            modules, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
        )
        if method != "forward":
            register_fsdp_forward_method(modules[0], method)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    for method in ("next_logits", "denoise"):  # called by generation in place of `forward`
        register_fsdp_forward_method(net, method)


def sharding_mesh(data_parallel: DeviceMesh, shard_size: int | None) -> DeviceMesh:
    """Return the mesh that parameters are sharded over.

    Args:
        data_parallel: all ranks, a one-dimensional mesh.
        shard_size: number of consecutive ranks that share one copy of the parameters, which the
            other groups of as many ranks replicate (HSDP); None: all ranks share one.
    """
    if shard_size is None:
        return data_parallel
    shape = (data_parallel.size() // shard_size, shard_size)
    return init_device_mesh(data_parallel.device_type, shape, mesh_dim_names=("replicate", "shard"))


class DrawWhole(TorchFunctionMode):
    """Let random initial values in this context equal those of a network that is not sharded.

    A sharded tensor is drawn whole, in memory for one tensor, and each rank keeps its part. For a
    tensor on the meta device, the same numbers are drawn and dropped. Constructors on the meta
    device so leave the generator in the same state.

    Args:
        device: where to draw; the generators of a CPU and a GPU differ.
    """

    draws = {"normal_", "uniform_", "kaiming_uniform_"}  # methods of tensors and of nn.init

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    @torch.no_grad()
    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, on a whole tensor if it draws a sharded or an empty one."""
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", None) not in self.draws:
            return function(*args, **kwargs)
        tensor, *args = args or (kwargs.pop("tensor"),)
        if not (tensor.is_meta or isinstance(tensor, DTensor)):
            return function(tensor, *args, **kwargs)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        function(whole, *args, **kwargs)
        return tensor.copy_(cut(whole, tensor)) if isinstance(tensor, DTensor) else tensor


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that every rank has, sharded as `like`.

    Args:
        whole: the same on every rank.
        like: a sharded tensor; for any other, `whole` is returned.
    """
    if not isinstance(like, DTensor):
        return whole
    # Without a source rank, nothing is sent.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


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
