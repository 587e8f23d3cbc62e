"""The memory that training steps of two ranks take on the CPU, from events of torch's allocator."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from support.ranks import run_ranks
from tf_lightning.batch import Batch
from tf_lightning.cli.plan import make_batch
from tf_lightning.training.module import Transfusion
from tf_lightning.training.step_memory import backward, build_module, local_bytes

TRANSFORMER = {"vocab_size": 500, "dim": 128, "num_layers": 3, "num_heads": 4, "ffn_dim": 352}
NUM_STEPS = 5
HPARAMS = {"transformer": TRANSFORMER, "patch_size": 2, "latent_channels": 8}


def small_batch() -> Batch:
    """Two rows of text and images."""
    return make_batch(2, 512, (8, 16, 16), 2)


def measured_peaks(cases: dict[str, tuple[str, dict]], file: Path) -> dict[str, int]:
    """Return the peak of a training step of two ranks, for each (precision, hyper-parameters)."""
    run_ranks((cases, file), 2, run=_measure)
    return json.loads(file.read_text())


def _measure(arguments: tuple[dict[str, tuple[str, dict]], Path]) -> None:
    """Measure as one of two ranks; rank 0 writes the peaks."""
    cases, file = arguments
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    names = ("data_parallel", "tensor_parallel")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=names)
    peaks = {
        name: _peak(build_module(hparams, precision, mesh))
        for name, (precision, hparams) in cases.items()
    }
    if dist.get_rank() == 0:
        file.write_text(json.dumps(peaks))
    dist.destroy_process_group()


def _peak(module: Transfusion) -> int:
    """Bytes of a rank at the peak of a training step: the lowest of several steps and both ranks.

    gloo's threads hold the tensors of a collective a little longer than the main thread waits for
    it, so that some steps have a higher peak.
    """
    optimizer, batch = module.configure_optimizers()["optimizer"], small_batch()
    backward(module, batch)
    optimizer.step()
    optimizer.zero_grad()
    state = [x for values in optimizer.state.values() for x in values.values()]
    kept = local_bytes([*module.net.parameters(), *module.ema.parameters(), *state])
    lowest = torch.tensor(min(_peak_of_step(module, optimizer, batch) for _ in range(NUM_STEPS)))
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return kept + int(lowest)


def _peak_of_step(module: Transfusion, optimizer: Optimizer, batch: Batch) -> int:
    """Bytes that a step allocates at its peak; it leaves no gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        backward(module, batch)
        optimizer.step()
    optimizer.zero_grad()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
