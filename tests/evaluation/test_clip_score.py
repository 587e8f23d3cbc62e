"""CLIP score equals open_clip called by hand."""

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


def pictures(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 40, 56), generator=generator, dtype=torch.uint8)


def cosines_by_hand(folder, captions) -> list[float]:
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    found = []
    with torch.no_grad():
        for picture, caption in zip(pictures(), captions, strict=True):
            seen = network.encode_image(preprocess(to_pil_image(picture))[None])[0]
            read = network.encode_text(open_clip.tokenize([caption], context_length=24))[0]
            found.append(float(seen @ read / seen.norm() / read.norm()))
    return found


@pytest.mark.parametrize(
    ("prefix", "scale"), [("", 100.0), ("A photo depicts ", 2.5), ("", -100.0)]
)
def test_equals_open_clip_called_by_hand(folder, prefix, scale):
    """A negative scale turns the signs round, so that both sides of the clamp are met."""
    score = CLIPScore(f"local-dir:{folder}", prefix=prefix, scale=scale)
    score.update(pictures()[:3], CAPTIONS[:3])
    score.update(pictures()[3:].float() / 127.5 - 1, CAPTIONS[3:])
    cosines = cosines_by_hand(folder, [prefix + caption for caption in CAPTIONS])
    expected = sum(max(scale * cosine, 0) for cosine in cosines) / 4
    assert score.compute().item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_signs_of_the_test_above_differ(folder):
    cosines = cosines_by_hand(folder, CAPTIONS)
    assert min(cosines) < 0 < max(cosines)


def test_the_protocol_states_model_weights_prefix_scale_and_count(folder):
    score = CLIPScore(f"local-dir:{folder}", prefix="A photo depicts ", scale=2.5)
    score.update(pictures(), CAPTIONS)
    score.compute()
    protocol = score.protocol
    assert len(protocol.pop("weights_hash")) == 12
    assert protocol == {
        **{"metric": "clip_score", "model": f"open_clip:local-dir:{folder.name}"},
        **{"prefix": "A photo depicts ", "scale": 2.5, "num_pairs": 4},
    }


def test_it_starts_anew_after_a_reset(folder):
    score = CLIPScore(f"local-dir:{folder}", scale=-100.0)
    score.update(pictures(), CAPTIONS)
    first = score.compute()
    score.reset()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="was given no picture"):
        score.compute()
    score.reset()
    score.update(pictures(), CAPTIONS)
    assert score.compute() == first
