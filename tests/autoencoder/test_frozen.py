"""Frozen KL autoencoders: reconstruction, normalization, loading and its errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from support.shape_images import shape_images
from tf_lightning.autoencoder.frozen import SHAPES_FOLDER, LatentAutoencoder, load_autoencoder
from tf_lightning.errors import UserError
from tf_lightning.shapes.world import IMAGE_SIZE

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shapes() -> LatentAutoencoder:
    return load_autoencoder("shapes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(SHAPES_FOLDER, tmp_path / "autoencoder")


def tiny(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, **config)


def test_shipped_weights_are_small_and_have_a_report():
    assert sum(file.stat().st_size for file in SHAPES_FOLDER.iterdir()) <= 4_000_000
    report = json.loads((SHAPES_FOLDER / "report.json").read_text())
    assert report["command"] and report["held_out"]["num_images"] == 2000


def test_shipped_autoencoder_reconstructs_held_out_images_as_reported(shapes):
    images = shape_images(range(200), split="val")
    errors = (shapes.decode(shapes.encode(images)) - images).div(2).square().mean((1, 2, 3))
    psnr = (-10 * errors.log10()).mean().item()
    reported = json.loads((SHAPES_FOLDER / "report.json").read_text())["held_out"]["psnr_db"]
    assert psnr == pytest.approx(reported, abs=0.5)
    assert psnr >= 32


@pytest.mark.parametrize("name", ["shapes", "shapes_vq"])
def test_loading_does_not_advance_the_random_generator(name):
    """Otherwise a model's initial weights would depend on whether its images were encoded."""
    before = torch.get_rng_state()
    load_autoencoder(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_have_zero_mean_and_unit_variance_in_every_channel(shapes):
    latents = shapes.encode(shape_images(range(300), split="val"))
    size = IMAGE_SIZE // shapes.downsample
    assert latents.shape == (300, shapes.latent_channels, size, size)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), atol=0.1, rtol=0)


def test_scaling_and_shift_factor_are_used_without_channel_statistics():
    model = tiny(scaling_factor=0.5, shift_factor=2.0)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    expected = (model.encode(images).latent_dist.mode() - 2.0) * 0.5
    torch.testing.assert_close(LatentAutoencoder(model).encode(images), expected.detach())


def test_decoding_undoes_the_scaling_and_clips():
    model = tiny(latents_mean=[1.0, -1.0], latents_std=[2.0, 0.5])
    latents = torch.randn(2, 2, 8, 8)
    raw = latents * torch.tensor([2.0, 0.5]).view(1, 2, 1, 1) + torch.tensor([1.0, -1.0]).view(
        1, 2, 1, 1
    )
    expected = model.decode(raw).sample.clamp(-1, 1).detach()
    torch.testing.assert_close(LatentAutoencoder(model).decode(latents), expected)


def test_autocast_does_not_change_latents(shapes):
    images = shape_images(range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = shapes.encode(images)
    assert torch.equal(under_autocast, shapes.encode(images))


def test_pixel_autoencoder_is_the_identity_and_clips():
    pixels = load_autoencoder("pixels")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(pixels.decode(pixels.encode(images)), images)
    assert pixels.decode(3 * images).abs().max() == 1


def test_folder_and_single_file_load_as_the_same_autoencoder(shapes, folder):
    from_folder = load_autoencoder(str(folder))
    from_file = load_autoencoder(str(folder / WEIGHTS))
    assert from_folder.fingerprint == from_file.fingerprint == shapes.fingerprint
    images = shape_images(range(2))
    assert torch.equal(from_file.encode(images), shapes.encode(images))


def test_fingerprint_changes_with_the_weights_and_with_the_scaling(shapes, folder):
    weights = load_file(folder / WEIGHTS)
    weights["encoder.conv_in.bias"] += 1
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    changed = load_autoencoder(str(folder)).fingerprint
    config = json.loads((folder / "config.json").read_text())
    config["latents_mean"][0] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert len({changed, shapes.fingerprint, load_autoencoder(str(folder)).fingerprint}) == 3


def error_of(name: str) -> str:
    """The error of loading an autoencoder, which must be one sentence."""
    with pytest.raises(UserError) as caught:
        load_autoencoder(name)
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_lists_the_choices():
    assert '"shapes", "shapes_vq", "pixels"' in error_of("shape")


def test_a_missing_file_is_not_requested_from_the_hub(tmp_path):
    assert "there is no autoencoder" in error_of(str(tmp_path / "gone.safetensors"))


def test_a_hub_name_offline_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "owner/absent" in error_of("owner/absent")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "config.json" in error_of(str(folder))


def test_truncated_weights_are_refused(folder):
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    assert str(folder) in error_of(str(folder))
    assert "cannot be loaded" in error_of(str(folder / WEIGHTS))


def test_weights_that_lack_a_tensor_are_refused(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.bias"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert "do not match its config.json" in error_of(str(folder))
    assert "do not match its config.json" in error_of(str(folder / WEIGHTS))


def test_an_image_size_that_is_not_divisible_is_refused(shapes):
    with pytest.raises(UserError, match="multiple of 8"):
        shapes.encode(torch.zeros(1, 3, 60, 64))
