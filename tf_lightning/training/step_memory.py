"""Peak memory of a training step on each of many GPUs, measured without them.

The network of a run is built from tensors that have shapes but no memory (FakeTensorMode), and it
is sharded over a process group that sends nothing. Then torch's tracker follows the allocations of
one rank through an optimizer step. Attention takes as much memory as FlexAttention on a GPU.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tf_lightning.batch import Batch
from tf_lightning.model.attention import DenseAttention, sdpa
from tf_lightning.training.fsdp import sharding_mesh
from tf_lightning.training.losses import loss_sums
from tf_lightning.training.module import Transfusion


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank, and of a checkpoint."""

    weights: int
    """Master weights."""
    optimizer: int
    """State of the optimizer."""
    ema: int
    """The moving average; 0 if it is kept on the CPU."""
    peak: int
    """The most that is allocated on the GPU at any time of a step, the three above included."""
    checkpoint: int
    """Weights, moving average and optimizer state of all ranks together."""

    @property
    def activations(self) -> int:
        """Peak without weights, optimizer and EMA: gradients, activations and gathered weights."""
        return self.peak - self.weights - self.optimizer - self.ema


class StepTracker(MemTracker):
    """Counts the memory of all tensors together, and not that of each module.

    FSDPMemTracker counts it by module, for which each must be sharded alone; blocks with separate
    image weights are sharded together.
    """

    def _pre_fw_hook(self, *arguments: Any) -> None:
        """Do nothing when a module begins or ends."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook


class PlannedAttention(DenseAttention):
    """Allocates as much as FlexAttention: no scores, and no mask of all pairs of positions."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
        return sdpa(q.type_as(v), k.type_as(v), v, None)


def plan_memory(
    hparams: Mapping[str, Any], batch: Batch, num_ranks: int, precision: str, accumulate: int = 1
) -> StepMemory:
    """Measure the memory of a training step on one of `num_ranks` GPUs that shard the network.

    Args:
        hparams: arguments of `Transfusion`.
        batch: a batch of one rank.
        num_ranks: number of GPUs.
        precision: precision of the trainer.
        accumulate: batches of an optimizer step.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with quiet(), fake_ranks(num_ranks, hparams.get("shard_size")) as mesh, fake:
        module = build_module({**hparams, "shard_size": None}, precision, mesh)
        return track_step(module, batch._map(fake.from_tensor), accumulate)


def build_module(
    hparams: Mapping[str, Any], precision: str, mesh: Mapping[str, DeviceMesh]
) -> Transfusion:
    """Build the module of a run, sharded over a mesh of CPUs with ModelParallelStrategy's axes."""
    module = Transfusion(**hparams)
    how = {"accelerator": "cpu", "devices": 1, "precision": precision}
    module.trainer = L.Trainer(max_steps=1, barebones=True, **how)
    module._device_mesh = mesh  # as ModelParallelStrategy does
    module.configure_model()
    return module


def track_step(module: Transfusion, batch: Batch, accumulate: int = 1) -> StepMemory:
    """Run the last batch of an optimizer step and the optimizer under torch's memory tracker.

    Before, an update without gradients creates the optimizer's state. It also lets DTensor find out
    how the optimizer treats shards; the tracker would count the tensors that it does this with.

    Args:
        module: a sharded module with a trainer.
        batch: a batch of this rank.
        accumulate: batches of an optimizer step; with several, the last one finds gradients.
    """
    optimizer = module.configure_optimizers()["optimizer"]
    for parameter in module.net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if accumulate == 1:
        optimizer.zero_grad()
    weights = [*module.net.parameters()]
    ema = [] if module.ema is None else [*module.ema.parameters()]
    state = [x for values in optimizer.state.values() for x in values.values() if x.ndim]
    on_gpu = ema if module.hparams.get("ema_device") != "cpu" else []
    tracker = StepTracker()
    tracker.track_external(*map(local, (*weights, *state, *on_gpu)))
    tracker.track_external(*(local(w.grad) for w in weights if w.grad is not None))
    with tracker:
        backward(module, batch)
        optimizer.step()
    (by_kind,) = tracker.get_tracker_snapshot("peak").values()  # of the only device
    return StepMemory(
        *map(local_bytes, (weights, state, on_gpu)),
        peak=by_kind["Total"],
        checkpoint=sum(x.numel() * x.element_size() for x in (*weights, *state, *ema)),
    )


def backward(module: Transfusion, batch: Batch) -> None:
    """Add the gradients of a batch, as `Transfusion.training_step` does."""
    options = module.hparams.causal_images, bool(module.hparams.z_loss_weight)
    attend = PlannedAttention(batch)
    with module.trainer.precision_plugin.forward_context():
        sums = loss_sums(module.net, batch, module.process, *options, attend=attend)
        loss = sums.nll.sum() + sums.code_nll.sum() + sums.diffusion + sums.z
    loss.backward()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of this rank's shards."""
    return sum(x.numel() * x.element_size() for x in map(local, tensors))


@contextmanager
def fake_ranks(num_ranks: int, shard_size: int | None) -> Iterator[Mapping[str, DeviceMesh]]:
    """Be rank 0 of a process group that sends nothing; yield the axes of ModelParallelStrategy.

    The first one is divided by `shard_size` here, because a mesh needs tensors with values.
    """
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        names = ("data_parallel", "tensor_parallel")
        mesh = init_device_mesh("cpu", (num_ranks, 1), mesh_dim_names=names)
        axes = {name: mesh[name] for name in names}
        yield axes | {"data_parallel": sharding_mesh(axes["data_parallel"], shard_size)}
    finally:
        dist.destroy_process_group()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide torch's warnings about tensors without memory, and the messages of a new trainer."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
