"""Pictures and captions shown at validation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.samples import Samples, is_pair
from tf_lightning.model import Model, to_picture

TEXT, IMAGE = torch.tensor([5]), torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([TEXT, IMAGE], True),
        ([IMAGE, TEXT], True),
        ([TEXT], False),
        ([IMAGE], False),
        ([], False),
        ([IMAGE, TEXT, IMAGE], False),
        ([TEXT, TEXT], False),
    ],
)
def test_a_pair_is_one_text_and_one_image(parts, expected):
    assert is_pair(parts) == expected


class Corpus(list):
    """Documents in memory."""

    def document(self, index):
        return self[index]


class Fake:
    """Draws black, decodes to what is given, and writes one caption for all."""

    tokenizer = SimpleNamespace(decode=lambda ids: f"caption {ids[0]}")

    def draw(self, prompts, *, seeds, **how):
        self.asked = [ids.item() for (ids,) in prompts], list(seeds), how
        return [Image.new("RGB", (4, 4)) for _ in prompts]

    def decode(self, latents):
        return [to_picture(latent) for latent in latents]

    def write(self, prompts):
        assert all(part.ndim == 3 for (part,) in prompts)
        return [f"written {i}" for i in range(len(prompts))]


class Writer:
    """Keeps what TensorBoard is given."""

    def __init__(self):
        self.images, self.texts = {}, {}

    def add_image(self, tag, image, step):
        self.images[tag, step] = image

    def add_text(self, tag, text, step):
        self.texts[tag, step] = text


@pytest.fixture
def shown(monkeypatch):
    """What `Samples` shows of a corpus of texts and pairs, and what it asks the model."""
    model, writer = Fake(), Writer()
    monkeypatch.setattr(Model, "of", lambda module: model)
    white = torch.ones(3, 4, 4)
    pairs = [[TEXT], [torch.tensor([1]), white], [white, torch.tensor([2])], [TEXT + 3, white]]
    trainer = SimpleNamespace(
        **{"sanity_checking": False, "is_global_zero": True, "global_step": 9},
        logger=SimpleNamespace(experiment=writer),
        datamodule=SimpleNamespace(
            corpora={"val": {"captions": Corpus(pairs), "text": Corpus([[TEXT]])}}
        ),
    )

    def show(**changed) -> tuple[Writer, Fake]:
        for name, value in changed.items():
            setattr(trainer, name, value)
        samples = Samples(num_samples=2, guidance_scale=2.0, num_inference_steps=4, seed=7)
        samples.on_validation_epoch_end(trainer, None)
        return writer, model

    return show


def test_captions_are_drawn_above_the_true_pictures(shown):
    writer, model = shown()
    assert model.asked[:2] == ([1, 2], [7, 8])
    assert model.asked[2] == {
        **{"guidance_scale": 2.0, "num_inference_steps": 4, "sampler": "DDIMScheduler"}
    }
    assert list(writer.images) == [("pictures/captions", 9)]
    image = np.asarray(writer.images["pictures/captions", 9])
    above, below = image[:, 2:6, 2:6], image[:, 8:12, 8:12]  # tiles of 4 with 2 between
    assert (above == 0).all() and (below == 255).all()


def test_pictures_are_captioned_beside_their_own_captions(shown):
    writer, _ = shown()
    (table,) = writer.texts.values()
    assert table.splitlines()[2:] == [
        "| 0 | caption 1 | written 0 |",
        "| 1 | caption 2 | written 1 |",
    ]


@pytest.mark.parametrize(
    "changed", [{"sanity_checking": True}, {"is_global_zero": False}, {"logger": None}]
)
def test_nothing_is_drawn_where_nothing_would_be_shown(shown, changed):
    writer, _ = shown(**changed)
    assert not writer.images and not writer.texts
