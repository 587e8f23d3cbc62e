"""GenEval's tasks judge parts of the meaning; its folder has all images of a prompt."""

import json

import pytest
from PIL import Image

from callbacks.geneval import GenEvalFolder, ShapesComposition, verdicts
from callbacks.prompts import Prompt, ShapesPrompts
from callbacks.sampling import SampleBatch
from tf_lightning.shapes.sources import scene_image
from tf_lightning.shapes.world import Object, Scene


def scene(first: str, second: str, swapped: bool = False) -> Scene:
    """Two objects such as "red circle", the first left of the second; `swapped` exchanges them."""
    places = (45.0, 18.0) if swapped else (18.0, 45.0)
    things = [
        (*reversed(words.split()), x) for words, x in zip((first, second), places, strict=True)
    ]
    return Scene(tuple(Object(shape, color, x, 32.0, 10.0) for shape, color, x in things))


ASKED = scene("red circle", "blue square").meaning
CASES = {  # the image: whether the shapes, their colors, and also the relation are right
    ("red circle", "blue square", False): (True, True, True),
    ("red circle", "blue square", True): (True, True, False),
    ("blue circle", "red square", False): (True, False, False),
    ("red circle", "blue triangle", False): (False, False, False),
}


@pytest.mark.parametrize("shown", CASES)
def test_two_objects_are_judged_by_shape_color_and_position(shown):
    found = verdicts(ASKED, scene_image(scene(*shown)))
    assert (found["two_object"], found["color_attr"], found["position"]) == CASES[shown]


@pytest.mark.parametrize(
    ("color", "shape", "right"),
    [("red", "circle", (True, True)), ("blue", "circle", (True, False)),
     ("red", "square", (False, False))],
)  # fmt: skip
def test_one_object_is_judged_by_shape_and_color(color, shape, right):
    asked = Scene((Object("circle", "red", 30.0, 30.0, 10.0),)).meaning
    found = verdicts(asked, scene_image(Scene((Object(shape, color, 20.0, 30.0, 10.0),))))
    assert (found["single_object"], found["colors"]) == right


def test_real_images_score_one_and_blank_images_zero():
    asked, score = ShapesPrompts(30).prompts(), ShapesComposition()
    score.update(SampleBatch(asked, range(30), [prompt.image() for prompt in asked]))
    values, reasons = score.compute()
    assert reasons == []
    assert set(values.values()) == {1.0} and "composition[shapes]/overall" in values
    assert set(score.protocol) == set(values)
    score.reset()
    score.update(SampleBatch(asked, range(30), [Image.new("RGB", (64, 64))] * 30))
    assert set(score.compute()[0].values()) == {0.0}


def test_the_folder_has_the_metadata_and_images_of_each_prompt(tmp_path):
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    asked = [Prompt("a dog", about=(n, 2), metadata=metadata) for n in (0, 0, 1, 1)]
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue", "white")]
    GenEvalFolder(str(tmp_path)).update(SampleBatch(asked, range(4), images))
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    each = ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    assert files == [f"{n:05d}/{name}" for n in (0, 1) for name in each]
    assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == metadata
    assert Image.open(tmp_path / "00001" / "samples" / "0000.png").getpixel((0, 0)) == (0, 0, 255)


def test_a_prompt_with_images_in_two_batches_is_refused(tmp_path):
    asked = [Prompt("a dog", about=(0, 4))] * 3
    batch = SampleBatch(asked, range(3), [Image.new("RGB", (8, 8))] * 3)
    with pytest.raises(ValueError, match="a multiple of 4"):
        GenEvalFolder(str(tmp_path)).update(batch)
    assert not list(tmp_path.iterdir())
