"""A checkpoint leaves the folder of its autoencoder: generate, validate, export, resume."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL

from support import runs
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline


def save_autoencoder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    network = AutoencoderKL(
        **{"down_block_types": ["DownEncoderBlock2D"] * 3, "latent_channels": 4},
        **{"up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [8] * 3},
        **{"norm_num_groups": 4, "scaling_factor": 3.0},
    )
    network.save_pretrained(folder)
    return folder


def use(autoencoder: Path | str):
    """A change of the configuration: one short run with a single evaluation metric."""

    def change(config: dict) -> None:
        config["trainer"] |= {"max_steps": 3, "limit_val_batches": 1}
        config["trainer"]["callbacks"] = [
            c
            for c in config["trainer"]["callbacks"]
            if c["class_path"].endswith(("ModelCheckpoint", "Evaluate"))
        ]
        evaluate = config["trainer"]["callbacks"][-1]["init_args"]
        evaluate |= {"metrics": [], "texts": [], "caption_images": False}
        config["model"] |= {"patch_size": 4, "latent_channels": 4}
        config["data"]["init_args"] |= {"autoencoder": str(autoencoder), "patch_size": 4}

    return change


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """A folder with model.ckpt of a run whose own folder and autoencoder are gone."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("moved")
    save_autoencoder(home / "vae", seed=0)
    main(["fit", "-c", str(runs.write_config(home, use(home / "vae")))])
    shutil.copy(home / "run" / "checkpoints" / "last.ckpt", folder / "model.ckpt")
    shutil.move(home / "vae", folder / "elsewhere")
    save_autoencoder(folder / "another", seed=1)
    return folder


def generate(*arguments: str | Path) -> None:
    main(["generate", *map(str, arguments), "--num-inference-steps", "2", "-n", "1"])


def test_an_image_needs_the_autoencoder_and_the_option_gives_it(moved, tmp_path, capsys):
    command = [moved / "model.ckpt", "a red circle", "-o", tmp_path / "out"]
    with pytest.raises(SystemExit):
        generate(*command)
    assert "give it with --autoencoder NAME" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate(*command, "--autoencoder", moved / "another")
    assert "is not the one that the model was trained with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    generate(*command, "--autoencoder", moved / "elsewhere")
    assert (tmp_path / "out" / "0000.png").is_file()


def test_text_after_text_needs_no_autoencoder(moved, capsys):
    main(["generate", str(moved / "model.ckpt"), "a", "--output-modality", "text",
          "--max-new-tokens", "3"])  # fmt: skip
    assert "error" not in capsys.readouterr().err


def test_python_and_the_environment_give_it_too(moved, monkeypatch):
    name = "TF_LIGHTNING_AUTOENCODER"
    given = TransfusionPipeline.from_pretrained(
        moved / "model.ckpt", autoencoder=moved / "elsewhere"
    )
    assert given.image_size == 64
    monkeypatch.setenv(name, str(moved / "elsewhere"))
    assert TransfusionPipeline.from_pretrained(moved / "model.ckpt").image_size == 64
    monkeypatch.setenv(name, str(moved / "another"))
    with pytest.raises(UserError, match="is not the one"):
        TransfusionPipeline.from_pretrained(moved / "model.ckpt").plan("image", None)
    given = TransfusionPipeline.from_pretrained(  # the argument comes before the environment
        moved / "model.ckpt", autoencoder=str(moved / "elsewhere")
    )
    assert given.image_size == 64


def test_an_exported_folder_finds_it_beside_itself(moved, tmp_path):
    folder = tmp_path / "new"
    main(["export", str(moved / "model.ckpt"), "-o", str(folder / "exported"), "--only", "net"])
    with pytest.raises(UserError, match="is not found"):
        TransfusionPipeline.from_pretrained(folder / "exported").plan("image", None)
    shutil.copytree(moved / "elsewhere", folder / "vae")  # the last name of the path in training
    assert TransfusionPipeline.from_pretrained(folder / "exported").image_size == 64


def test_validate_uses_the_one_of_its_configuration(moved, tmp_path, capsys):
    config = runs.write_config(tmp_path, use(moved / "elsewhere"))
    main(["validate", "-c", str(config), "--ckpt_path", str(moved / "model.ckpt")])
    other = runs.write_config(tmp_path / "other", use(moved / "another"))
    with pytest.raises(SystemExit):
        main(["validate", "-c", str(other), "--ckpt_path", str(moved / "model.ckpt")])
    assert "give the data that one" in capsys.readouterr().err


def test_the_name_in_a_checkpoint_is_that_of_the_last_run(moved, tmp_path):
    """A resumed run records where its own data found the autoencoder."""
    config = runs.write_config(tmp_path, use(moved / "elsewhere"))
    values = yaml.safe_load(config.read_text())
    values["trainer"] |= {"max_steps": 4, "limit_val_batches": 0}
    values["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 1
    config.write_text(yaml.safe_dump(values))
    main(["fit", "-c", str(config), "--ckpt_path", str(moved / "model.ckpt")])
    saved = tmp_path / "run" / "checkpoints" / "step0000004.ckpt"
    codec = torch.load(saved, weights_only=True)["image_codec"]
    assert codec["autoencoder"] == str(moved / "elsewhere") and codec["fingerprint"]
