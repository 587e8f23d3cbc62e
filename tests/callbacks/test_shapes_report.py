"""The report scores right answers 1, wrong answers 0, and records every verdict."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import Precision
from PIL import Image

from callbacks import shapes_report
from callbacks.contact_sheet import contact_sheet
from callbacks.shapes_report import ShapesReport, questions, sheet, text_perplexity
from callbacks.throughput import Throughput
from support.tiny import PATCH_SIZE
from tf_lightning.errors import UserError
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
FROM_MODULE = TransfusionPipeline.from_module.__func__


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Transfusion:
    """A module for which every next token is equally probable."""
    texts = (text for (text,) in ShapesTexts(200, 1).documents("train"))
    tokenizer = train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 300)
    config = TransformerConfig(vocab_size=300, dim=32, num_layers=1, num_heads=2, ffn_dim=48)
    module = Transfusion(config, patch_size=PATCH_SIZE, latent_channels=3)
    module.configure_model()
    torch.nn.init.zeros_(module.ema.transformer.output.weight)
    module.tokenizer_proto = tokenizer.proto
    module.image_codec = {"autoencoder": "pixels", "latent_shape": [3, 64, 64]}
    return module


class Correct(TransfusionPipeline):
    """Answers each prompt with its real image and each image with a right caption."""

    def __call__(self, prompts, *, output_modality, **options) -> GenerationOutput:
        if output_modality == "image":
            assert options["sampling"].num_inference_steps == 2
            assert options["sampling"].timestep_shift == 2.5
        answer = {"image": self.image, "text": self.caption}[output_modality]
        return GenerationOutput([[answer(prompt)] for prompt in prompts], [])

    def image(self, prompt: str) -> Image.Image:
        asked = questions(COUNT, 1, SEED) + questions(COUNT, 2, SEED)
        return {question.prompt: question.image for question in asked}[prompt]

    def caption(self, image: Image.Image) -> str:
        return captions(read(np.asarray(image)).meaning)[-1]


class Wrong(Correct):
    """Answers every prompt with a blank image and every image with a wrong caption."""

    def image(self, prompt: str) -> Image.Image:
        return Image.new("RGB", (64, 64), "white")

    def caption(self, image: Image.Image) -> str:
        return "one red square and more"


def timed() -> Throughput:
    """A stopped clock of a fit of 90 seconds, 10 of them in validations."""
    clock = Throughput()
    clock.load_state_dict({"fit_seconds": 90.0, "validation_seconds": 10.0})
    return clock


def report_of(module, model_class, folder, monkeypatch, verb="fit", **sampling) -> dict:
    """The report of a pipeline class at step 5."""
    monkeypatch.setattr(TransfusionPipeline, "from_module", lambda m: FROM_MODULE(model_class, m))
    trainer = SimpleNamespace(
        **{
            "is_global_zero": True,
            "logger": None,
            "default_root_dir": str(folder),
            "results_folder": folder,  # of an evaluation
            "global_step": 5,
            "ckpt_path": None,
        },
        **{"state": SimpleNamespace(fn=verb), "callbacks": [timed()]},
        precision="32-true",
        precision_plugin=Precision(),
        datamodule=SimpleNamespace(autoencoder_name="pixels"),
        sanity_checking=False,
        fast_dev_run=False,
    )
    monkeypatch.setattr("callbacks.shapes_report.check_module", lambda *_: None)
    sampling = SamplingConfig(num_inference_steps=2, timestep_shift=2.5, **sampling)
    report = ShapesReport(COUNT, sampling, SEED)
    report.setup(trainer, module, "fit")
    report.examine(trainer, module)
    return json.loads((folder / "report.json").read_text())


def verdicts(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples" / "samples.jsonl").open()]


def test_right_answers_score_one(module, tmp_path, monkeypatch):
    report = report_of(module, Correct, tmp_path, monkeypatch)
    assert report["one_object"] == report["two_objects"] == report["caption_accuracy"] == 1.0
    assert all(verdict["right"] is True for verdict in verdicts(tmp_path))


def test_wrong_answers_score_zero(module, tmp_path, monkeypatch):
    report = report_of(module, Wrong, tmp_path, monkeypatch)
    assert report["one_object"] == report["two_objects"] == report["caption_accuracy"] == 0.0
    assert all(verdict["right"] is False for verdict in verdicts(tmp_path))


def test_a_failure_is_a_warning_in_fit_and_an_error_otherwise(module, tmp_path, monkeypatch):
    class NoMemory(Correct):
        def __init__(self, *_):
            raise UserError("the copy does not fit")

    sentence = "ShapesReport at step 5 failed: the copy does not fit"
    with pytest.warns(UserWarning, match=sentence), pytest.raises(FileNotFoundError):
        report_of(module, NoMemory, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="^the copy does not fit"):
        report_of(module, NoMemory, tmp_path, monkeypatch, verb="validate")
    assert not [*tmp_path.iterdir()]


def test_a_size_that_the_oracle_does_not_read_is_refused(module, tmp_path, monkeypatch):
    message = "sampling.width=96 does not fit ShapesReport, whose oracle reads images of 64 x 64"
    with pytest.raises(UserError, match=message):
        report_of(module, Correct, tmp_path, monkeypatch, width=96)


def test_one_and_two_objects_are_scored_separately(module, tmp_path, monkeypatch):
    class OneObjectOnly(Correct):
        def image(self, prompt: str) -> Image.Image:
            blank = Image.new("RGB", (64, 64), "white")
            return super().image(prompt) if len(parse(prompt).objects) == 1 else blank

    report = report_of(module, OneObjectOnly, tmp_path, monkeypatch)
    assert (report["one_object"], report["two_objects"]) == (1.0, 0.0)


def test_each_sample_is_an_image_with_its_prompt_reading_and_verdict(module, tmp_path, monkeypatch):
    report_of(module, Correct, tmp_path, monkeypatch)
    lines = verdicts(tmp_path)
    assert [line["file"] for line in lines] == [f"{i:04d}.png" for i in range(2 * COUNT)]
    for line in lines:
        assert line.keys() == {"file", "prompt", "read", "right"}
        image = np.asarray(Image.open(tmp_path / "samples" / line["file"]))
        reading = read(image)
        assert reading.meaning == parse(line["prompt"])
        assert line["read"] == str(reading)
    assert Image.open(tmp_path / "sheet.png").width > 500


def test_the_report_has_the_scores_and_their_protocol(module, tmp_path, monkeypatch):
    report = report_of(module, Correct, tmp_path, monkeypatch)
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
        *("nfe", "one_object", "two_objects", "caption_accuracy", "perplexity", "perplexity_bound")
    }


def test_the_perplexity_of_a_uniform_prediction_is_the_size_of_the_vocabulary(module):
    perplexity, bound = text_perplexity(TransfusionPipeline.from_module(module), module, 20, SEED)
    assert perplexity == pytest.approx(300, rel=1e-5)
    assert 1 < bound < 5


def test_the_bound_is_the_perplexity_of_the_grammar_on_the_same_tokens(module, monkeypatch):
    texts = ["imagine a red circle . the circle is red ."] * 2
    given = iter(texts)
    monkeypatch.setattr("callbacks.shapes_report.draw_text", lambda rng: next(given))
    pipe = TransfusionPipeline.from_module(module)
    _, bound = text_perplexity(pipe, module, 2, SEED)
    counted = sum(
        len(pipe.model.tokenizer.encode(text)) for text in texts
    )  # without the first token, with <eos>
    assert bound == pytest.approx(math.exp(-sum(map(text_log_prob, texts)) / counted))


def test_questions_repeat_and_those_with_two_objects_have_held_out_meanings():
    asked = questions(30, 2, SEED)
    assert asked[:5] == questions(5, 2, SEED) != questions(5, 2, SEED + 1)
    for question in asked:
        assert held_out(question.meaning) and parse(question.prompt) == question.meaning
        assert read(np.asarray(question.image)).meaning == question.meaning
    assert {len(q.meaning.objects) for q in questions(30, None, SEED)} == {1, 2}


def test_the_sheet_has_a_section_for_each_score(monkeypatch):
    sections = []
    monkeypatch.setattr(
        shapes_report, "contact_sheet", lambda found: sections.extend(found) or contact_sheet(found)
    )
    asked, shown = questions(8, 1, SEED) + questions(8, 2, SEED), questions(8, None, SEED)
    right = [True, False] * 4 + [True] * 6 + [False] * 2
    captions = [question.prompt for question in shown]
    page = sheet(asked, [q.image for q in asked], right, shown, captions, [True] * 8)
    assert page.width > 1000
    titles = [title for title, _ in sections]
    scores = ["50.0% of 8 images right", "75.0% of 8 images right", "100.0% of 8 right"]
    assert all(title.endswith(score) for title, score in zip(titles, scores, strict=True))
    assert [len(tiles) for _, tiles in sections] == [5, 8, 5]
    assert [tile.caption for tile in sections[0][1]] == [question.prompt for question in asked[:5]]
    assert [tile.right for tile in sections[1][1]] == right[8:]
