"""Latents kept with their spread and mirrored: sampled in training, the mode in validation."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from support import training_datasets
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.data import CaptionRows, Mixture
from tf_lightning.errors import UserError
from tf_lightning.shapes.sources import ShapesCaptions

SEED = 3


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")

    def build_here(**options) -> Mixture:
        sources = {"captions": ShapesCaptions(12, 4)}
        data = Mixture(
            sources, autoencoder="shapes", row_length=256, batch_size=4, vocab_size=300, seed=SEED,
            cache_dir=str(folder), image_first_prob=0, caption_drop_prob=0, **options,
        )  # fmt: skip
        data.setup()
        return data

    return build_here


def pictures(split: str) -> torch.Tensor:
    """(n, 3, 64, 64) in [-1, 1]."""
    found = [np.asarray(picture) for _, picture in ShapesCaptions(12, 4).documents(split)]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_moments_are_those_of_diffusers(build):
    autoencoder, images = load_autoencoder("shapes"), pictures("train")[:3]
    posterior = autoencoder.model.encode(images).latent_dist
    mean, std = autoencoder.moments(images).unbind(1)
    torch.testing.assert_close(mean, autoencoder.encode(images))
    torch.testing.assert_close(mean * autoencoder.std + autoencoder.mean, posterior.mean)
    torch.testing.assert_close(std * autoencoder.std, posterior.std)


def test_training_samples_the_posterior_and_validation_takes_its_mode(build):
    data = build(sample_posterior=True)
    corpus = data.corpora["train"]["captions"]
    mean, std = load_autoencoder("shapes").moments(pictures("train")).unbind(1)
    draws = [corpus.document(5, np.random.default_rng(n))[1] for n in range(400)]
    scores = (torch.stack(draws) - mean[5]) / std[5].clamp(min=1e-6)
    clear = std[5] > 1e-2  # where fp16 of the mean does not weigh
    if clear.any():
        assert scores[:, clear].mean().abs() < 0.05
        assert scores[:, clear].std() == pytest.approx(1, abs=0.05)
    spread = torch.stack(draws).std(0)
    torch.testing.assert_close(spread, std[5], rtol=0.25, atol=2e-3)
    torch.testing.assert_close(corpus.document(5)[1], mean[5], rtol=2e-3, atol=2e-3)
    modes = torch.cat([batch.latents for batch in data.val_dataloader()[0]])
    expected = load_autoencoder("shapes").encode(pictures("val"))
    torch.testing.assert_close(modes.sum((1, 2, 3)).sort()[0], expected.sum((1, 2, 3)).sort()[0],
                               rtol=1e-2, atol=0.3)  # fmt: skip


def test_half_of_the_documents_are_mirrored(build):
    corpus = build(hflip=True).corpora["train"]["captions"]
    images, encode = pictures("train"), load_autoencoder("shapes").encode
    plain, mirrored = encode(images)[2], encode(images.flip(-1))[2]
    assert (plain - mirrored).abs().max() > 0.5
    found = []
    for n in range(200):
        latents = corpus.document(2, np.random.default_rng(n))[1]
        found.append(torch.allclose(latents, mirrored, rtol=2e-3, atol=2e-3))
        assert found[-1] or torch.allclose(latents, plain, rtol=2e-3, atol=2e-3)
    assert 70 < sum(found) < 130


def test_samples_belong_to_the_row_and_differ_between_epochs(build):
    rows, again = (build(sample_posterior=True, hflip=True).train_dataloader().dataset
                   for _ in range(2))  # fmt: skip
    latents = lambda r, n: torch.stack([d[1] for d in r[n][1]])  # noqa: E731
    assert torch.equal(latents(rows, 7), latents(again, 7))
    (corpus,) = rows.corpora
    seen = [d[1] for n in range(3 * corpus.rows_per_epoch) for d in corpus.row(n)]
    assert len({x.numpy().tobytes() for x in seen}) == 3 * 12


def test_what_is_kept_names_the_corpus_and_the_default_is_as_it_was(build):
    paths = [
        build(**options).corpora["train"]["captions"].path
        for options in ({}, {"hflip": True}, {"sample_posterior": True})
    ]
    assert len(set(paths)) == 3


THIRDS = ("red", "lime", "blue")  # left, middle and right of a picture three times as wide as high


@pytest.fixture
def wide(tmp_path):
    """A Mixture of one such picture, in a file, and one as tall, which are held out too."""
    pixels = np.array([training_datasets.COLOURS[colour] for colour in THIRDS], np.uint8)
    row = pixels[None].repeat(8, 0).repeat(8, 1)  # 8 x 24
    Image.fromarray(row).save(tmp_path / "wide.png")
    Image.fromarray(row.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    lines = [{"file_name": f"{name}.png", "text": name} for name in ("wide", "tall")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = str(tmp_path / "metadata.jsonl")

    def build(**options) -> Mixture:
        source = CaptionRows(file, val_paths=file, image_size=8)
        data = Mixture(
            {"wide": source}, autoencoder="pixels", patch_size=4, vocab_size=300,
            cache_dir=str(tmp_path / "cache"), **options,
        )  # fmt: skip
        data.setup()
        return data

    return build


def colour_at(picture: torch.Tensor) -> str:
    """Of a picture of one colour, uint8 or in [-1, 1]."""
    assert (picture == picture[:, :1, :1]).all()
    pixels = picture if picture.dtype == torch.uint8 else (picture + 1) * 127.5
    image = Image.fromarray(pixels.round().byte().permute(1, 2, 0).repeat(2, 2, 1).numpy())
    return training_datasets.colour_of(image)


@pytest.mark.parametrize("lazy_images", [False, True])
@pytest.mark.parametrize("crops", [1, 2, 3])
def test_squares_of_a_long_picture_are_shown_in_turn_and_the_middle_in_validation(
    lazy_images, crops, wide
):
    data = wide(lazy_images=lazy_images, crops=crops, hflip=True)
    for number in range(2):
        corpus = data.corpora["train"]["wide"]
        shown = Counter(
            colour_at(corpus.document(number, np.random.default_rng(seed))[1])
            for seed in range(120)
        )
        assert set(shown) == set([("lime",), ("lime", "red"), THIRDS][crops - 1])
        assert min(shown.values()) > 0.7 * 120 / crops  # every crop as often
        assert colour_at(data.corpora["val"]["wide"].document(number)[1]) == "lime"


@pytest.mark.parametrize("lazy_images", [False, True])
def test_a_crop_is_mirrored_as_it_is(lazy_images, wide):
    """Noise tells the views apart: each of the six is shown."""
    data = wide(lazy_images=lazy_images)
    path = data.sources["wide"].paths.replace("metadata.jsonl", "wide.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 24, 3), np.uint8)
    Image.fromarray(noise).save(path)
    corpus = wide(lazy_images=lazy_images, crops=3, hflip=True).corpora["train"]["wide"]
    expected = [torch.from_numpy(noise[:, x : x + 8].copy()).permute(2, 0, 1) for x in (8, 0, 16)]
    expected += [picture.flip(-1) for picture in expected]
    found = set()
    for seed in range(80):
        picture = corpus.document(0, np.random.default_rng(seed))[1]
        if not lazy_images:
            picture = (picture + 1) * 127.5
        close = [(picture - view).abs().max() < 0.1 for view in map(torch.Tensor.float, expected)]
        assert sum(close) == 1
        found.add(close.index(True))
    assert found == set(range(6))


def test_crops_of_what_was_drawn_or_of_a_wrong_number_are_refused(build):
    with pytest.raises(UserError, match="crops need images that are read from files"):
        build(crops=2)
    with pytest.raises(UserError, match="crops=4 must be 1"):
        build(crops=4)
