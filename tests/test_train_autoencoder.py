"""The command that trains the embedded world's autoencoder."""

import json

import pytest
import torch

from tf_lightning.autoencoder import load_autoencoder
from tf_lightning.errors import UserError
from tf_lightning.train_autoencoder import main, measure_errors, pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoders") / "trained"
    main(["--out", str(out), "--steps", "3", "--batch-size", "2", "--measure", "50"])
    return out


def test_command_writes_a_folder_that_loads_and_nothing_else(trained):
    autoencoder = load_autoencoder(str(trained))
    assert (autoencoder.latent_channels, autoencoder.downsample) == (8, 8)
    assert [file.name for file in trained.parent.iterdir()] == ["trained"]


def test_reported_figures_are_those_of_the_weights_on_disk(trained):
    report = json.loads((trained / "report.json").read_text())
    assert report["command"].endswith("--steps 3 --batch-size 2 --measure 50")
    measured = measure_errors(load_autoencoder(str(trained)).model, 50, seed=0)
    assert measured == pytest.approx(report["held_out"], rel=1e-4)


def test_same_seed_trains_the_same_weights(trained):
    again = trained.parent.parent / "again"
    main(["--out", str(again), "--steps", "3", "--batch-size", "2", "--measure", "50"])
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (again / name).read_bytes() == (trained / name).read_bytes()


def test_existing_folder_is_left_alone(trained):
    with pytest.raises(UserError, match="exists already"):
        main(["--out", str(trained)])


def test_pictures_span_minus_one_to_one():
    images = pictures(range(20))
    assert images.shape == (20, 3, 64, 64) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.5 and 0.9 < images.max() <= 1
