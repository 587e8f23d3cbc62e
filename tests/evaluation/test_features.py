"""Extractors are frozen, load from files or folders, and wrong files are refused."""

import hashlib

import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from evaluation.features import as_uint8, inception, open_clip_features
from support.extractors import tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def make_images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 48, 40), generator=generator, dtype=torch.uint8)


def test_an_open_clip_extractor_gives_the_embedding_of_open_clip(folder):
    extractor = open_clip_features(f"local-dir:{folder}")
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    batch = torch.stack([preprocess(to_pil_image(image)) for image in make_images(3)])
    with torch.no_grad():
        expected = network.eval().encode_image(batch)
    features = extractor(make_images(3))
    assert torch.equal(features.pooled, expected) and features.logits is None
    assert (extractor.num_features, extractor.num_classes) == (16, 0)
    assert extractor.name == f"open_clip:local-dir:{folder.name}"


def test_the_hash_is_of_the_weights_file(folder):
    content = (folder / "open_clip_model.safetensors").read_bytes()
    expected = hashlib.sha256(content).hexdigest()[:12]
    assert open_clip_features(f"local-dir:{folder}").weights_hash == expected


def test_an_extractor_stays_frozen(folder):
    extractor = open_clip_features(f"local-dir:{folder}").train()
    assert not any(module.training for module in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not extractor(make_images(1)).pooled.requires_grad


@pytest.mark.parametrize("content", [b"no weights", None])
def test_a_file_without_inception_weights_is_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "weights.pth"
    torch.save({"conv": torch.zeros(3)}, file)
    if content:
        file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"weights.pth does not hold torch-fidelity's Inception .*\(.*\);"
    ):
        inception(str(file))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"conv": RunsCode()}, file)
    with pytest.raises(ValueError, match=r"\(UnpicklingError\)"):
        inception(str(file))
    assert RUN == []


RUN = []


class RunsCode:
    """Runs code when it is unpickled with weights_only=False."""

    def __reduce__(self):
        return RUN.append, (1,)


def test_values_in_minus_one_to_one_are_rounded_to_the_nearest_byte():
    images = torch.tensor([-2.0, -1.0, -0.001, 0.0, 0.01, 1.0, 3.0]).view(1, 1, 1, 7)
    assert as_uint8(images).flatten().tolist() == [0, 0, 127, 128, 129, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_uint8(levels.view(1, 1, 1, -1)).flatten(), levels)
    assert torch.equal(as_uint8(levels.view(1, 1, 1, -1) / 127.5 - 1).flatten(), levels)


def test_images_that_are_not_finite_are_counted():
    images = torch.zeros(4, 3, 2, 2)
    images[0, 0, 0, 0], images[2, 1, 1, 1], images[2, 0, 0, 0] = torch.nan, torch.inf, torch.nan
    with pytest.raises(ValueError, match="^2 of 4 images contain NaN or infinity"):
        as_uint8(images)
