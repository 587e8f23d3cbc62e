"""TensorBoard gets pictures over their prompts, and captions under pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from callbacks.contact_sheet import WRONG
from callbacks.prompts import ShapesPrompts
from callbacks.sampling import SampleBatch
from callbacks.show import show


class Writer:
    """Keeps what TensorBoard is given."""

    def __init__(self):
        self.images, self.texts = {}, {}

    def add_image(self, tag, image, step):
        self.images[tag, step] = image

    def add_text(self, tag, text, step):
        self.texts[tag, step] = text


@pytest.fixture
def shown():
    """Shows samples at step 9; what TensorBoard got."""
    writer = Writer()
    trainer = SimpleNamespace(logger=SimpleNamespace(experiment=writer), global_step=9)

    def command(sampled) -> Writer:
        show(trainer, ShapesPrompts(2), sampled, "val")
        return writer

    return command


def red_ink(image) -> int:
    """Count the pixels of the colour of wrong captions and marks."""
    return int((image.numpy() == np.array(WRONG)[:, None, None]).all(0).sum())


def test_prompts_stand_under_drawn_pictures_and_are_red_when_wrong(shown):
    asked = ShapesPrompts(2).prompts()
    right = [prompt.picture() for prompt in asked]
    image = shown(SampleBatch(asked, range(2), right)).images["generated/val", 9]
    assert image.shape[0] == 3 and red_ink(image) == 0
    wrong = [Image.new("RGB", (64, 64))] * 2
    writer = shown(SampleBatch(asked, range(2), wrong))
    assert red_ink(writer.images["generated/val", 9]) > 50 and not writer.texts


def test_captions_stand_under_pictures_and_beside_the_true_ones(shown):
    asked = ShapesPrompts(2).prompts()
    pictures = [prompt.picture() for prompt in asked]
    written = [asked[0].references[-1], "wrong words"]
    writer = shown(SampleBatch(asked, range(2), pictures, written))
    assert red_ink(writer.images["captioned/val", 9]) > 20
    rows = writer.texts["captions/val", 9].splitlines()
    assert rows[2].endswith(f"| {written[0]} |") and asked[0].references[0] in rows[2]
    assert rows[3].endswith("| wrong words |") and len(rows) == 4
