"""The examination gives full marks to truth, none to error, and says what it saw."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import Precision
from PIL import Image

from callbacks.shapes_report import ShapesReport, questions, text_perplexity
from callbacks.throughput import Throughput
from support.tiny import PATCH_SIZE
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.generation.requests import GenerationOutput
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.shapes.grammar import captions, parse, text_log_prob
from tf_lightning.shapes.oracle import read
from tf_lightning.shapes.sources import ShapesTexts
from tf_lightning.shapes.world import held_out
from tf_lightning.tokenizer.tokenizer import train_tokenizer
from tf_lightning.training.module import Transfusion

COUNT, SEED = 6, 3


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Transfusion:
    """A module that finds every next token equally probable."""
    texts = (text for (text,) in ShapesTexts(200, 1).documents("train"))
    tokenizer = train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 300)
    config = TransformerConfig(vocab_size=300, dim=32, num_layers=1, num_heads=2, ffn_dim=48)
    module = Transfusion(config, patch_size=PATCH_SIZE, latent_channels=3)
    module.configure_model()
    torch.nn.init.zeros_(module.ema.transformer.output.weight)
    module.tokenizer_proto = tokenizer.proto
    module.image_codec = {"autoencoder": "pixels", "latent_shape": [3, 64, 64]}
    return module


class Knowing(TransfusionPipeline):
    """Draws the true picture of each prompt, and writes a true caption of each picture."""

    def __call__(self, prompts, *, output_modality, **options) -> GenerationOutput:
        answer = {"image": self.draw, "text": self.write}[output_modality]
        return GenerationOutput([[answer(prompt)] for prompt in prompts], [])

    def draw(self, prompt: str) -> Image.Image:
        asked = questions(COUNT, 1, SEED) + questions(COUNT, 2, SEED)
        return {question.prompt: question.picture for question in asked}[prompt]

    def write(self, picture: Image.Image) -> str:
        return captions(read(np.asarray(picture)).meaning)[-1]


class Mistaken(Knowing):
    """Always a picture and a caption of something else."""

    def draw(self, prompt: str) -> Image.Image:
        return Image.new("RGB", (64, 64), "white")

    def write(self, picture: Image.Image) -> str:
        return "one red square and more"


def timed() -> Throughput:
    """A clock that stood still after 90 seconds, 10 of them validations."""
    clock = Throughput()
    clock.load_state_dict({"fit_seconds": 90.0, "validation_seconds": 10.0})
    return clock


def examined(module, model_class, folder, monkeypatch) -> dict:
    """The report of an examination at step 5."""
    build = TransfusionPipeline.from_module.__func__
    monkeypatch.setattr(TransfusionPipeline, "from_module", lambda m: build(model_class, m))
    trainer = SimpleNamespace(
        **{"is_global_zero": True, "log_dir": str(folder), "global_step": 5, "ckpt_path": None},
        **{"state": SimpleNamespace(fn="fit"), "callbacks": [timed()]},
        precision="32-true",
        precision_plugin=Precision(),
    )
    report = ShapesReport(COUNT, SamplingConfig(num_inference_steps=2, timestep_shift=2.5), SEED)
    report.setup(trainer, module, "fit")
    report.examine(trainer, module)
    return json.loads((folder / "report.json").read_text())


def verdicts(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples" / "samples.jsonl").open()]


def test_truth_gets_full_marks(module, tmp_path, monkeypatch):
    report = examined(module, Knowing, tmp_path, monkeypatch)
    assert report["one_object"] == report["two_objects"] == report["caption_accuracy"] == 1.0
    assert all(verdict["right"] is True for verdict in verdicts(tmp_path))


def test_error_gets_none(module, tmp_path, monkeypatch):
    report = examined(module, Mistaken, tmp_path, monkeypatch)
    assert report["one_object"] == report["two_objects"] == report["caption_accuracy"] == 0.0
    assert all(verdict["right"] is False for verdict in verdicts(tmp_path))


def test_half_the_objects_right_is_half_a_mark(module, tmp_path, monkeypatch):
    class OneObjectOnly(Knowing):
        def draw(self, prompt: str) -> Image.Image:
            blank = Image.new("RGB", (64, 64), "white")
            return super().draw(prompt) if len(parse(prompt).objects) == 1 else blank

    report = examined(module, OneObjectOnly, tmp_path, monkeypatch)
    assert (report["one_object"], report["two_objects"]) == (1.0, 0.0)


def test_each_sample_is_a_picture_with_its_prompt_reading_and_verdict(
    module, tmp_path, monkeypatch
):
    examined(module, Knowing, tmp_path, monkeypatch)
    lines = verdicts(tmp_path)
    assert [line["file"] for line in lines] == [f"{i:04d}.png" for i in range(2 * COUNT)]
    for line in lines:
        assert line.keys() == {"file", "prompt", "read", "right"}
        picture = np.asarray(Image.open(tmp_path / "samples" / line["file"]))
        reading = read(picture)
        assert reading.meaning == parse(line["prompt"])
        assert line["read"] == str(reading)
    assert Image.open(tmp_path / "sheet.png").width > 500


def test_the_report_says_what_was_measured_and_how(module, tmp_path, monkeypatch):
    report = examined(module, Knowing, tmp_path, monkeypatch)
    num_parameters = sum(parameter.numel() for parameter in module.net.parameters())
    expected = {
        "num_parameters": num_parameters,
        "counts": dict.fromkeys(("one_object", "two_objects", "captions", "texts"), COUNT),
        **{"seed": SEED, "global_step": 5, "weights": "ema", "precision": "32-true"},
        **{"train_seconds": 90.0, "validation_seconds": 10.0},
        **{"guidance_scale": 3.0, "num_inference_steps": 2, "sampler": "DDPMScheduler"},
        "timestep_shift": 2.5,
        **{"image_guidance_scale": None, "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0},
    }
    assert report.items() >= expected.items()
    assert report.keys() - expected.keys() == {
        *("one_object", "two_objects", "caption_accuracy", "perplexity", "perplexity_bound")
    }


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary(module):
    perplexity, bound = text_perplexity(TransfusionPipeline.from_module(module), module, 20, SEED)
    assert perplexity == pytest.approx(300, rel=1e-5)
    assert 1 < bound < 5


def test_the_bound_is_the_perplexity_of_the_grammar_itself_on_the_same_tokens(module, monkeypatch):
    texts = ["imagine a red circle . the circle is red ."] * 2
    drawn = iter(texts)
    monkeypatch.setattr("callbacks.shapes_report.draw_text", lambda rng: next(drawn))
    pipe = TransfusionPipeline.from_module(module)
    _, bound = text_perplexity(pipe, module, 2, SEED)
    counted = sum(
        len(pipe.model.tokenizer.encode(text)) for text in texts
    )  # the first out, <eos> in
    assert bound == pytest.approx(math.exp(-sum(map(text_log_prob, texts)) / counted))


def test_questions_repeat_and_two_objects_are_of_meanings_never_trained_on():
    asked = questions(30, 2, SEED)
    assert asked[:5] == questions(5, 2, SEED) != questions(5, 2, SEED + 1)
    for question in asked:
        assert held_out(question.meaning) and parse(question.prompt) == question.meaning
        assert read(np.asarray(question.picture)).meaning == question.meaning
    assert {len(q.meaning.objects) for q in questions(30, None, SEED)} == {1, 2}
