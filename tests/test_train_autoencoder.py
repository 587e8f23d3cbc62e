"""The command that trains the embedded world's autoencoder."""

import json

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from test_image_caption import png, write_tar
from tf_lightning.autoencoder import load_autoencoder
from tf_lightning.errors import UserError
from tf_lightning.train_autoencoder import (
    TarPictures,
    blur_latents,
    main,
    measure_errors,
    pictures,
)


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
    measured = measure_errors(load_autoencoder(str(trained)).model, pictures, 50, seed=0)
    assert measured == pytest.approx(report["held_out"], rel=1e-4)


def test_same_seed_trains_the_same_weights(trained):
    again = trained.parent.parent / "again"
    main(["--out", str(again), "--steps", "3", "--batch-size", "2", "--measure", "50"])
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (again / name).read_bytes() == (trained / name).read_bytes()


def test_latents_are_blurred_by_their_channel_s_spread():
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 4, 64, 64))  # mean 0, variance 1 below
    posterior.mean = torch.randn(2, 2, 64, 64) * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    posterior.std = torch.full((2, 2, 64, 64), 0.5)
    blurred = blur_latents(posterior, torch.tensor([0.0, 2.0]))
    added = (blurred - posterior.mean).std((2, 3))
    expected = [[0.5, 0.5], [(0.25 + 4) ** 0.5, (0.25 + 100) ** 0.5]]
    torch.testing.assert_close(added, torch.tensor(expected), rtol=0.05, atol=0)


def test_existing_folder_is_left_alone(trained):
    with pytest.raises(UserError, match="exists already"):
        main(["--out", str(trained)])


def test_pictures_span_minus_one_to_one():
    images = pictures(range(20))
    assert images.shape == (20, 3, 64, 64) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.5 and 0.9 < images.max() <= 1


def test_an_epoch_of_a_tar_shows_each_picture_once_in_an_order_of_its_own(tmp_path):
    colours = [(i, 255 - i, 0) for i in range(200)]
    files = {}
    for i, colour in enumerate(colours):
        files |= {f"{i:03d}.png": png(colour), f"{i:03d}.txt": b"a colour"}
    source = TarPictures([write_tar(tmp_path / "colours.tar", files)])
    count = len(source.images["train"])

    def seen(indices):
        return [tuple(((p[:, 0, 0] + 1) * 127.5).round().int().tolist()) for p in source(indices)]

    first, second = seen(range(count)), seen(range(count, 2 * count))
    assert sorted(first) == sorted(second) and first != second
    assert set(first) <= set(colours) and len(set(first)) == count


def test_tars_without_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="--images"):
        TarPictures([write_tar(tmp_path / "words.tar", {"000.txt": b"words alone"})])
