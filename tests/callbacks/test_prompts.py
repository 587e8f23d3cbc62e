"""Prompts are fixed, held out, and judged by their meaning."""

import pytest
from PIL import Image

from callbacks.prompts import HeldOut, ShapesPrompts, square
from tf_lightning.data.documents import Skipped
from tf_lightning.errors import UserError
from tf_lightning.shapes.grammar import captions, parse
from tf_lightning.shapes.world import held_out


def test_prompts_of_the_world_repeat_and_two_objects_have_held_out_meanings():
    asked = ShapesPrompts(40).prompts()
    again, other = ShapesPrompts(40).prompts(), ShapesPrompts(40, seed=1).prompts()
    assert [p.text for p in asked] == [p.text for p in again] != [p.text for p in other]
    for prompt in asked:
        assert parse(prompt.text) == prompt.about and prompt.text in prompt.references
        assert len(prompt.about.objects) == 1 or held_out(prompt.about)
    assert {len(prompt.about.objects) for prompt in asked} == {1, 2}


def test_the_true_picture_is_right_and_another_wrong():
    prompts = ShapesPrompts(20)
    asked = prompts.prompts()
    assert all(prompts.judge(prompt, prompt.picture()) for prompt in asked)
    assert not prompts.judge(asked[0], Image.new("RGB", (64, 64)))
    assert prompts.judge_words(asked[0], captions(asked[0].about)[-1])
    assert not prompts.judge_words(asked[0], "a red")


def test_real_pictures_show_the_prompts_meanings_at_other_places():
    prompts = ShapesPrompts(6, real_per_prompt=3)
    asked, real = prompts.prompts(), [open_it() for open_it in prompts.real_pictures()]
    assert len(real) == 18 == prompts.facts["count"]
    assert all(prompts.judge(asked[i % 6], picture) for i, picture in enumerate(real))
    assert len({picture.tobytes() for picture in real}) == 18
    assert not {p.picture().tobytes() for p in asked} & {picture.tobytes() for picture in real}


class Data:
    """A data module with one source, three of whose held-out documents are captioned pictures."""

    def __init__(self, documents):
        self.sources = {"mine": self}
        self.held_out = documents

    def documents(self, split):
        assert split == "val"
        return iter(self.held_out)


def test_held_out_prompts_are_the_captioned_pictures_of_a_source():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = Data([["a"], ["red", red], Skipped("damaged"), [blue, "blue"], ["c", red, red]])
    prompts = HeldOut("mine", count=1)
    (prompt,) = prompts.prompts(data)
    assert (prompt.text, prompt.references, prompt.picture()) == ("red", ("red",), red)
    assert [p() for p in prompts.real_pictures(data)] == [red, blue]
    assert prompts.judge(prompt, red) is None and prompts.judge_words(prompt, "x") is None


def test_a_source_that_is_absent_or_holds_nothing_out_is_named():
    with pytest.raises(UserError, match="no source 'other'; name one of mine"):
        HeldOut("other").prompts(Data([]))
    with pytest.raises(UserError, match="'mine' holds no captioned picture out"):
        HeldOut("mine").prompts(Data([["only text"]]))


def test_no_prompts_are_refused():
    with pytest.raises(UserError, match="count=0"):
        ShapesPrompts(0)


def test_the_middle_of_a_picture_is_kept_and_nothing_from_beside_it():
    wide = Image.new("RGB", (32, 16), "red")
    wide.paste("blue", (8, 0, 24, 16))
    assert square(wide, 8).getcolors() == [(64, (0, 0, 255))]
    assert square(wide.transpose(Image.Transpose.ROTATE_90), 8).getcolors() == [(64, (0, 0, 255))]
    assert square(wide.crop((8, 0, 24, 16)), 16) == wide.crop((8, 0, 24, 16))
