"""Pictures to ids and back, and the ways a name can be wrong."""

import pytest
import torch

from tf_lightning.autoencoder import SHAPES, load_autoencoder
from tf_lightning.autoencoder_network import AutoencoderConfig, build_network
from tf_lightning.autoencoder_save import save_network
from tf_lightning.codes import load_codes
from tf_lightning.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    network = build_network(
        AutoencoderConfig((4, 8, 8), 1, 8, norm_groups=2, mid_attention=False, num_codes=32)
    )
    with torch.no_grad():
        network.quantize.embedding.weight.normal_()
    path = tmp_path_factory.mktemp("vq") / "autoencoder"
    save_network(network, path, {})
    return path


def test_ids_and_pictures_of_them(folder):
    codes = load_codes(str(folder))
    assert (codes.num_codes, codes.downsample) == (32, 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    ids = codes.encode(images)
    assert ids.shape == (2, 4, 6) and ids.dtype == torch.int64
    decoded = codes.decode(ids)
    torch.testing.assert_close(decoded, codes.model(images).sample.clamp(-1, 1))  # diffusers' way
    assert codes.fingerprint == load_codes(str(folder)).fingerprint


def test_every_code_is_found_again_from_its_own_vector(folder):
    codes = load_codes(str(folder))
    ids = torch.arange(32).view(1, 4, 8)
    vectors = codes.model.quantize.embedding(ids).permute(0, 3, 1, 2)
    _, _, (_, _, found) = codes.model.quantize(vectors)
    assert torch.equal(found.view_as(ids), ids)


def test_mistakes_are_one_sentence(folder, tmp_path):
    codes = load_codes(str(folder))
    with pytest.raises(UserError, match="multiple of 4"):
        codes.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(UserError, match="codebook of 32"):
        codes.decode(torch.full((1, 4, 4), 32))
    with pytest.raises(UserError, match="no codebook"):
        load_codes(str(SHAPES))
    with pytest.raises(UserError, match="codes of a codebook"):
        load_autoencoder(str(folder))
    with pytest.raises(UserError, match="there is no autoencoder"):
        load_codes(str(tmp_path / "gone"))
