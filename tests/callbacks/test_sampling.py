"""Each prompt is sampled once, in batches that do not depend on the number of ranks."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from callbacks.prompts import Prompt
from callbacks.sampling import image_protocol, resolve_sampling, sample, shares
from tf_lightning.diffusion.process import process_from_hparams
from tf_lightning.errors import UserError
from tf_lightning.generation.requests import GenerationOutput
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.generation.sizes import ImageSizes

SAMPLING = SamplingConfig(guidance_scale=2.0, max_new_tokens=5)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_the_batches_of_one_process(count, batch_size, world_size):
    alone = shares(count, batch_size, 0, 1)
    together = [shares(count, batch_size, rank, world_size) for rank in range(world_size)]
    assert [index for indices in alone for index in indices] == list(range(count))
    assert sorted((r for rank in together for r in rank), key=lambda r: r.start) == alone
    assert count == 0 or together[0][0].start == 0  # rank zero shows the first batch in TensorBoard


class Fake:
    """A pipeline that records its calls."""

    image_size = 8
    image_sizes = ImageSizes(((8, 8),), 4)

    def __init__(self):
        self.calls, self.autocast = [], []

    def __call__(self, prompts, *, output_modality, sampling, **how):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.calls.append((prompts, output_modality, sampling, how))
        image = Image.new("RGB", (8, 8))
        answer = image if output_modality == "image" else f"up to {sampling.max_new_tokens}"
        return GenerationOutput([[answer] for _ in prompts], how["seed"])


PROMPTS = [Prompt(f"p{i}", lambda: Image.new("RGB", (20, 10))) for i in range(5)]
HOW = {"seed": 7, "precision": nullcontext, "progress": False}


def test_the_seed_of_a_prompt_depends_on_its_index_alone():
    pipe = Fake()
    (batch,) = sample(pipe, PROMPTS, shares(5, 2, 1, 2), SAMPLING, kind="generated", **HOW)
    ((prompts, modality, sampling, how),) = pipe.calls
    assert (prompts, modality, sampling) == (["p2", "p3"], "image", SAMPLING)
    assert how["seed"] == [9, 10] and how["batch_size"] == 2
    assert batch.indices == range(2, 4) and batch.captions is None
    assert batch.pixels.shape == (2, 3, 8, 8) and batch.pixels.dtype == torch.uint8


def test_images_are_captioned_at_the_size_of_the_model():
    pipe = Fake()
    made = list(sample(pipe, PROMPTS, shares(5, 4, 0, 1), SAMPLING, kind="captioned", **HOW))
    assert [image.size for images, *_ in pipe.calls for image in images] == [(8, 8)] * 5
    assert [len(m.captions) for m in made] == [4, 1]
    assert made[0].first(2).captions == ["up to 5"] * 2 and len(made[0].first(2).indices) == 2


def test_the_network_computes_in_the_requested_precision():
    low = partial(torch.autocast, "cpu", torch.bfloat16)
    for kind in ("generated", "captioned"):
        pipe = Fake()
        how = HOW | {"precision": low}
        list(sample(pipe, PROMPTS, [range(2)], SAMPLING, kind=kind, **how))
        assert pipe.autocast == [True] and not torch.is_autocast_enabled("cpu")


def module_of(**hparams) -> SimpleNamespace:
    return SimpleNamespace(process=process_from_hparams(hparams))


def test_the_sampler_is_named_and_a_default_that_does_not_fit_is_not_used():
    ddpm, flow = module_of(prediction_type="epsilon"), module_of(prediction_type="flow")
    assert resolve_sampling(SAMPLING, ddpm).sampler == "DDIMScheduler"
    assert resolve_sampling(SAMPLING, ddpm, "DDPMScheduler").sampler == "DDPMScheduler"
    euler = "FlowMatchEulerDiscreteScheduler"
    assert resolve_sampling(SAMPLING, flow, "DDPMScheduler").sampler == euler
    given = SAMPLING.with_options(sampler="UniPCMultistepScheduler")
    assert resolve_sampling(given, ddpm, "DDPMScheduler") == given
    with pytest.raises(UserError, match="does not fit a model that predicts 'flow'"):
        resolve_sampling(given, flow)


def test_images_of_codes_have_no_sampler_and_report_how_codes_were_sampled():
    codes = module_of(num_codes=16)
    assert resolve_sampling(SAMPLING, codes, "DDPMScheduler") == SAMPLING
    protocol = image_protocol(SAMPLING, codes)
    assert "code_top_k" in protocol and "num_inference_steps" not in protocol
    with pytest.raises(UserError, match="timestep_shift=2.0 is an option of denoising"):
        resolve_sampling(SAMPLING.with_options(timestep_shift=2.0), codes)
    with pytest.raises(UserError, match="sampler=DDIMScheduler is an option of denoising"):
        resolve_sampling(SAMPLING.with_options(sampler="DDIMScheduler"), codes)
