"""Frozen VQ autoencoders: encoding, decoding, loading and its errors."""

import json

import pytest
import torch

from callbacks.prompts import caption_pairs
from tf_lightning.autoencoder.frozen import SHIPPED, load_autoencoder, load_matching_autoencoder
from tf_lightning.autoencoder.network import AutoencoderConfig, build_autoencoder, save_network
from tf_lightning.data.images import to_pixels
from tf_lightning.errors import UserError
from tf_lightning.shapes.sources import ShapesCaptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    network = build_autoencoder(
        AutoencoderConfig((4, 8, 8), 1, 8, norm_groups=2, mid_attention=False, num_codes=32)
    )
    with torch.no_grad():
        network.quantize.embedding.weight.normal_()
    path = tmp_path_factory.mktemp("vq") / "autoencoder"
    save_network(network, path, {})
    return path


def test_codes_have_their_shape_and_decode_as_in_diffusers(folder):
    codes = load_autoencoder(str(folder))
    assert (codes.num_codes, codes.downsample, codes.latent_channels) == (32, 4, 1)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    ids = codes.encode(images)
    assert ids.shape == (2, 1, 4, 6) and ids.dtype == torch.int64
    decoded = codes.decode(ids)
    torch.testing.assert_close(decoded, codes.model(images).sample.clamp(-1, 1))
    assert codes.fingerprint == load_autoencoder(str(folder)).fingerprint


def test_the_nearest_code_of_a_code_vector_is_itself(folder):
    codes = load_autoencoder(str(folder))
    ids = torch.arange(32).view(1, 4, 8)
    vectors = codes.model.quantize.embedding(ids).permute(0, 3, 1, 2)
    _, _, (_, _, found) = codes.model.quantize(vectors)
    assert torch.equal(found.view_as(ids), ids)


def test_wrong_sizes_codes_and_models_are_refused(folder):
    codes = load_autoencoder(str(folder))
    with pytest.raises(UserError, match="multiple of 4"):
        codes.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(UserError, match="codebook of 32"):
        codes.decode(torch.full((1, 1, 4, 4), 32))
    # latent_channels is ignored.
    assert load_matching_autoencoder(str(folder), 8, 32).num_codes == 32
    message = "has 32 codes but the model has 64 codes; give --model.num_codes 32 or"
    with pytest.raises(UserError, match=message):
        load_matching_autoencoder(str(folder), 1, 64)
    with pytest.raises(UserError, match="has 32 codes but the model has continuous latents"):
        load_matching_autoencoder(str(folder), 1, None)
    with pytest.raises(UserError, match="continuous latents but .* 64 codes.*num_codes null"):
        load_matching_autoencoder("shapes", 8, 64)


def test_the_shipped_vq_autoencoder_reconstructs_as_reported():
    codes = load_autoencoder("shapes_vq")
    assert (codes.num_codes, codes.downsample) == (512, 8)
    pairs = caption_pairs(ShapesCaptions(4, 32, two_objects=0.75), "val")
    images = torch.stack([to_pixels(image) for _, image in pairs])
    made = codes.decode(codes.encode(images))
    psnr = -10 * ((made - images) / 2).square().mean((1, 2, 3)).log10()
    report = json.loads((SHIPPED["shapes_vq"] / "report.json").read_text())["held_out"]
    assert psnr.mean().item() == pytest.approx(report["val/psnr"], abs=1.0)
    assert report["val/psnr"] > 28 and report["val/code_use"] > 0.95
