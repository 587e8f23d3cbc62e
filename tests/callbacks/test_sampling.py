"""Each prompt once, in batches that do not depend on the number of processes."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from callbacks.prompts import Prompt
from callbacks.sampling import model_of, sample, shares
from tf_lightning.generation.pipeline import TransfusionPipeline

DRAWN = {"guidance_scale": 2.0, "num_inference_steps": 4, "sampler": "S", "timestep_shift": 1.5}
HOW = DRAWN | {"seed": 7}


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_the_batches_of_one_process(count, batch_size, world_size):
    alone = shares(count, batch_size, 0, 1)
    together = [shares(count, batch_size, rank, world_size) for rank in range(world_size)]
    assert [place for places in alone for place in places] == list(range(count))
    assert sorted((r for rank in together for r in rank), key=lambda r: r.start) == alone
    assert count == 0 or together[0][0].start == 0  # what TensorBoard shows is rank zero's


class Fake:
    """Notes what it is asked."""

    image_size = 8

    def __init__(self):
        self.drawn, self.read, self.autocast = [], [], []

    def draw(self, prompts, *, seeds, **how):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.drawn.append((prompts, seeds, how))
        return [Image.new("RGB", (8, 8))] * len(prompts)

    def write(self, prompts, *, max_new_tokens):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.read += [picture.size for (picture,) in prompts]
        return [f"up to {max_new_tokens}"] * len(prompts)


PROMPTS = [Prompt(f"p{i}", lambda: Image.new("RGB", (20, 10))) for i in range(5)]


def test_a_prompts_noise_depends_on_its_place_alone():
    model = Fake()
    batches = shares(5, 2, 1, 2)
    (made,) = sample(
        model, PROMPTS, batches, HOW, kind="generated", precision=nullcontext, progress=False
    )
    ((prompts, seeds, how),) = model.drawn
    assert (prompts, seeds) == ([["p2"], ["p3"]], [9, 10])
    assert how == DRAWN
    assert made.indices == range(2, 4) and made.captions is None
    assert made.pixels.shape == (2, 3, 8, 8) and made.pixels.dtype == torch.uint8


def test_pictures_are_captioned_at_the_models_size():
    model = Fake()
    how = {"max_new_tokens": 5}
    made = list(
        sample(
            model,
            PROMPTS,
            shares(5, 4, 0, 1),
            how,
            kind="captioned",
            precision=nullcontext,
            progress=False,
        )
    )
    assert model.read == [(8, 8)] * 5
    assert [len(m.captions) for m in made] == [4, 1]
    assert made[0].first(2).captions == ["up to 5"] * 2 and len(made[0].first(2).indices) == 2


@pytest.mark.parametrize("asked", ["ema", "raw"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_weights_are_those_asked_for_and_said(asked, kept, monkeypatch):
    module = SimpleNamespace(net="raw net", ema="averaged net" if kept else None)
    net = module.ema or module.net
    monkeypatch.setattr(
        TransfusionPipeline, "of", lambda module: TransfusionPipeline(net, None, None, None, {})
    )
    model, said = model_of(module, asked)
    averaged = asked == "ema" and kept
    assert (model.net, said) == (("averaged net", "ema") if averaged else ("raw net", "raw"))


def test_the_network_computes_in_the_precision_asked_for():
    low = partial(torch.autocast, "cpu", torch.bfloat16)
    for kind in ("generated", "captioned"):
        model = Fake()
        list(
            sample(
                model,
                PROMPTS,
                [range(2)],
                HOW | {"max_new_tokens": 1},
                kind=kind,
                precision=low,
                progress=False,
            )
        )
        assert model.autocast == [True] and not torch.is_autocast_enabled("cpu")
