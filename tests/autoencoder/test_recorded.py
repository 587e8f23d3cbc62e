"""The autoencoder of a checkpoint is found by its fingerprint, wherever the checkpoint went."""

import shutil
from pathlib import Path

import pytest

from support.autoencoders import make, write_layout
from tf_lightning.autoencoder.frozen import SHAPES_FOLDER, load_autoencoder
from tf_lightning.autoencoder.recorded import as_hint, open_recorded, with_data
from tf_lightning.errors import UserError

HPARAMS = {"latent_channels": 4, "num_codes": None}


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write_layout(make("AutoencoderKL"), "folder", tmp_path / "made")


@pytest.fixture
def codec(vae: Path) -> dict:
    fingerprint = load_autoencoder(str(vae)).fingerprint
    return {"autoencoder": "./vae", "fingerprint": fingerprint, "latent_shape": [4, 8, 8]}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """An autoencoder of the same sizes with other weights."""
    network = make("AutoencoderKL")
    network.encoder.conv_in.bias.data += 1
    return write_layout(network, "folder", tmp_path / "other")


def found(codec: dict, given: str | None = None, folder: Path | None = None) -> bool:
    opened = open_recorded(codec, HPARAMS, given, folder)
    return opened.fingerprint == codec.get("fingerprint", opened.fingerprint)


def test_hints_are_names_of_the_hub_or_paths_that_cannot_be_mistaken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "vae").mkdir(parents=True)
    (tmp_path / "shapes").mkdir()
    assert as_hint("runs/vae") == "./runs/vae" and as_hint("./runs/vae") == "./runs/vae"
    assert as_hint(str(tmp_path)) == str(tmp_path)
    for name in ("shapes", "pixels", "stabilityai/sd-vae-ft-mse", None):
        assert as_hint(name) == name


@pytest.mark.parametrize("place", ["", "runs", "runs/a", "runs/a/checkpoints"])
def test_a_relative_path_is_found_from_the_checkpoint(place, vae, codec, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(vae.parent, tmp_path / "elsewhere"))
    shutil.copytree(vae, tmp_path / "new" / place / "vae")
    assert found(codec, folder=tmp_path / "new" / "runs" / "a" / "checkpoints")
    with pytest.raises(UserError, match="is not found"):
        found(codec, folder=tmp_path / "elsewhere")


def test_an_absolute_path_is_found_by_its_last_name_beside_the_checkpoint(vae, codec, tmp_path):
    shutil.copytree(vae, tmp_path / "new" / "vae")
    moved = codec | {"autoencoder": "/home/gone/vae"}
    assert found(moved, folder=tmp_path / "new")
    assert found(moved, folder=tmp_path / "new" / "checkpoints")


def test_a_relative_path_is_found_from_the_current_folder(vae, codec, tmp_path, monkeypatch):
    monkeypatch.chdir(vae.parent)
    vae.rename(vae.parent / "vae")
    assert found(codec, folder=tmp_path / "new")


def test_another_autoencoder_under_the_same_name_is_passed_over(vae, other, codec, tmp_path):
    shutil.copytree(other, tmp_path / "new" / "runs" / "vae")
    folder = tmp_path / "new" / "runs"
    with pytest.raises(UserError, match="is not the one that the model was trained with"):
        found(codec, folder=folder)
    shutil.copytree(vae, tmp_path / "new" / "vae")
    assert found(codec, folder=folder)


def test_a_given_one_is_used_and_compared(vae, other, codec):
    assert found(codec, given=str(vae))
    with pytest.raises(UserError) as caught:
        found(codec, given=str(other))
    message = str(caught.value)
    assert codec["fingerprint"] in message and "--autoencoder NAME" in message
    assert "\n" not in message and ". " not in message


def test_a_missing_one_is_refused_with_the_ways_to_give_it(codec, tmp_path):
    with pytest.raises(UserError) as caught:
        found(codec, folder=tmp_path / "new")
    message = str(caught.value)
    for way in ('"./vae"', "--autoencoder", "autoencoder=", "TF_LIGHTNING_AUTOENCODER"):
        assert way in message


@pytest.mark.parametrize("name", ["a" * 300, "a/" + "b" * 300, "\0", "a\0/b"])
def test_a_name_that_no_file_can_have_is_refused(name, codec, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError):
        open_recorded({**codec, "autoencoder": name}, HPARAMS, folder=tmp_path)


def test_a_hub_name_that_cannot_be_reached_is_refused_with_the_ways_to_give_it(codec, monkeypatch):
    """Old checkpoints may also hold a relative path that looks like a hub name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub does not provide .*; or give it with --auto"):
        found(codec | {"autoencoder": "runs/vae"})


def test_a_checkpoint_without_fingerprint_opens_its_path(vae, other, codec):
    """As checkpoints of version 0.1."""
    del codec["fingerprint"]
    assert found(codec | {"autoencoder": str(vae)}) and found(codec, given=str(other))
    with pytest.raises(UserError, match="has 8 channels but the model has latent_channels=4"):
        found(codec, given=str(SHAPES_FOLDER))


def test_the_datas_autoencoder_replaces_the_name_and_must_be_the_same(codec):
    current = codec | {"autoencoder": "/new/vae", "latent_shape": [4, 2, 2]}
    assert with_data(codec, current) == codec | {"autoencoder": "/new/vae"}
    assert with_data(codec, None) == codec
    assert with_data(codec, current | {"autoencoder": None}) == codec
    old = {name: value for name, value in codec.items() if name != "fingerprint"}
    assert with_data(old, current) == codec | {"autoencoder": "/new/vae"}
    with pytest.raises(UserError, match="give the data that one"):
        with_data(codec, current | {"fingerprint": "0" * 16})
    text = codec | {"latent_shape": None}
    assert with_data(text, current | {"fingerprint": "0" * 16}) == text
