"""Checkpoints of the LightningModule, and exact resume."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing import ProcessExitedException

from support import ranks, runs
from support.compare import bit_equal
from tf_lightning.cli.main import main
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.tokenizer.tokenizer import Tokenizer

# Checkpoints


def variant_config(config: dict) -> None:
    """Several variants at once, without callbacks that generate images."""
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:3]
    config["model"] |= {"patch_size": 2, "learned_sigma": True, "min_snr_gamma": 5.0}
    config["model"]["unet"] = {"channels": [4, 8], "num_blocks": 1, "head_dim": 8}
    config["model"]["transformer"]["modality_weights"] = "all"
    config["model"]["text_lr_ratio"] = 0.5
    config["data"]["init_args"] |= {"patch_size": 2, "row_length": 1200, "batch_size": 1}


def test_a_variants_checkpoint_loads_and_resumes(tmp_path):
    arguments = ["fit", "-c", str(runs.write_config(tmp_path, variant_config))]
    arguments += ["--trainer.limit_val_batches=1"]
    main([*arguments, "--trainer.max_steps=3"])
    main([*arguments, "--trainer.max_steps=6", "--ckpt_path=last"])
    checkpoint = load(tmp_path / "run")
    assert checkpoint["global_step"] == 6
    pipe = TransfusionPipeline.from_pretrained(tmp_path / "run" / "checkpoints" / "last.ckpt")
    net = pipe.model.net
    assert net.num_outputs == 2 and net.transformer.config.modality_weights == "all"
    for name, value in net.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"ema.{name}"])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 6 and all(map(math.isfinite, losses))


def load(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_a_checkpoint_contains_both_networks_the_tokenizer_and_the_autoencoders_name(run):
    checkpoint = load(run)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"net", "ema"}
    assert checkpoint["image_codec"] == {
        "autoencoder": "pixels",
        "fingerprint": "pixels",
        "latent_shape": [3, 64, 64],
    }
    proto = bytes(checkpoint["tokenizer"].numpy())
    # Other tests may add tokenizers of other data to this folder.
    files = (run.parent / "data").glob("tokenizer-*.model")
    assert proto in [file.read_bytes() for file in files]
    assert Tokenizer.from_proto(proto).vocab_size == runs.VOCAB_SIZE


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    kill = ["--trainer.callbacks+=support.runs.StopAt", "--trainer.callbacks.step=5"]
    with pytest.raises(runs.Killed):
        runs.fit(tmp_path, *kill)
    assert load(tmp_path / "run")["global_step"] == 5  # saved when it crashed
    resumed = load(runs.fit(tmp_path, "--ckpt_path", "last"))
    whole = load(run)
    assert whole["global_step"] == resumed["global_step"] == runs.MAX_STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "Mixture"):
        assert bit_equal(whole[part], resumed[part]), part
    assert not bit_equal(whole["state_dict"], load(run, "step0000003")["state_dict"])
    steps = {"next_row": 2 * runs.MAX_STEPS, "global_step": runs.MAX_STEPS}
    assert whole["Mixture"] == steps | {"seed": 0}


@pytest.mark.slow
def test_a_run_killed_with_its_workers_resumes_bit_identically(run, tmp_path):
    """It is killed two steps after a checkpoint; the uninterrupted run has no workers."""
    workers = "--data.init_args.num_workers=2"
    config = str(runs.write_config(tmp_path))
    kill = ["--trainer.callbacks+=support.runs.KillAt", "--trainer.callbacks.step=5"]
    with pytest.raises(ProcessExitedException) as ended:
        ranks.run_ranks(["fit", "-c", config, workers, *kill], 1)
    assert ended.value.exit_code == -signal.SIGKILL
    assert load(tmp_path / "run")["global_step"] == 3
    resumed, whole = load(runs.fit(tmp_path, "--ckpt_path", "last", workers)), load(run)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "Mixture"):
        assert bit_equal(whole[part], resumed[part]), part


def test_a_resumed_run_continues_to_count_seconds(run, tmp_path):
    first = load(run, "step0000003")
    (state,) = [s for name, s in first["callbacks"].items() if "Throughput" in name]
    state |= {"fit_seconds": 1000.0, "validation_seconds": 100.0}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(first, tmp_path / "run" / "checkpoints" / "last.ckpt")
    last = load(runs.fit(tmp_path, "--ckpt_path", "last"))
    (state,) = [s for name, s in last["callbacks"].items() if "Throughput" in name]
    assert 1000 < state["fit_seconds"] < 1100
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 1000 < report["train_seconds"] < 1100
    assert 100 < report["validation_seconds"] < report["train_seconds"] - 900
