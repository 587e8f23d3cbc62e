"""Sampling options reach the formulas that they belong to, at values that are not the defaults."""

from dataclasses import fields

import pytest
import torch

from support.generation import PROMPTS, generate_documents, open_ended_net, plan
from support.tiny import SIZES, TOKENIZER
from tf_lightning.diffusion.guidance import Guidance
from tf_lightning.generation import engine
from tf_lightning.generation.requests import GenerationModel, GenerationPlan
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel

TEXT = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}
CODES = {"code_temperature": 0.6, "code_top_k": 4, "code_top_p": 0.75}


@pytest.fixture
def sampled(monkeypatch) -> list[dict]:
    """The options of each call of `sample_tokens` from now on."""
    calls, sample = [], engine.sample_tokens

    def record(logits, generators, **options):
        calls.append(options)
        return sample(logits, generators, **options)

    monkeypatch.setattr(engine, "sample_tokens", record)
    return calls


def test_options_of_text_reach_the_sampling_of_tokens(sampled):
    generate_documents(open_ended_net(), PROMPTS[:1], plan("text", **TEXT))
    assert sampled and all(options == TEXT for options in sampled)


def test_options_of_codes_reach_the_sampling_of_codes(sampled):
    torch.manual_seed(0)
    net = TransfusionModel(TransformerConfig(20, **SIZES), 1, 1, num_codes=11)
    model = GenerationModel(net.requires_grad_(False), TOKENIZER, 1, (1, 2, 2))
    how = GenerationPlan("image", SamplingConfig(**CODES), num_image_steps=4)
    list(engine.generate(model, PROMPTS[:1], [0], how))
    assert len(sampled) == 4
    expected = {name.removeprefix("code_"): value for name, value in CODES.items()}
    assert all(options == expected for options in sampled)


def test_options_of_guidance_reach_the_guidance():
    sampling = SamplingConfig(
        guidance_scale=2.0,
        image_guidance_scale=1.5,
        guidance_interval=(0.2, 0.8),
        guidance_rescale=0.7,
    )
    expected = Guidance(2.0, image_scale=1.5, interval=(0.2, 0.8), rescale=0.7)
    assert GenerationPlan("image", sampling).guidance == expected


def test_the_tests_above_use_no_default():
    defaults = {f.name: f.default for f in fields(SamplingConfig)}
    assert all(defaults[name] != value for name, value in (TEXT | CODES).items())
