"""Aspect-ratio buckets: their sizes, the choice, and images of many shapes in a corpus."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from support.sources import GreyImages
from tf_lightning.batch import document_length, is_image
from tf_lightning.data import CaptionFolders
from tf_lightning.data.buckets import bucket_sizes, nearest_size
from tf_lightning.data.corpus.prepare import prepare
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.images import load_image
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import train_tokenizer

SIZES = [(600, 200), (96, 96), (64, 128), (33, 100), (1000, 40), (64, 64), (120, 90)]


def settings(count: int = 200):
    """Yield random (image size, multiple, largest ratio)."""
    rng = random.Random(0)
    for _ in range(count):
        multiple = rng.choice([1, 4, 8, 16, 64])
        yield multiple * rng.randint(1, 40), multiple, rng.uniform(1, 10)


def test_buckets_are_multiples_of_nearly_one_area_and_bounded_ratio():
    for image_size, multiple, ratio in settings():
        sizes = bucket_sizes(image_size, multiple, ratio)
        assert (image_size, image_size) in sizes
        assert len(set(sizes)) == len(sizes)
        assert {size[::-1] for size in sizes} == set(sizes)
        for width, height in sizes:
            assert width % multiple == height % multiple == 0
            assert max(width, height) / min(width, height) <= ratio
            assert abs(width * height - image_size**2) <= multiple * max(width, height) / 2


def test_every_longer_side_up_to_the_ratio_has_a_bucket():
    for image_size, multiple, ratio in settings():
        longest = max(max(size) for size in bucket_sizes(image_size, multiple, ratio))
        found = {
            size[0] for size in bucket_sizes(image_size, multiple, ratio) if size[0] >= size[1]
        }
        assert found == set(range(image_size, longest + 1, multiple))
        side = image_size // multiple
        shorter = max(1, round(side**2 / (longest // multiple + 1)))
        assert (longest // multiple + 1) / shorter > ratio or longest == side * image_size


def test_a_ratio_of_one_leaves_only_the_square():
    assert bucket_sizes(256, 16, 1.0) == ((256, 256),)


def test_the_nearest_bucket_is_the_nearest_by_brute_force_and_of_itself():
    rng = random.Random(1)
    for image_size, multiple, ratio in settings():
        sizes = bucket_sizes(image_size, multiple, ratio)
        for size in sizes:  # round trip
            found = nearest_size(size, sizes)
            assert found[0] * size[1] == found[1] * size[0]
        size = rng.randint(1, 5000), rng.randint(1, 5000)
        found = nearest_size(size, sizes)
        factor = lambda a, b: max(a[0] * b[1] / (a[1] * b[0]), a[1] * b[0] / (a[0] * b[1]))  # noqa: E731
        best = min(factor(size, other) for other in sizes)
        assert math.isclose(factor(size, found), best, rel_tol=1e-12)
        assert math.isclose(
            factor(size[::-1], nearest_size(size[::-1], sizes)), best, rel_tol=1e-12
        )


def test_an_image_is_cropped_in_the_middle_of_the_side_that_is_too_long(tmp_path):
    stripes = np.zeros((40, 100, 3), np.uint8)
    stripes[:, :10, 0] = stripes[:, -10:, 1] = 255  # cut off
    Image.fromarray(stripes).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", [(40, 80), (80, 40), (60, 60)])
    assert loaded.size == (80, 40) and np.asarray(loaded).max() == 0
    assert np.asarray(load_image(tmp_path / "a.png", [(80, 40)], crop=0.0))[:, :10, 0].min() == 255
    assert np.asarray(load_image(tmp_path / "a.png", [(80, 40)], crop=1.0))[:, -10:, 1].min() == 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images of SIZES with captions; each pixel says where it is."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(35):
        width, height = SIZES[number % len(SIZES)]
        rows, columns = np.mgrid[0:height, 0:width]
        image = np.stack([255 * rows // height, 255 * columns // width, 0 * rows + number], -1)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"image {number}")
    return folder


def make_tokenizer(folder):
    """Train a tokenizer on the captions, once."""
    path = folder / "tokenizer.model"
    if not path.exists():
        train_tokenizer(iter(["image 1234567890"]), path, 280)
    return path


@pytest.fixture
def data(folder, mixture):
    """A function that builds a Mixture of the folder, at 32 pixels and ratios up to 4."""
    tokenizer = str(make_tokenizer(folder))

    def build(**options):
        source = CaptionFolders(f"{folder}/*.png", image_size=32, val_fraction=0.2)
        arguments = {"max_aspect_ratio": 4.0, "row_length": 160, "batch_size": 4}
        arguments |= {"tokenizer": tokenizer}
        return mixture({"images": source}, **(arguments | options))

    return build


def documents(corpus: Corpus, random=None) -> list:
    return [corpus.document(number, random) for number in range(len(corpus))]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_corpus_keeps_each_image_in_the_shape_of_its_bucket(data, folder, lazy):
    built = data(lazy_images=lazy)
    built.setup()
    buckets = bucket_sizes(32, 4, 4.0)
    for split, corpora in built.corpora.items():
        corpus = corpora["images"]
        found = {}
        for document in documents(corpus):
            text, image = sorted(document, key=lambda part: part.ndim)
            number = int(built.tokenizer.decode(text.tolist()).split()[1])
            expected = load_image(folder / f"{number:02}.png", buckets)
            assert expected.size == nearest_size(SIZES[number % len(SIZES)], buckets)
            pixels = image.float() if lazy else (image + 1) * 127.5
            pixels = pixels.permute(1, 2, 0).numpy()
            assert np.abs(pixels - np.asarray(expected)).max() < 0.1, split
            found[tuple(image.shape)] = found.get(tuple(image.shape), 0) + 1
        assert corpus.image_shapes == found
        lengths = [document_length(document, patch_size=4) for document in documents(corpus)]
        assert corpus.layout().lengths(0).tolist() == lengths
    assert built.image_shape == (3, 32, 32)
    assert len(built.image_shapes) > 4


def test_rows_of_unequal_images_hold_the_planned_documents(data):
    """Flips, crops, dropped captions and copies: every row is as long as the plan says."""
    options = {"caption_drop_prob": 0.3, "image_first_prob": 0.5, "row_length": 200}
    built = data(hflip=True, crops=2, clean_copies=True, **options)
    built.setup()
    rows = built.training_rows().corpora[0]
    total = 0
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        for document in row:
            total += document_length(document, 4)
            read = [part for part in document[:-1] if is_image(part)]
            total += sum(part.shape[1] * part.shape[2] // 16 for part in read)
    assert total == rows.num_tokens
    for batch, _ in zip(built.train_dataloader(), range(5), strict=False):
        per_image = (batch.image_ids[batch.image_ids >= 0]).bincount()[: batch.num_images]
        shapes = [b[2:] for b in batch.buckets for _ in range(b.num_images)]
        assert per_image.tolist() == [h * w // 16 for h, w in shapes]


def test_flips_and_crops_are_views_of_the_same_shape(data, folder):
    built = data(hflip=True, crops=3)
    built.setup()
    corpus = built.corpora["train"]["images"]
    seen: dict[int, set[bytes]] = {}
    for seed in range(50):
        for number, document in enumerate(documents(corpus, np.random.default_rng(seed))):
            image = next(part for part in document if is_image(part))
            assert image.shape == next(filter(is_image, corpus.document(number))).shape
            seen.setdefault(number, set()).add(image.numpy().tobytes())
    # A side that is cropped has three crops, each also flipped; an exact fit has two views.
    assert {len(views) for views in seen.values()} <= {2, 6} and max(map(len, seen.values())) == 6


def test_a_damaged_shape_is_refused(data):
    built = data()
    built.setup()
    path = built.corpora["train"]["images"].path
    shapes = np.load(path / "shapes.npy")
    number = int(np.flatnonzero(shapes[:, 1] != shapes[:, 2])[0])
    shapes[number, 1:3] = shapes[number, 2:0:-1]  # the same content in another shape
    np.save(path / "shapes.npy", shapes)
    with pytest.raises(UserError, match="is damaged; delete the folder"):
        documents(Corpus(path))


def test_shards_of_unequal_images_join_to_the_corpus_of_one_shard(data, tmp_path, monkeypatch):
    whole = data()
    whole.setup()
    monkeypatch.setattr("tf_lightning.data.readers.files.SHARD_BYTES", 1000)
    parts = data(cache_dir=str(tmp_path / "parts"))
    parts.setup()
    one, many = whole.corpora["train"]["images"], parts.corpora["train"]["images"]
    assert one.image_shapes == many.image_shapes
    for name in ("shapes.npy", "latents.bin", "checks.npy", "parts.npy"):
        assert (one.path / name).read_bytes() == (many.path / name).read_bytes()


def test_without_the_option_images_are_square_and_have_no_shapes(data):
    square = data(max_aspect_ratio=1.0)
    square.setup()
    corpus = square.corpora["train"]["images"]
    assert corpus.image_shapes == {(3, 32, 32): len(corpus)}
    assert not (corpus.path / "shapes.npy").exists()
    assert "max_aspect_ratio" not in (corpus.path / "corpus.json").read_text()


def test_a_filter_list_leaves_the_buckets_of_the_others(data, tmp_path):
    (tmp_path / "list.txt").write_text("nothing.png\n")
    filtered, whole = data(exclude=str(tmp_path / "list.txt")), data()
    filtered.setup(), whole.setup()
    assert filtered.image_shapes == whole.image_shapes and len(whole.image_shapes) > 4


class Drawn(GreyImages):
    """Images that the source draws in shapes of its own."""

    def documents(self, split):
        for (text, _), size in zip(super().documents(split), self.sizes * 100, strict=False):
            yield [text, Image.new("RGB", size)]

    sizes = [(8, 8), (24, 8), (8, 16), (40, 8), (9, 8)]


def test_a_source_may_draw_images_of_any_shape_that_divides_into_patches(mixture):
    built = mixture({"drawn": Drawn()}, max_aspect_ratio=3.0)
    built.setup()
    corpus = built.corpora["train"]["drawn"]
    assert corpus.image_shapes == {(3, 8, 8): 60, (3, 8, 24): 60, (3, 16, 8): 60}
    assert corpus.skipped == {
        "image of an aspect ratio above 3": 60,
        "image whose sides are not multiples of 4 pixels": 60,
    }
    assert built.image_shape == (3, 8, 8)


def test_an_encoded_folder_of_other_ratios_is_refused(data, tmp_path):
    encoded = data(encoded=str(tmp_path / "encoded"))
    for job in encoded.plan_encoded():
        job.shards_folder.mkdir(parents=True)
        prepare(job)
    (tmp_path / "encoded" / "tokenizer.model").write_bytes(encoded.tokenizer.proto)
    encoded.setup()
    assert len(encoded.image_shapes) > 4
    with pytest.raises(UserError, match="max_aspect_ratio 4.0, but the data has 2.0"):
        data(encoded=str(tmp_path / "encoded"), max_aspect_ratio=2.0).setup()
    source = CaptionFolders(encoded.sources["images"].paths, image_size=64, val_fraction=0.2)
    other = data(encoded=str(tmp_path / "encoded"), row_length=400)
    other.sources = {"images": source}
    with pytest.raises(UserError, match=r"images of \d+ x \d+ pixels, .* has image_size 64"):
        other.setup()


def test_options_that_cannot_keep_the_shape_are_refused(data):
    with pytest.raises(UserError, match="max_aspect_ratio=0.5 must be from 1 to 10"):
        data(max_aspect_ratio=0.5)
    with pytest.raises(UserError, match="tokens, which do not say where a row of the image ends"):
        data(autoencoder="shapes_vq", patch_size=1).setup()
    only_squares = "only squares of 32 pixels, since sides are multiples of 4; give at least 1.29,"
    with pytest.raises(UserError, match=f"max_aspect_ratio=1.2 leaves {only_squares}"):
        data(max_aspect_ratio=1.2).setup()
    with pytest.raises(UserError, match="multiples of 32; give a larger image_size, or leave it"):
        data(patch_size=32).setup()
    with pytest.raises(UserError, match="max_aspect_ratio changes images, but without"):
        data(autoencoder=None)


def test_training_sees_noise_of_each_image_only_in_its_own_shape(data):
    built = data()
    built.setup()
    batch = next(iter(built.train_dataloader()))
    assert len(batch.buckets) > 2
    start = 0
    for bucket in batch.buckets:
        inside = torch.zeros(batch.noise.shape[-2:], dtype=torch.bool)
        inside[: bucket.height, : bucket.width] = True
        images = slice(start, start + bucket.num_images)
        assert (batch.noise[images][..., ~inside] == 0).all()
        assert (batch.latents[images][..., ~inside] == 0).all()
        assert batch.noise[images][..., inside].std() > 0.8
        start += bucket.num_images
