"""The embedded world's judges mean something: better pictures and matched captions score better."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from callbacks.measures import CaptionScores, PictureScores, PromptFit, load_extractor
from callbacks.prompts import ShapesPrompts
from callbacks.sampling import Sampled
from tf_lightning.autoencoder import load_autoencoder
from tf_lightning.model import to_picture, to_pixels

COUNT = 80


@pytest.fixture(scope="module")
def prompts() -> ShapesPrompts:
    return ShapesPrompts(count=COUNT, real_per_prompt=4)


@pytest.fixture(scope="module")
def pictures(prompts) -> dict[str, list[Image.Image]]:
    """Pictures of the prompts, from right to worthless."""
    true = [prompt.picture() for prompt in prompts.prompts()]
    pixels = torch.stack([to_pixels(picture) for picture in true])
    autoencoder, generator = load_autoencoder("shapes"), torch.Generator().manual_seed(0)
    latents = autoencoder.encode(pixels)
    # A half-trained model's latents are right but for an error; 0.8 of their own spread here.
    astray = latents + 0.8 * torch.randn(latents.shape, generator=generator)
    noise = torch.randn(pixels.shape, generator=generator)
    return {
        "true": true,
        "reconstructed": [*map(to_picture, autoencoder.decode(latents))],
        "half-trained": [*map(to_picture, autoencoder.decode(astray))],
        "noise": [*map(to_picture, noise)],
    }


def sampled(prompts, pictures) -> Sampled:
    return Sampled(prompts.prompts(), range(COUNT), pictures)


@pytest.fixture(scope="module")
def scores(prompts, pictures) -> dict[str, dict[str, float]]:
    """FID, KID and CLIP score of each kind of pictures."""
    measures = [PictureScores(scores=["fid", "kid"], kid_subset_size=64), PromptFit()]
    for measure in measures:
        measure.open(prompts)
        measure.to(torch.device("cpu"))
    measures[0].see_real(prompts.real_pictures())
    measures[0].keep_real()
    found = {}
    for kind, drawn in pictures.items():
        found[kind] = {}
        for measure in measures:
            measure.reset()
            measure.update(sampled(prompts, drawn))
            found[kind] |= measure.compute()
    assert not measures[0].needs_real
    return found


@pytest.mark.parametrize("name", ["fid[shapes]", "kid[shapes]", "clip_score[shapes]"])
def test_true_pictures_beat_reconstructions_beat_a_half_trained_model_beats_noise(name, scores):
    values = [scores[kind][name] for kind in ("true", "reconstructed", "half-trained", "noise")]
    if name == "kid[shapes]":  # unbiased: it cannot tell reconstructions of 37 dB from the truth
        assert abs(values[1] - values[0]) < 0.005
        values[1] = values[0]
    assert values == sorted(values, reverse=name.startswith("clip"))
    assert abs(values[3] - values[0]) > 5 * abs(values[1] - values[0])


def test_a_caption_fits_its_own_picture_better_than_another_of_another_meaning(prompts, pictures):
    fit = PromptFit()
    fit.open(prompts)
    asked = prompts.prompts()
    pixels = torch.stack([pil_to_tensor(picture) for picture in pictures["true"]])
    matched = fit.score.cosines(pixels, [prompt.text for prompt in asked])
    turned = asked[1:] + asked[:1]
    others = fit.score.cosines(pixels, [prompt.text for prompt in turned])
    differ = torch.tensor([a.about != b.about for a, b in zip(asked, turned, strict=True)])
    assert differ.sum() > COUNT / 2
    assert ((matched > others) | ~differ).float().mean() > 0.99


def test_an_exchanged_relation_or_colour_lowers_the_score(prompts):
    pictures = torch.stack([pil_to_tensor(p.picture()) for p in prompts.prompts()])
    fit = PromptFit()
    fit.open(prompts)
    pairs = [(i, p.about) for i, p in enumerate(prompts.prompts()) if p.about.relation == "left of"]
    places = [i for i, _ in pairs]
    ((first, second),) = {tuple(f"a {c} {s}" for s, c in m.objects) for _, m in pairs[:1]}
    picture = pictures[places[:1]]
    right = fit.score.cosines(picture, [f"{first} left of {second}"])
    for wrong in (f"{second} left of {first}", f"{first} above {second}"):
        assert right > fit.score.cosines(picture, [wrong]) + 0.1


def test_features_have_one_length(prompts, pictures):
    extractor = load_extractor("shapes", None)
    images = torch.stack([pil_to_tensor(picture) for picture in pictures["true"][:4]])
    features = extractor(images).pooled
    assert features.shape == (4, extractor.num_features)
    torch.testing.assert_close(features.norm(dim=1), torch.full((4,), 8.0))


def test_drawn_pictures_are_resized_as_the_real_ones(prompts):
    scores = PictureScores()
    scores.open(prompts)
    scores.image_size = 32
    scores.to(torch.device("cpu"))
    assert scores._tensor([Image.new("RGB", (48, 64))]).shape == (1, 3, 32, 32)


def test_references_are_kept_and_those_of_another_set_refused(prompts, tmp_path):
    def opened(some_prompts) -> PictureScores:
        scores = PictureScores(references=str(tmp_path))
        scores.open(some_prompts)
        return scores.to(torch.device("cpu"))

    first = opened(prompts)
    first.see_real(prompts.real_pictures())
    first.keep_real()
    again = opened(prompts)
    assert not again.needs_real
    for scores in (first, again):
        scores.see_real(prompts.real_pictures()[:70])  # must not count any more
        scores.update(sampled(prompts, [prompt.picture() for prompt in prompts.prompts()]))
    assert first.compute() == again.compute()
    other = ShapesPrompts(count=COUNT, real_per_prompt=2)
    other.facts["resize"] = "lanczos 32"
    with pytest.raises(ValueError, match=r"resize none \(64 x 64\), not lanczos 32"):
        opened(other)


def test_captions_are_scored_against_every_reference(prompts):
    scores = CaptionScores()
    asked = prompts.prompts()
    scores.update(Sampled(asked, range(COUNT), [], [prompt.references[-1] for prompt in asked]))
    assert scores.compute()["bleu4[shapes]"] == pytest.approx(1.0)
    best = scores.compute()["cider[shapes]"]
    scores.reset()
    scores.update(Sampled(asked, range(COUNT), [], ["dogs like sofas"] * COUNT))
    assert scores.compute()["cider[shapes]"] == 0.0 < best


def test_weights_that_are_absent_are_told_in_one_sentence(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for measure in (
        PictureScores(extractor="inception"),
        PictureScores(extractor="inception", weights=str(tmp_path / "none.pth")),
        PromptFit(model="ViT-L-14", pretrained="openai"),
    ):
        with pytest.raises(ValueError) as told:
            measure.open(prompts)
        assert "\n" not in str(told.value)
