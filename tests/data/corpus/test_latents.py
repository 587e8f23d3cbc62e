"""Stored moments, flips and crops: drawn at random in training, fixed in validation."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from support import training_datasets
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.data import CaptionRows, Mixture
from tf_lightning.data.corpus.image_storage import ImageStorageSpec
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


def world_images(split: str) -> torch.Tensor:
    """Images of the shapes world, (n, 3, 64, 64) in [-1, 1]."""
    found = [np.asarray(image) for _, image in ShapesCaptions(12, 4).documents(split)]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_moments_equal_those_of_diffusers(build):
    autoencoder, images = load_autoencoder("shapes"), world_images("train")[:3]
    posterior = autoencoder.model.encode(images).latent_dist
    mean, std = autoencoder.moments(images).unbind(1)
    torch.testing.assert_close(mean, autoencoder.encode(images))
    torch.testing.assert_close(mean * autoencoder.std + autoencoder.mean, posterior.mean)
    torch.testing.assert_close(std * autoencoder.std, posterior.std)


def test_training_samples_the_posterior_and_validation_takes_its_mode(build):
    data = build(sample_posterior=True)
    corpus = data.corpora["train"]["captions"]
    mean, std = load_autoencoder("shapes").moments(world_images("train")).unbind(1)
    draws = [corpus.document(5, np.random.default_rng(n))[1] for n in range(400)]
    scores = (torch.stack(draws) - mean[5]) / std[5].clamp(min=1e-6)
    clear = std[5] > 1e-2  # large enough that the fp16 rounding of the mean does not matter
    if clear.any():
        assert scores[:, clear].mean().abs() < 0.05
        assert scores[:, clear].std() == pytest.approx(1, abs=0.05)
    spread = torch.stack(draws).std(0)
    torch.testing.assert_close(spread, std[5], rtol=0.25, atol=2e-3)
    torch.testing.assert_close(corpus.document(5)[1], mean[5], rtol=2e-3, atol=2e-3)
    modes = torch.cat([batch.latents for batch in data.val_dataloader()[0]])
    expected = load_autoencoder("shapes").encode(world_images("val"))
    torch.testing.assert_close(modes.sum((1, 2, 3)).sort()[0], expected.sum((1, 2, 3)).sort()[0],
                               rtol=1e-2, atol=0.3)  # fmt: skip


def test_half_of_the_documents_are_flipped(build):
    corpus = build(hflip=True).corpora["train"]["captions"]
    images, encode = world_images("train"), load_autoencoder("shapes").encode
    plain, flipped = encode(images)[2], encode(images.flip(-1))[2]
    assert (plain - flipped).abs().max() > 0.5
    found = []
    for n in range(200):
        latents = corpus.document(2, np.random.default_rng(n))[1]
        found.append(torch.allclose(latents, flipped, rtol=2e-3, atol=2e-3))
        assert found[-1] or torch.allclose(latents, plain, rtol=2e-3, atol=2e-3)
    assert 70 < sum(found) < 130


def test_samples_depend_on_the_row_and_differ_between_epochs(build):
    rows, again = (build(sample_posterior=True, hflip=True).train_dataloader().dataset
                   for _ in range(2))  # fmt: skip
    latents = lambda r, n: torch.stack([d[1] for d in r[n][1]])  # noqa: E731
    assert torch.equal(latents(rows, 7), latents(again, 7))
    (corpus,) = rows.corpora
    seen = [d[1] for n in range(3 * corpus.rows_per_epoch) for d in corpus.row(n)]
    assert len({x.numpy().tobytes() for x in seen}) == 3 * 12


def test_each_image_storage_has_its_own_corpus(build):
    paths = [
        build(**options).corpora["train"]["captions"].path
        for options in ({}, {"hflip": True}, {"sample_posterior": True})
    ]
    assert len(set(paths)) == 3


def test_image_storage_keeps_the_keys_of_older_corpora():
    """The keys are part of a corpus's hash, so corpora prepared earlier are found again."""
    keys = {"mirrored": True, "moments": True, "in_place": False, "crops": 2}
    storage = ImageStorageSpec.from_json(keys)
    assert storage == ImageStorageSpec(hflip=True, moments=True, lazy=False, crops=2)
    assert json.dumps(storage.to_json()) == json.dumps(keys)


THIRDS = ("red", "lime", "blue")  # left, center and right of an image three times as wide as high


@pytest.fixture
def wide(tmp_path):
    """Build a Mixture of such an image file and its transpose, for training and validation."""
    pixels = np.array([training_datasets.COLORS[color] for color in THIRDS], np.uint8)
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


def color_of_pixels(image: torch.Tensor) -> str:
    """Name the color of an image of one color, uint8 or in [-1, 1]."""
    assert (image == image[:, :1, :1]).all()
    pixels = image if image.dtype == torch.uint8 else (image + 1) * 127.5
    image = Image.fromarray(pixels.round().byte().permute(1, 2, 0).repeat(2, 2, 1).numpy())
    return training_datasets.color_of(image)


@pytest.mark.parametrize("lazy_images", [False, True])
@pytest.mark.parametrize("crops", [1, 2, 3])
def test_training_draws_all_crops_equally_often_and_validation_takes_the_center(
    lazy_images, crops, wide
):
    data = wide(lazy_images=lazy_images, crops=crops, hflip=True)
    for number in range(2):
        corpus = data.corpora["train"]["wide"]
        shown = Counter(
            color_of_pixels(corpus.document(number, np.random.default_rng(seed))[1])
            for seed in range(120)
        )
        assert set(shown) == set([("lime",), ("lime", "red"), THIRDS][crops - 1])
        assert min(shown.values()) > 0.7 * 120 / crops
        assert color_of_pixels(data.corpora["val"]["wide"].document(number)[1]) == "lime"


@pytest.mark.parametrize("lazy_images", [False, True])
def test_each_crop_is_shown_flipped_and_unflipped(lazy_images, wide):
    data = wide(lazy_images=lazy_images)
    path = data.sources["wide"].paths.replace("metadata.jsonl", "wide.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 24, 3), np.uint8)
    Image.fromarray(noise).save(path)
    corpus = wide(lazy_images=lazy_images, crops=3, hflip=True).corpora["train"]["wide"]
    expected = [torch.from_numpy(noise[:, x : x + 8].copy()).permute(2, 0, 1) for x in (8, 0, 16)]
    expected += [image.flip(-1) for image in expected]
    found = set()
    for seed in range(80):
        image = corpus.document(0, np.random.default_rng(seed))[1]
        if not lazy_images:
            image = (image + 1) * 127.5
        close = [(image - view).abs().max() < 0.1 for view in map(torch.Tensor.float, expected)]
        assert sum(close) == 1
        found.add(close.index(True))
    assert found == set(range(6))


def test_crops_of_generated_images_and_wrong_numbers_of_crops_are_refused(build):
    with pytest.raises(UserError, match="crops need images that are read from files"):
        build(crops=2)
    with pytest.raises(UserError, match="crops=4 must be 1"):
        build(crops=4)
