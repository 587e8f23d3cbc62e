"""The oracle reads rendered scenes right and gives no meaning to anything else."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage

from support.shape_images import scene, shape_images
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.errors import UserError
from tf_lightning.shapes.oracle import Reading, carried_out, read
from tf_lightning.shapes.world import (
    BACKGROUND,
    COLORS,
    SHAPES,
    Meaning,
    Object,
    Scene,
    coverage,
    render,
)

BLANK = np.full((64, 64, 3), BACKGROUND, np.uint8)
RED_ABOVE_BLUE = Scene((Object("circle", "red", 30, 14, 10), Object("square", "blue", 34, 46, 9)))


def paint(image: np.ndarray, covered: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    blended = image + covered[..., None] * (np.float32(color) - image)
    return np.rint(blended).astype(np.uint8)


def test_2000_rendered_scenes_are_read_right():
    scenes = [scene(7, index, split=split) for index in range(1000) for split in ("train", "val")]
    right = [read(render(s)).meaning == s.meaning for s in scenes]
    assert np.mean(right) >= 0.999


def test_positions_and_sizes_are_read_to_a_fraction_of_a_pixel():
    for index in range(100):
        true = scene(8, index)
        for found in read(render(true)).objects:
            (same,) = [t for t in true.objects if (t.shape, t.color) == (found.shape, found.color)]
            errors = np.subtract((found.x, found.y, found.radius), (same.x, same.y, same.radius))
            assert abs(errors).max() < 0.3


def share_read_right(count: int, noise: float) -> float:
    """Share of held-out images that are read right after decoding from latents with noise.

    The latents have unit variance; `noise` is the standard deviation of the noise.
    """
    autoencoder = load_autoencoder("shapes")
    generator = torch.Generator().manual_seed(0)
    right = []
    for start in range(0, count, 50):
        indices = range(start, start + 50)
        latents = autoencoder.encode(shape_images(indices, split="val", seed=3))
        latents += noise * torch.randn(latents.shape, generator=generator)
        images = autoencoder.decode(latents)
        images = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        right += [
            read(image).meaning == scene(3, index, split="val").meaning
            for index, image in zip(indices, images, strict=True)
        ]
    return float(np.mean(right))


def test_reconstructions_are_read_right():
    assert share_read_right(400, noise=0.0) >= 0.99


def test_the_decoder_corrects_latents_with_noise():
    """A decoder trained only on latents without noise reaches 0.59."""
    assert share_read_right(200, noise=0.5) >= 0.95


def test_a_reading_is_described_in_words():
    assert str(read(render(RED_ABOVE_BLUE))) == "red circle above blue square"
    assert str(read(BLANK)) == "nothing"
    assert str(Reading(RED_ABOVE_BLUE.objects[:1], 1)) == "red circle, 1 unreadable"


def test_other_colors_shapes_or_relations_are_other_meanings():
    meaning = RED_ABOVE_BLUE.meaning
    first, second = meaning.objects
    others = [
        Meaning((second, first), "above"),
        Meaning((first, second), "left of"),
        Meaning((("circle", "blue"), ("square", "red")), "above"),
        Meaning((("square", "red"), ("circle", "blue")), "above"),
    ]
    assert read(render(RED_ABOVE_BLUE)).meaning == meaning
    assert meaning not in others


def test_blank_and_noise_have_no_meaning():
    rng = np.random.default_rng(0)
    assert read(BLANK).meaning is None
    for _ in range(50):
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert read(noise).meaning is None
        blobs = ndimage.gaussian_filter(noise.astype(float), (4, 4, 0))
        blobs = (blobs - blobs.min()) / np.ptp(blobs) * 255
        assert read(blobs.astype(np.uint8)).meaning is None


def test_an_extra_blob_removes_the_meaning_and_a_speck_does_not():
    image = render(RED_ABOVE_BLUE)
    for color in COLORS.values():
        assert read(paint(image, coverage("circle", 55, 30, 3), color)).meaning is None
        assert (
            read(paint(image, coverage("circle", 55, 30, 1), color)).meaning
            == RED_ABOVE_BLUE.meaning
        )


def test_three_objects_or_two_equal_ones_have_no_meaning():
    third = Object("triangle", "green", 54, 30, 7)
    assert read(render(Scene((*RED_ABOVE_BLUE.objects, third)))).meaning is None
    twice = Scene((Object("circle", "red", 20, 20, 8), Object("circle", "red", 45, 45, 8)))
    assert read(render(twice)).meaning is None


@pytest.mark.parametrize(
    "color", [(0, 0, 0), (128, 128, 128), (0, 255, 255), (255, 160, 200), (120, 70, 20)]
)
def test_a_color_outside_the_palette_has_no_meaning(color):
    assert read(paint(BLANK, coverage("circle", 30, 30, 10), color)).meaning is None


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_of_two_colors_has_no_meaning(shape):
    left = coverage(shape, 32, 32, 10) * (np.arange(64) < 32)
    right = coverage(shape, 32, 32, 10) * (np.arange(64) >= 32)
    image = paint(paint(BLANK, left, COLORS["red"]), right, COLORS["blue"])
    assert read(image).meaning is None


@pytest.mark.parametrize("color", COLORS)
def test_malformed_shapes_have_no_meaning(color):
    circle, square = coverage("circle", 32, 32, 10), coverage("square", 32, 32, 10)
    across, down = np.meshgrid(np.arange(64), np.arange(64))
    malformed = {
        "half a circle": circle * (across < 32),
        "ring": circle - coverage("circle", 32, 32, 6),
        "circle with a bite": circle * (1 - coverage("circle", 40, 26, 6)),
        "bar": square * (abs(down - 31.5) < 4),
        "cross": np.maximum(square * (abs(down - 31.5) < 3), square * (abs(across - 31.5) < 3)),
        "triangle upside down": coverage("triangle", 32, 31, 10)[::-1],
        "arch": np.maximum(circle * (down < 32), square * (down >= 32)),
        "two touching circles": np.maximum(
            coverage("circle", 24, 32, 8), coverage("circle", 40, 32, 8)
        ),
        "too large": coverage("circle", 32, 32, 20),
        "too small": coverage("circle", 32, 32, 4),
    }
    passed = [
        name
        for name, covered in malformed.items()
        if read(paint(BLANK, covered, COLORS[color])).meaning
    ]
    assert not passed


BEFORE = Scene((Object("circle", "red", 16, 20, 8), Object("square", "blue", 46, 22, 9)))


def with_first(**changes) -> Scene:
    """Return BEFORE with a changed circle."""
    return Scene((dataclasses.replace(BEFORE.objects[0], **changes), BEFORE.objects[1]))


def test_an_edit_must_change_the_named_object_and_nothing_else():
    after = with_first(color="green")
    assert carried_out(render(after), BEFORE, after)
    assert not carried_out(render(BEFORE), BEFORE, after)  # nothing changed
    assert not carried_out(render(with_first(color="yellow")), BEFORE, after)
    moved = Scene((after.objects[0], dataclasses.replace(BEFORE.objects[1], y=34)))
    assert read(render(moved)).meaning == after.meaning
    assert not carried_out(render(moved), BEFORE, after)  # the other object moved
    grown = Scene((after.objects[0], dataclasses.replace(BEFORE.objects[1], radius=13)))
    assert not carried_out(render(grown), BEFORE, after)


def test_a_removed_object_must_be_absent():
    after = Scene(BEFORE.objects[1:])
    assert carried_out(render(after), BEFORE, after)
    assert not carried_out(render(BEFORE), BEFORE, after)
    assert not carried_out(render(Scene(BEFORE.objects[:1])), BEFORE, after)


def test_an_image_of_another_size_is_refused():
    wide = np.concatenate([render(RED_ABOVE_BLUE), BLANK], 1)
    with pytest.raises(UserError, match="128 x 64 pixels, but the oracle .* reads 64 x 64"):
        read(wide)
