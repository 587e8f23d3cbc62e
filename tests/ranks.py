"""The same run by one process and by two, which differ in nothing but who computes what."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
from tf_lightning.cli import main
from tf_lightning.data import Mixture
from tf_lightning.data.shapes_sources import ShapesCaptions, ShapesTexts

ROOT = Path(__file__).resolve().parents[1]


def two_rank_config(config: dict) -> None:
    """Three steps; with one row a rank, some rank has no picture and some step has none at all."""
    data = config["data"]["init_args"]
    data["weights"] = {"captions": 0.5, "text": 0.5}
    config["trainer"] |= {"max_steps": 3, "limit_val_batches": 0, "callbacks": []}
    config["trainer"]["callbacks"] = runs.config(Path())["trainer"]["callbacks"][:1]


def pictures_in_rows(cache_dir: Path, count: int, **codec) -> list[int]:
    """How many pictures each of the first rows of `two_rank_config` has."""
    codec = {"autoencoder": "pixels", "patch_size": 16} | codec
    data = Mixture(
        {"captions": ShapesCaptions(runs.NUM_CAPTIONS, 6), "text": ShapesTexts(40, 6)},
        {"captions": 0.5, "text": 0.5},
        **{"vocab_size": runs.VOCAB_SIZE, "row_length": 256, "batch_size": 1},
        **{"cache_dir": str(cache_dir), **codec},
    )
    data.setup()
    batches = iter(data.train_dataloader())
    return [next(batches).num_images for _ in range(count)]


def logged(run: Path, names: tuple[str, ...]) -> list[float]:
    """Numbers of every step."""
    events = EventAccumulator(str(run)).Reload()
    return [event.value for name in names for event in events.Scalars(f"train/{name}")]


SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
        "process_group_backend": "gloo",
    },
}


def fit(config: Path, ranks: int, strategy: str, *more: str) -> None:
    """Two rows a step by one rank, in this process, or by two in their own."""
    command = ["fit", "-c", str(config), f"--trainer.devices={ranks}", *more]
    command += [f"--data.init_args.batch_size={2 // ranks}"]
    if ranks == 1:
        return main(command)
    command = [sys.executable, "-m", "tf_lightning", *command, f"--trainer.strategy={strategy}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=180)


def check_same(one: Path, other: Path, losses: tuple[str, ...], num_steps: int) -> None:
    """Two runs have the same losses and gradient norms, and end with the same weights."""
    names = (*losses, "grad_norm")
    first, second = (logged(run, names) for run in (one, other))
    assert len(first) == len(names) * num_steps
    assert first == pytest.approx(second, rel=1e-5)  # Adam would hide a wrong scale
    first, second = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (one, other)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=2e-6, rtol=1e-5, msg=name)
