"""The shapes world: every scene follows the rules, and the rendering is accurate."""

import numpy as np
import pytest

from support.shape_images import scene
from tf_lightning.shapes.world import (
    BACKGROUND,
    COLORS,
    DOMINANCE,
    GAP,
    IMAGE_SIZE,
    MARGIN,
    RADII,
    Meaning,
    Object,
    Scene,
    coverage,
    held_out,
    meanings,
    render,
)

TRAIN = [scene(1, index) for index in range(2000)]
VAL = [scene(1, index, split="val") for index in range(2000)]
TWO = [s for s in TRAIN + VAL if len(s.objects) == 2]


def test_a_scene_is_a_function_of_seed_index_and_split():
    assert scene(3, 5) == scene(3, 5)
    assert len({scene(3, 5), scene(4, 5), scene(3, 6), scene(3, 5, split="val")}) == 4


def test_the_share_of_two_objects_is_the_requested_one():
    share = np.mean([len(s.objects) == 2 for s in TRAIN])
    assert share == pytest.approx(0.75, abs=0.04)
    assert {len(scene(1, i, two_objects=0.0).objects) for i in range(50)} == {1}
    assert {len(scene(1, i, num_objects=2).objects) for i in range(50)} == {2}


def test_objects_stay_inside_and_sizes_vary_over_the_whole_range():
    objects = [thing for s in TRAIN + VAL for thing in s.objects]
    for thing in objects:
        assert RADII[0] <= thing.radius <= RADII[1]
        for place in (thing.x, thing.y):
            assert thing.radius + MARGIN <= place + 1e-9
            assert place + thing.radius + MARGIN <= IMAGE_SIZE + 1e-9
    radii = [thing.radius for thing in objects]
    assert min(radii) < 7.1 and max(radii) > 12.9


def test_two_objects_never_touch_and_their_relation_is_clear():
    for s in TWO:
        a, b = s.objects
        across, down = abs(a.x - b.x), abs(a.y - b.y)
        assert max(across, down) >= DOMINANCE * min(across, down) - 1e-9
        assert max(across, down) - a.radius - b.radius >= GAP - 1e-9


def test_two_objects_are_never_equal():
    assert all(len(set(s.meaning.objects)) == 2 for s in TWO)


def test_there_are_18_meanings_of_one_object_and_612_of_two():
    assert len(set(meanings(1))) == 18
    assert len(set(meanings(2))) == 18 * 17 * 2


def test_above_and_below_are_one_meaning():
    red, blue = Object("circle", "red", 30, 12, 8), Object("square", "blue", 32, 45, 8)
    expected = Meaning((("circle", "red"), ("square", "blue")), "above")
    assert Scene((red, blue)).meaning == Scene((blue, red)).meaning == expected
    assert str(expected) == "red circle above blue square"


def test_left_and_right_are_one_meaning():
    red, blue = Object("circle", "red", 12, 30, 8), Object("square", "blue", 45, 32, 8)
    expected = Meaning((("circle", "red"), ("square", "blue")), "left of")
    assert Scene((red, blue)).meaning == Scene((blue, red)).meaning == expected


def test_a_tenth_of_the_meanings_of_two_objects_is_never_in_training():
    assert len(meanings(2, "train")) + len(meanings(2, "val")) == len(meanings(2))
    assert 0.08 <= len(meanings(2, "val")) / len(meanings(2)) <= 0.12
    assert not any(held_out(s.meaning) for s in TRAIN)
    assert all(held_out(s.meaning) for s in VAL if len(s.objects) == 2)


def test_every_meaning_is_drawn():
    assert {s.meaning for s in VAL} == {*meanings(1), *meanings(2, "val")}
    drawn = {scene(2, index).meaning for index in range(8000)}
    assert drawn == {*meanings(1), *meanings(2, "train")}


@pytest.mark.parametrize(
    ("shape", "inside"),
    [
        ("circle", lambda x, y: x**2 + y**2 <= 1),
        ("square", lambda x, y: (abs(x) <= 1) & (abs(y) <= 1)),
        ("triangle", lambda x, y: (y <= 1) & (2 * abs(x) <= y + 1)),
    ],
)
def test_coverage_equals_16_by_16_samples_per_pixel(shape, inside):
    x, y, radius = 30.3, 25.8, 9.6
    samples = (np.arange(IMAGE_SIZE * 16) + 0.5) / 16
    hits = inside((samples[None] - x) / radius, (samples[:, None] - y) / radius)
    expected = hits.reshape(IMAGE_SIZE, 16, IMAGE_SIZE, 16).mean((1, 3))
    found = coverage(shape, x, y, radius)
    assert abs(found - expected).mean() < 1e-3
    assert (
        abs(found - expected).max() < 0.35
    )  # at corners, where the distance only approximates the coverage
    assert found.sum() == pytest.approx(expected.sum(), rel=0.01)


def test_an_image_has_the_color_inside_and_the_background_outside():
    thing = Object("triangle", "purple", 20.0, 40.0, 10.0)
    image = render(Scene((thing,)))
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert tuple(image[45, 20]) == COLORS["purple"]
    assert tuple(image[32, 12]) == BACKGROUND  # inside the box, outside the triangle
    assert tuple(image[10, 50]) == BACKGROUND
