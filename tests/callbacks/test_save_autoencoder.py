"""The folder of a trained autoencoder: its content, and its use by Transfusion."""

import json
import os

import numpy as np
import pytest
import torch

from support import autoencoder_runs as aruns
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.autoencoder.network import (
    AutoencoderConfig,
    build_autoencoder,
    latent_statistics,
    save_network,
)
from tf_lightning.data import Mixture
from tf_lightning.data.image_only import store_images
from tf_lightning.shapes.sources import ShapesCaptions


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a KL autoencoder trained without GAN loss."""
    return aruns.fit(tmp_path_factory.mktemp("vae"), gan_weight=0.0) / "autoencoder"


def small():
    torch.manual_seed(0)
    return build_autoencoder(AutoencoderConfig((4, 8), 1, 2, norm_groups=2, mid_attention=False))


def test_statistics_are_those_of_all_latents_at_once():
    network, images = small(), torch.rand(5, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = network.encode(images).latent_dist.mode()
    found = latent_statistics(network, images.split(2))
    assert found["latents_mean"] == pytest.approx(latents.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert found["latents_std"] == pytest.approx(latents.std((0, 2, 3)).tolist(), rel=1e-5)


def test_folder_loads_with_unit_variance_and_reconstructs_as_reported(saved):
    autoencoder = load_autoencoder(str(saved))
    assert (autoencoder.latent_channels, autoencoder.downsample) == (4, 4)
    stores = {
        split: store_images(ShapesCaptions(9, 5), split, saved.parent.parent / "data")
        for split in ("train", "val")
    }
    images = {
        split: torch.from_numpy(np.array(store.images)).permute(0, 3, 1, 2) / 127.5 - 1
        for split, store in stores.items()
    }
    latents = autoencoder.encode(images["train"])
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    made = autoencoder.decode(autoencoder.encode(images["val"]))
    error = ((made - images["val"]) / 2).square().mean((1, 2, 3))
    report = json.loads((saved / "report.json").read_text())
    assert report["held_out"]["val/psnr"] == pytest.approx(
        (-10 * error.log10()).mean().item(), abs=1e-3
    )
    assert report["global_step"] == 6
    assert json.loads((saved / "config.json").read_text())["sample_size"] == 64


def test_a_transfusion_run_takes_the_folder(saved, tmp_path):
    data = Mixture(
        {"captions": ShapesCaptions(4, 2)}, autoencoder=str(saved), cache_dir=str(tmp_path)
    )
    data.setup()
    assert data.image_shape == (4, 16, 16)


def test_a_vq_run_writes_codes_that_load_in_half(tmp_path):
    def half(config):
        config["trainer"]["callbacks"][2]["init_args"]["half"] = True
        config["trainer"]["max_steps"] = 3

    path = aruns.write_config(tmp_path, half, gan_weight=0.0, **aruns.VQ)
    aruns.main(["fit", "-c", str(path)])
    folder = tmp_path / "run" / "autoencoder"
    codes = load_autoencoder(str(folder))
    assert codes.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 16, 16)
    report = json.loads((folder / "report.json").read_text())
    size = os.path.getsize(folder / "diffusion_pytorch_model.safetensors")
    assert size < 2.2 * report["num_parameters"] + 20_000


def test_saving_replaces_what_is_there_and_leaves_nothing_beside_it(tmp_path):
    for step in (1, 2):
        save_network(small(), tmp_path / "autoencoder", {"global_step": step})
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]
    assert json.loads((tmp_path / "autoencoder/report.json").read_text()) == {"global_step": 2}


def test_a_failure_while_saving_leaves_the_old_folder(tmp_path):
    save_network(small(), tmp_path / "autoencoder", {"global_step": 1})
    with pytest.raises(TypeError):
        save_network(small(), tmp_path / "autoencoder", {"global_step": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]
    assert json.loads((tmp_path / "autoencoder/report.json").read_text()) == {"global_step": 1}
