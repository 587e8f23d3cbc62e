"""CLIP score equals a direct computation with open_clip."""

import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from evaluation.clip_score import CLIPScore
from support.extractors import tiny_clip

CAPTIONS = ["a red circle", "two dogs on a beach", "12345 67", "a train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def make_images(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 40, 56), generator=generator, dtype=torch.uint8)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def cosines_by_hand(folder, captions) -> list[float]:
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    found = []
    with torch.no_grad():
        for image, caption in zip(make_images(), captions, strict=True):
            image_features = network.encode_image(preprocess(to_pil_image(image))[None])[0]
            text_features = network.encode_text(open_clip.tokenize([caption], context_length=24))[0]
            found.append(cosine(image_features, text_features))
    return found


@pytest.mark.parametrize(
    ("prefix", "scale"), [("", 100.0), ("A photo depicts ", 2.5), ("", -100.0)]
)
def test_equals_a_direct_computation_with_open_clip(folder, prefix, scale):
    """A negative scale flips the signs, so that both sides of the clamp are tested."""
    score = CLIPScore(f"local-dir:{folder}", prefix=prefix, scale=scale)
    score.update(make_images()[:3], CAPTIONS[:3])
    score.update(make_images()[3:].float() / 127.5 - 1, CAPTIONS[3:])
    cosines = cosines_by_hand(folder, [prefix + caption for caption in CAPTIONS])
    expected = sum(max(scale * cosine, 0) for cosine in cosines) / 4
    assert score.compute().item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_cosines_of_the_test_above_have_both_signs(folder):
    cosines = cosines_by_hand(folder, CAPTIONS)
    assert min(cosines) < 0 < max(cosines)


def test_the_protocol_states_model_weights_prefix_scale_and_count(folder):
    score = CLIPScore(f"local-dir:{folder}", prefix="A photo depicts ", scale=2.5)
    score.update(make_images(), CAPTIONS)
    score.compute()
    protocol = score.protocol
    assert len(protocol.pop("weights_hash")) == 12
    assert protocol == {
        **{"metric": "clip_score", "model": f"open_clip:local-dir:{folder.name}"},
        **{"prefix": "A photo depicts ", "scale": 2.5, "num_pairs": 4},
    }


def test_reset_removes_the_pairs(folder):
    score = CLIPScore(f"local-dir:{folder}", scale=-100.0)
    score.update(make_images(), CAPTIONS)
    first = score.compute()
    score.reset()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="was given no image"):
        score.compute()
    score.reset()
    score.update(make_images(), CAPTIONS)
    assert score.compute() == first
