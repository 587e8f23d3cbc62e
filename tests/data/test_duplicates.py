"""Perceptual hashes have known values, and near duplicates are found without their neighbors."""

import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tf_lightning.data.duplicates import (
    BANDS,
    MAX_BITS,
    OTHER_TEXT,
    SAME_TEXT,
    Look,
    Lookalikes,
    look_of,
    perceptual_hash,
    side_by_side,
)


def noise(seed: int, side: int = 96, coarse: int = 8) -> Image.Image:
    """A smooth picture of random colors."""
    colors = np.random.default_rng(seed).integers(0, 256, (coarse, coarse, 3), np.uint8)
    return Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def test_the_hash_is_the_sign_of_each_low_frequency_relative_to_their_median():
    """The definition of `imagehash.phash`, with the sums of the cosine transform written out."""
    image = noise(0, 32)
    gray = np.asarray(image.convert("L"), np.float64)
    waves = [[math.cos(math.pi * k * (2 * x + 1) / 64) for x in range(32)] for k in range(8)]
    low = [
        [4 * np.outer(waves[v], waves[u]).ravel() @ gray.ravel() for u in range(8)]
        for v in range(8)
    ]
    bits = "".join("01"[int(value > np.median(low))] for value in np.ravel(low))
    assert perceptual_hash(image) == int(bits, 2)
    assert bits.count("1") == 32


def test_a_wave_has_the_hash_of_its_frequency():
    """The median is 0; a single cosine has only its own coefficient and the mean above it."""
    x = np.arange(32)
    wave = 128 + 100 * np.cos(np.pi * 3 * (2 * x + 1) / 64)
    image = Image.fromarray(np.tile(np.rint(wave).astype(np.uint8), (32, 1))).convert("RGB")
    first, fourth = 1 << 63, 1 << 60  # coefficients (0, 0) and (0, 3)
    assert perceptual_hash(image) & (first | fourth) == first | fourth
    assert perceptual_hash(image).bit_count() <= 6  # rounding to 8 bits adds small frequencies


def test_flat_images_have_one_hash_without_noise():
    hashes = {perceptual_hash(Image.new("RGB", (50, 50), (v, v, v))) for v in range(1, 256)}
    assert hashes == {1 << 63}


def test_the_bands_cut_a_hash_so_that_similar_hashes_share_one():
    assert BANDS[0] == 0 and BANDS[-1] == 64 and len(BANDS) == MAX_BITS + 2
    draw = np.random.default_rng(0)
    keys = Lookalikes()._keys
    for _ in range(200):
        one = int(draw.integers(0, 2**63))
        other = one
        for bit in draw.choice(64, MAX_BITS, replace=False):
            other ^= 1 << int(bit)
        assert (one ^ other).bit_count() == MAX_BITS
        assert set(keys(Look(1, 0, one, None))) & set(keys(Look(1, 0, other, None)))
        assert not set(keys(Look(1, 0, one, None))) & set(keys(Look(2, 0, one, None)))


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_what_comparing_all_pairs_finds(seed):
    """Against each image with every earlier one, for looks near and beyond each of the limits."""
    draw = np.random.default_rng(seed)
    base = [(int(draw.integers(0, 2**63)), draw.integers(40, 200, (16, 16, 3))) for _ in range(5)]
    looks = []
    for _ in range(300):
        bits, pixels = base[draw.integers(5)]
        for bit in draw.choice(64, draw.integers(0, MAX_BITS + 3), replace=False):
            bits ^= 1 << int(bit)
        pixels = pixels + draw.integers(0, 12)
        pixels[0, 0] += draw.integers(0, 80)
        count, text = draw.integers(1, 3, 2).tolist()
        looks.append(Look(count, text, bits, pixels.clip(0, 255).astype(np.uint8)))

    def alike(one: Look, other: Look) -> bool:
        apart = np.abs(one.thumbnail.astype(int) - other.thumbnail)
        mean, largest = SAME_TEXT if one.text == other.text else OTHER_TEXT
        return (
            one.count == other.count
            and (one.hash ^ other.hash).bit_count() <= MAX_BITS
            and apart.mean() <= mean
            and apart.max() <= largest
        )

    search, kept, num_found = Lookalikes(), [], 0
    for number, look in enumerate(looks):
        found = search.find(look)
        matching = [other for other in kept if alike(looks[other], look)]
        assert (found is None) == (not matching)
        if found is None:
            search.add(number, look)
            kept.append(number)
        else:
            num_found += 1
            assert found[0] in matching
            assert found[1] == (looks[found[0]].hash ^ look.hash).bit_count()
    assert 50 < num_found < 290


def test_thumbnails_are_kept_when_their_file_grows():
    search = Lookalikes()
    looks = [look_of([noise(seed, 32)]) for seed in range(1100)]
    for number, look in enumerate(looks):
        search.add(number, look)
    assert [search.find(look) for look in looks[::97]] == [(n, 0) for n in range(0, 1100, 97)]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.copy(),
        lambda image: as_jpeg(image, 50),
        lambda image: image.resize((48, 48), Image.Resampling.BICUBIC),
        lambda image: image.resize((300, 300), Image.Resampling.LANCZOS),
        lambda image: image.point(lambda value: round(0.97 * value)),
    ],
    ids=["copy", "jpeg", "smaller", "larger", "darker"],
)
def test_changed_images_look_like_their_original_and_no_other(change):
    search = Lookalikes()
    images = [noise(seed) for seed in range(60)]
    for number, image in enumerate(images):
        assert search.find(look_of([image])) is None
        search.add(number, look_of([image]))
    found = [search.find(look_of([change(image)])) for image in images]
    assert [f and f[0] for f in found] == list(range(60))


def test_drawings_of_one_structure_in_other_colors_are_no_duplicates():
    """Their gray images, and so their hashes, hardly differ."""
    search, hashes = Lookalikes(), set()
    for color, place in itertools.product(("red", "green", "blue", "black"), range(0, 40, 4)):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((place, 10, place + 20, 30), color)
        look = look_of([image])
        assert search.find(look) is None
        search.add(0, look)
        hashes.add(look.hash)
    assert len(hashes) < 40


def test_images_with_the_same_text_may_differ_more():
    image = noise(0)
    darker = image.point(lambda value: round(0.95 * value))
    search = Lookalikes()
    search.add(0, look_of([image], text=1))
    assert search.find(look_of([darker], text=1)) is not None
    assert search.find(look_of([darker], text=2)) is None


def test_several_images_are_compared_in_their_order():
    one, two = noise(1), noise(2)
    page = side_by_side([one, two])
    assert page.size == (192, 96)
    assert page.crop((96, 0, 192, 96)).tobytes() == two.tobytes()
    search = Lookalikes()
    search.add(7, look_of([one, two]))
    assert search.find(look_of([one, two])) == (7, 0)
    assert search.find(look_of([two, one])) is None
    assert search.find(look_of([page])) is None  # another number of images
