"""Prompts are fixed and held out, and samples are judged by their meaning."""

import pytest
from PIL import Image

from callbacks.prompts import HeldOut, ShapesPrompts, center_crop_resize
from tf_lightning.data.documents import Skipped
from tf_lightning.errors import UserError
from tf_lightning.shapes.grammar import captions, parse
from tf_lightning.shapes.world import held_out


def test_prompts_repeat_and_those_with_two_objects_have_held_out_meanings():
    asked = ShapesPrompts(40).prompts()
    again, other = ShapesPrompts(40).prompts(), ShapesPrompts(40, seed=1).prompts()
    assert [p.text for p in asked] == [p.text for p in again] != [p.text for p in other]
    for prompt in asked:
        assert parse(prompt.text) == prompt.about and prompt.text in prompt.references
        assert len(prompt.about.objects) == 1 or held_out(prompt.about)
    assert {len(prompt.about.objects) for prompt in asked} == {1, 2}


def test_the_real_image_is_right_and_another_one_is_wrong():
    prompts = ShapesPrompts(20)
    asked = prompts.prompts()
    assert all(prompts.judge(prompt, prompt.image()) for prompt in asked)
    assert not prompts.judge(asked[0], Image.new("RGB", (64, 64)))
    assert prompts.judge_caption(asked[0], captions(asked[0].about)[-1])
    assert not prompts.judge_caption(asked[0], "a red")


def test_real_images_show_the_prompts_meanings_at_other_positions():
    prompts = ShapesPrompts(6, real_per_prompt=3)
    asked, real = prompts.prompts(), [open_image() for open_image in prompts.real_images()]
    assert len(real) == 18 == prompts.facts["count"]
    assert all(prompts.judge(asked[i % 6], image) for i, image in enumerate(real))
    assert len({image.tobytes() for image in real}) == 18
    assert not {p.image().tobytes() for p in asked} & {image.tobytes() for image in real}


class Data:
    """A data module with one source that has the given validation documents."""

    def __init__(self, documents):
        self.sources = {"mine": self}
        self.held_out = documents

    def documents(self, split):
        assert split == "val"
        return iter(self.held_out)


def test_held_out_prompts_are_the_captioned_images_of_a_source():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = Data([["a"], ["red", red], Skipped("damaged"), [blue, "blue"], ["c", red, red]])
    prompts = HeldOut("mine", count=1)
    (prompt,) = prompts.prompts(data)
    assert (prompt.text, prompt.references, prompt.image()) == ("red", ("red",), red)
    assert [p() for p in prompts.real_images(data)] == [red, blue]
    assert prompts.judge(prompt, red) is None and prompts.judge_caption(prompt, "x") is None


def test_a_missing_source_and_one_without_validation_images_are_refused():
    with pytest.raises(UserError, match="no source 'other'; name one of mine"):
        HeldOut("other").prompts(Data([]))
    with pytest.raises(UserError, match="'mine' has no captioned image in its validation split"):
        HeldOut("mine").prompts(Data([["only text"]]))


def test_a_count_of_zero_is_refused():
    with pytest.raises(UserError, match="count=0"):
        ShapesPrompts(0)


def test_a_square_crop_has_only_pixels_of_the_center():
    wide = Image.new("RGB", (32, 16), "red")
    wide.paste("blue", (8, 0, 24, 16))
    assert center_crop_resize(wide, 8).getcolors() == [(64, (0, 0, 255))]
    assert center_crop_resize(wide.transpose(Image.Transpose.ROTATE_90), 8).getcolors() == [
        (64, (0, 0, 255))
    ]
    assert center_crop_resize(wide.crop((8, 0, 24, 16)), 16) == wide.crop((8, 0, 24, 16))
