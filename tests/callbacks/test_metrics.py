"""Metrics of the shapes world rank images and captions by their quality."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from callbacks.metrics import CaptionScores, CLIPScore, ImageQuality, load_extractor
from callbacks.prompts import ShapesPrompts
from callbacks.sampling import SampleBatch
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.batch import Document, document_length, pack
from tf_lightning.data.images import to_image, to_pixels
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.shapes.grammar import caption
from tf_lightning.shapes.sources import scene_image
from tf_lightning.shapes.world import draw_scene, generator
from tf_lightning.tokenizer.tokenizer import Tokenizer, train_tokenizer
from tf_lightning.training.module import Transfusion

COUNT = 80


@pytest.fixture(scope="module")
def prompts() -> ShapesPrompts:
    return ShapesPrompts(count=COUNT, real_per_prompt=4)


@pytest.fixture(scope="module")
def images(prompts) -> dict[str, list[Image.Image]]:
    """Images of the prompts, from right to noise."""
    true = [prompt.image() for prompt in prompts.prompts()]
    pixels = torch.stack([to_pixels(image) for image in true])
    autoencoder, noises = load_autoencoder("shapes"), torch.Generator().manual_seed(0)
    latents = autoencoder.encode(pixels)
    noise = torch.randn(pixels.shape, generator=noises)
    return {
        "real": true,
        "reconstructed": [*map(to_image, autoencoder.decode(latents))],
        "noise": [*map(to_image, noise)],
    }


def sampled(prompts, images) -> SampleBatch:
    return SampleBatch(prompts.prompts(), range(COUNT), images)


def tiny_model(folder) -> tuple[Transfusion, list[Document]]:
    """An untrained model, and captioned images of the shapes world to train it."""
    pairs = []
    for index in range(256):
        rng = generator(7, index, "train")
        scene = draw_scene(rng, split="train")
        pairs.append((caption(scene, rng), to_pixels(scene_image(scene))))
    texts, pixels = zip(*pairs, strict=True)
    tokenizer = train_tokenizer(iter(texts), folder / "t.model", 400)
    latents = load_autoencoder("shapes").encode(torch.stack(pixels))
    documents = [
        [torch.tensor(tokenizer.encode(text)), image]
        for text, image in zip(texts, latents, strict=True)
    ]
    torch.manual_seed(0)
    config = TransformerConfig(400, dim=128, num_layers=3, num_heads=4, ffn_dim=256, qk_norm=True)
    module = Transfusion(config, 4, prediction_type="v_prediction", ema_decay=0.0)
    module.configure_model()
    module.tokenizer_proto, module.row_length = tokenizer.proto, 256
    module.image_codec = {"autoencoder": "shapes", "latent_shape": list(latents.shape[1:])}
    return module, documents


def train_to(step: int, start: int, module: Transfusion, documents, optimizer) -> None:
    """Take the optimizer steps from `start` to `step`, each with a full row of 32 documents."""
    tokenizer = Tokenizer.from_proto(module.tokenizer_proto)
    options = {"tokenizer": tokenizer, "patch_size": 4, "timestep_shift": 2.5}
    for number in range(start, step):
        chosen = torch.randint(256, (32,), generator=torch.Generator().manual_seed(number))
        row = [documents[index] for index in chosen.tolist()]
        length = sum(document_length(document, 4) for document in row)
        batch = pack([row], [number], row_length=length, **options)
        nll, _, squared_error, *_ = module.loss_sums(module.net, batch)
        optimizer.zero_grad()
        (nll.mean() + 5 * squared_error / batch.latents.numel()).backward()
        torch.nn.utils.clip_grad_norm_(module.net.parameters(), 1.0)
        optimizer.step()


@pytest.fixture(scope="module")
def generated(prompts, tmp_path_factory) -> dict[str, list[Image.Image]]:
    """What a real model draws in the course of its training, half a minute long."""
    module, documents = tiny_model(tmp_path_factory.mktemp("tiny"))
    optimizer = torch.optim.AdamW(module.net.parameters(), lr=3e-3, betas=(0.9, 0.99), fused=True)
    asked, found, start = [prompt.text for prompt in prompts.prompts()], {}, 0
    for name, step in (("hardly trained", 25), ("half-trained", 250)):
        train_to(step, start, module, documents, optimizer)
        how = {"num_inference_steps": 12, "guidance_scale": 1.0, "batch_size": COUNT}
        pipe = TransfusionPipeline.from_module(module.eval())
        found[name], start = pipe(asked, progress=False, **how).images, step
        module.train()
    return found


@pytest.fixture(scope="module")
def scores(prompts, images, generated) -> dict[str, dict[str, float]]:
    """FID, KID and CLIP score of each kind of images."""
    metrics = [ImageQuality(scores=["fid", "kid"], kid_subset_size=64), CLIPScore()]
    for metric in metrics:
        metric.open(prompts)
        metric.to(torch.device("cpu"))
    metrics[0].add_real(prompts.real_images())
    metrics[0].keep_real()
    found = {}
    for kind, some in (images | generated).items():
        found[kind] = {}
        for metric in metrics:
            metric.reset()
            metric.update(sampled(prompts, some))
            found[kind] |= metric.compute()[0]
    assert not metrics[0].needs_real
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fid[shapes]", "kid[shapes]", "clip_score[shapes]"])
def test_scores_rank_real_images_reconstructions_a_half_trained_model_and_noise(name, scores):
    early, late = scores["hardly trained"][name], scores["half-trained"][name]
    assert late > early if name.startswith("clip") else late < early
    values = [scores[kind][name] for kind in ("real", "reconstructed", "half-trained", "noise")]
    if not name.startswith(
        "clip"
    ):  # the CLIP score does not distinguish patches of color from noise
        values.insert(3, early)
    if (
        name == "kid[shapes]"
    ):  # it is unbiased and does not distinguish reconstructions of 37 dB from real images
        assert abs(values[1] - values[0]) < 0.005
        values[1] = values[0]
    assert values == sorted(values, reverse=name.startswith("clip"))
    assert abs(values[-1] - values[0]) > 5 * abs(values[1] - values[0])


def test_an_image_scores_higher_with_its_own_caption_than_with_another(prompts, images):
    fit = CLIPScore()
    fit.open(prompts)
    asked = prompts.prompts()
    pixels = torch.stack([pil_to_tensor(image) for image in images["real"]])
    matched = fit.score.cosines(pixels, [prompt.text for prompt in asked])
    turned = asked[1:] + asked[:1]
    others = fit.score.cosines(pixels, [prompt.text for prompt in turned])
    differ = torch.tensor([a.about != b.about for a, b in zip(asked, turned, strict=True)])
    assert differ.sum() > COUNT / 2
    assert ((matched > others) | ~differ).float().mean() > 0.99


def test_an_exchanged_relation_or_color_lowers_the_score(prompts):
    images = torch.stack([pil_to_tensor(p.image()) for p in prompts.prompts()])
    fit = CLIPScore()
    fit.open(prompts)
    pairs = [(i, p.about) for i, p in enumerate(prompts.prompts()) if p.about.relation == "left of"]
    places = [i for i, _ in pairs]
    ((first, second),) = {tuple(f"a {c} {s}" for s, c in m.objects) for _, m in pairs[:1]}
    image = images[places[:1]]
    right = fit.score.cosines(image, [f"{first} left of {second}"])
    for wrong in (f"{second} left of {first}", f"{first} above {second}"):
        assert right > fit.score.cosines(image, [wrong]) + 0.1


def test_all_features_have_the_same_length(prompts, images):
    extractor = load_extractor("shapes", None)
    images = torch.stack([pil_to_tensor(image) for image in images["real"][:4]])
    features = extractor(images).pooled
    assert features.shape == (4, extractor.num_features)
    torch.testing.assert_close(features.norm(dim=1), torch.full((4,), 8.0))


def test_generated_images_are_resized_to_the_size_of_the_real_ones(prompts):
    scores = ImageQuality()
    scores.open(prompts)
    scores.image_size = 32
    scores.to(torch.device("cpu"))
    assert scores._tensor([Image.new("RGB", (48, 64))]).shape == (1, 3, 32, 32)


def test_references_are_kept_and_those_of_another_prompt_set_are_refused(prompts, tmp_path):
    def opened(some_prompts) -> ImageQuality:
        scores = ImageQuality(references=str(tmp_path))
        scores.open(some_prompts)
        return scores.to(torch.device("cpu"))

    first = opened(prompts)
    first.add_real(prompts.real_images())
    first.keep_real()
    again = opened(prompts)
    assert not again.needs_real
    for scores in (first, again):
        scores.add_real(prompts.real_images()[:70])  # must not be counted again
        scores.update(sampled(prompts, [prompt.image() for prompt in prompts.prompts()]))
    assert first.compute() == again.compute()
    other = ShapesPrompts(count=COUNT, real_per_prompt=2)
    other.facts["resize"] = "lanczos 32"
    with pytest.raises(ValueError, match=r"resize none \(64 x 64\), not lanczos 32"):
        opened(other)


def test_captions_are_scored_against_every_reference(prompts):
    scores = CaptionScores()
    asked = prompts.prompts()
    scores.update(SampleBatch(asked, range(COUNT), [], [prompt.references[-1] for prompt in asked]))
    assert scores.compute()[0]["bleu4[shapes]"] == pytest.approx(1.0)
    best = scores.compute()[0]["cider[shapes]"]
    scores.reset()
    scores.update(SampleBatch(asked, range(COUNT), [], ["dogs like sofas"] * COUNT))
    assert scores.compute()[0]["cider[shapes]"] == 0.0 < best


def test_missing_weights_are_reported_in_one_sentence(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for metric in (
        ImageQuality(extractor="inception"),
        ImageQuality(extractor="inception", weights=str(tmp_path / "none.pth")),
        CLIPScore(model="ViT-L-14", pretrained="openai"),
    ):
        with pytest.raises(ValueError) as error:
            metric.open(prompts)
        assert "\n" not in str(error.value)


def test_weights_of_the_shapes_extractor_are_refused():
    with pytest.raises(UserError, match="weights=other.pt has no effect with extractor=shapes"):
        load_extractor("shapes", "other.pt")
