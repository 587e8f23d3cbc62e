"""Checkpoints: what a file names, and files of older versions, in every place that reads one."""

import pickletools
import shutil
import sys
import zipfile
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch

from support import autoencoder_runs, runs
from support.compare import bit_equal
from support.sharded_folders import write_sharded
from support.tiny import SIZES
from tf_lightning.checkpoint import AUTOENCODER, OLD_CONFIGS, read_checkpoint, select_weights
from tf_lightning.cli.main import main
from tf_lightning.data import Mixture
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.interop.export import export, read_weights
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.unet import UNetConfig
from tf_lightning.shapes.sources import ShapesCaptions
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

OLD_NAMES = {"modality_weights": "image_weights", "pos_embed": "place"}


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the field names of older versions."""
    return {OLD_NAMES.get(name, name): value for name, value in config.items()}


def old_config(name: str, fields: dict[str, Any]) -> Any:
    """A dataclass under the module path that it had; it can be pickled once it is importable."""
    (path,) = (path for path in OLD_CONFIGS if path.endswith(f".{name}"))
    module, _, name = path.rpartition(".")
    kind = make_dataclass(name, fields)
    kind.__module__ = module
    sys.modules[module] = ModuleType(module)
    setattr(sys.modules[module], name, kind)
    return kind(**fields)


def save_as_python_did(checkpoint: dict, configs: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whose hyper-parameters are pickled dataclasses of older versions."""
    checkpoint["hyper_parameters"] |= configs
    torch.save(checkpoint, path)
    for old in OLD_CONFIGS:
        sys.modules.pop(old.rpartition(".")[0], None)


def globals_of(path: Path) -> set[str]:
    """The classes and functions that a checkpoint's pickle names."""
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        return {arg for op, arg, _ in pickletools.genops(file.read(name)) if op.name == "GLOBAL"}


# Transfusion


def change(config: dict) -> None:
    """A run of three steps with every config whose fields were renamed or nested."""
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    config["trainer"] |= {"max_steps": 3, "limit_val_batches": 1}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_length"] = 64
    config["model"]["transformer"] |= {"modality_weights": "all", "rope_scaling": scaling}
    config["model"]["linear"] = {"pos_embed": "sincos"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    main(["fit", "-c", str(runs.write_config(folder, change))])
    return folder / "run"


@pytest.fixture(scope="module")
def new(run) -> Path:
    return run / "checkpoints" / "step0000003.ckpt"


@pytest.fixture(scope="module", params=["command line", "python"])
def old(new, tmp_path_factory, request) -> Path:
    """The run's checkpoint as older versions wrote it."""
    checkpoint = torch.load(new, weights_only=True)
    path = tmp_path_factory.mktemp("old") / "old.ckpt"
    transformer, linear = (
        old_names(checkpoint["hyper_parameters"][name]) for name in ("transformer", "linear")
    )
    assert transformer["image_weights"] == "all" and linear["place"] == "sincos"
    if request.param == "command line":
        names = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
        checkpoint["hyper_parameters"] |= {"transformer": transformer, "linear": linear} | names
        torch.save(checkpoint, path)
        return path
    transformer["rope_scaling"] = old_config("RopeScaling", transformer["rope_scaling"])
    configs = {
        "transformer": old_config("TransformerConfig", transformer),
        "linear": old_config("LinearConfig", linear),
    }
    save_as_python_did(checkpoint, configs, path)
    assert "tf_lightning.transformer TransformerConfig" in globals_of(path)
    return path


def test_a_checkpoint_of_the_command_line_names_no_class_of_ours(new):
    assert not [name for name in globals_of(new) if "lightning" in name]
    hparams = torch.load(new, weights_only=True)["hyper_parameters"]
    assert not [name for name in hparams if name.startswith("_")]


def test_a_checkpoint_from_python_names_no_class_of_ours(tmp_path):
    config = TransformerConfig(vocab_size=runs.VOCAB_SIZE, **SIZES)
    unet = UNetConfig((4, 8), num_blocks=1, head_dim=8)
    module = Transfusion(config, patch_size=2, latent_channels=3, unet=unet)
    data = Mixture(
        {"captions": ShapesCaptions(9, 3)},
        **{"autoencoder": "pixels", "vocab_size": runs.VOCAB_SIZE, "patch_size": 2},
        **{"row_length": 1200, "batch_size": 1, "cache_dir": str(tmp_path / "data")},
    )
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_steps": 1, "default_root_dir": tmp_path},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0},
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    assert not [name for name in globals_of(tmp_path / "python.ckpt") if "lightning" in name]
    hparams = torch.load(tmp_path / "python.ckpt", weights_only=True)["hyper_parameters"]
    assert TransformerConfig(**hparams["transformer"]) == config
    assert UNetConfig(**hparams["unet"]) == unet
    again = Transfusion.load_from_checkpoint(tmp_path / "python.ckpt", map_location="cpu")
    assert again.config == config and again.unet == unet


def test_a_module_loads_a_sharded_folder_and_the_folder_of_a_run(new, tmp_path):
    """As the same checkpoint in a file; the weights are read when the module exists."""
    file = Transfusion.load_from_checkpoint(new, map_location="cpu", lr=0.5)
    run = tmp_path / "run"
    checkpoint = torch.load(new, weights_only=True)
    folder = write_sharded(checkpoint, run / "checkpoints" / "step0000003.ckpt", num_files=2)
    for path in (folder, str(run)):
        sharded = Transfusion.load_from_checkpoint(path, map_location="cpu", lr=0.5)
        assert sharded.hparams == file.hparams and sharded.hparams.lr == 0.5
        assert bit_equal(sharded.state_dict(), file.state_dict())
        assert sharded.tokenizer_proto == file.tokenizer_proto
        assert sharded.loaded_step == file.loaded_step > 0
    assert Transfusion.load_from_checkpoint(folder, "meta").device.type == "meta"
    with pytest.raises(UserError, match="do not fit this model"):
        Transfusion.load_from_checkpoint(folder, latent_channels=5)


def test_an_old_checkpoint_has_the_hyper_parameters_of_a_new_one(old, new):
    assert read_checkpoint(old)["hyper_parameters"] == read_checkpoint(new)["hyper_parameters"]


def test_an_old_checkpoint_generates(old, new):
    ours, theirs = (TransfusionPipeline.from_pretrained(path, "cpu") for path in (old, new))
    for name, weight in ours.model.net.state_dict().items():
        assert torch.equal(weight, theirs.model.net.state_dict()[name])
    pictures = [
        pipeline("a red circle", num_inference_steps=2, progress=False).images[0].tobytes()
        for pipeline in (ours, theirs)
    ]
    assert pictures[0] == pictures[1]


def test_an_old_checkpoint_validates(old, run, capsys):
    printed = []
    for checkpoint in (old, run / "checkpoints" / "step0000003.ckpt"):
        main(["validate", "-c", str(run.parent / "config.yaml"), "--ckpt_path", str(checkpoint)])
        printed.append(capsys.readouterr().out)
    assert "val/captions/loss_lm" in printed[0] and printed[0] == printed[1]


def test_an_old_checkpoint_resumes(old, run, tmp_path):
    resumed = []
    for checkpoint in (old, run / "checkpoints" / "step0000003.ckpt"):
        folder = tmp_path / checkpoint.stem
        folder.mkdir()
        cache = f"--data.init_args.cache_dir={run.parent / 'data'}"
        config = str(runs.write_config(folder, change))
        main(["fit", "-c", config, cache, "--trainer.max_steps=6", "--ckpt_path", str(checkpoint)])
        resumed.append(read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt"))
    assert resumed[0]["global_step"] == 6
    assert resumed[0]["hyper_parameters"] == resumed[1]["hyper_parameters"]
    for name, weight in resumed[0]["state_dict"].items():
        assert torch.equal(weight, resumed[1]["state_dict"][name]), name


def test_an_old_checkpoint_loads_as_a_module(old, new):
    module = Transfusion.load_from_checkpoint(old, map_location="cpu", lr=0.5)
    assert module.hparams.lr == 0.5 and module.config.modality_weights == "all"
    weights = torch.load(new, weights_only=True)["state_dict"]
    assert all(torch.equal(w, weights[name]) for name, w in module.state_dict().items())


def test_an_old_export_is_read_as_a_new_one(old, new, tmp_path):
    export(read_checkpoint(new), tmp_path / "new", None, {"net"})
    expected = read_weights(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    text = (tmp_path / "old" / "net.json").read_text()
    for name, former in OLD_NAMES.items():
        text = text.replace(f'"{name}"', f'"{former}"')
    (tmp_path / "old" / "net.json").write_text(text)
    assert '"image_weights"' in text
    assert read_weights(tmp_path / "old")["hyper_parameters"] == expected["hyper_parameters"]


def test_a_checkpoint_that_names_another_class_is_refused(new, tmp_path):
    torch.save(torch.load(new, weights_only=True) | {"more": Path("x")}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "other.ckpt")


# Autoencoders


def test_an_old_autoencoders_checkpoint_validates_and_loads_as_a_module(tmp_path, capsys):
    run = autoencoder_runs.fit(tmp_path, "--trainer.limit_val_batches=1", gan_weight=0.0)
    new = run / "checkpoints" / "last.ckpt"
    assert not [name for name in globals_of(new) if "lightning" in name]
    checkpoint = torch.load(new, weights_only=True)
    network = old_config("AutoencoderConfig", checkpoint["hyper_parameters"]["network"])
    names = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "tf_lightning.autoencoder_module.AutoencoderModule",
    } | {"feature_weight": 0.0, "feature_model": None}
    old = tmp_path / "old.ckpt"
    save_as_python_did(checkpoint, {"network": network} | names, old)
    ours, theirs = (read_checkpoint(path, AUTOENCODER)["hyper_parameters"] for path in (old, new))
    assert ours == theirs
    module = AutoencoderModule.load_from_checkpoint(old, map_location="cpu")
    assert torch.equal(
        module.state_dict()["autoencoder.encoder.conv_in.weight"],
        checkpoint["state_dict"]["autoencoder.encoder.conv_in.weight"],
    )
    config = str(tmp_path / "config.yaml")
    capsys.readouterr()
    main(["validate", "-c", config, "--trainer.limit_val_batches=1", "--ckpt_path", str(old)])
    assert "val/loss_l1" in capsys.readouterr().out


def test_the_average_is_selected_unless_raw_weights_are_asked_for():
    raw, averaged = torch.zeros(1), torch.ones(1)
    both = {"net.a": raw, "ema.a": averaged}
    assert select_weights(both) == ({"a": averaged}, "ema")
    assert select_weights(both, "raw") == ({"a": raw}, "raw")
    assert select_weights({"net.a": raw}) == ({"a": raw}, "raw")
    with pytest.raises(UserError, match="no EMA weights; give --weights raw"):
        select_weights({"net.a": raw}, "ema")
