"""Validation gives equal values in a run and on its checkpoint, and on one process and on two."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from callbacks import evaluate
from callbacks.contact_sheet import WRONG
from callbacks.evaluate import Evaluate, log_samples
from callbacks.prompts import ShapesPrompts
from callbacks.sampling import SampleBatch
from support import ranks, runs
from tf_lightning.cli.main import main
from tf_lightning.generation.sampling import SamplingConfig


def checkpoint_of(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


def values(file: Path) -> dict[str, float]:
    return {n["name"]: n["value"] for n in json.loads(file.read_text())["numbers"]}


def only_evaluate(folder: Path, **changed):
    """Return an edit of a run's configuration: only evaluation callbacks, with other arguments."""

    def change(config: dict) -> None:
        (found,) = (c for c in config["trainer"]["callbacks"] if "Evaluate" in c["class_path"])
        found["init_args"] |= changed
        text = {"class_path": "callbacks.text_perplexity.TextPerplexity"}
        config["trainer"]["callbacks"] = [text, found]
        config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
        config["verbose"] = False

    return change


def validate_config(run: Path, folder: Path, **changed) -> Path:
    """Write the configuration of `run` for `validate`, which writes into `folder`/run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config.pop("ckpt_path", None)
    only_evaluate(folder, **changed)(config)
    path = folder / "validate.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def validate(run: Path, folder: Path, *arguments: str, **changed) -> Path:
    """Evaluate the run's checkpoint and return its metrics.json."""
    config = validate_config(run, folder, **changed)
    main(["validate", "-c", str(config), "--ckpt_path", checkpoint_of(run), *arguments])
    return folder / "run" / "validate" / "metrics.json"


def test_validate_on_a_checkpoint_equals_the_validation_of_its_run(run, tmp_path, capsys):
    of_the_run = run / "metrics" / f"step{runs.MAX_STEPS:07d}-val.json"
    before = of_the_run.read_bytes()
    file = validate(run, tmp_path)
    expected, found = values(of_the_run), values(file)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert {"val/fid[shapes]", "val/clip_score[shapes]", "val/text/perplexity"} <= found.keys()
    assert "val/cider[shapes]" in found and "val/composition[shapes]/overall" in found
    assert of_the_run.read_bytes() == before
    table = capsys.readouterr().out
    assert table.count("val/fid[shapes]") == 1 and "val/text/perplexity" in table


def test_every_value_has_its_protocol(run, tmp_path):
    content = json.loads(validate(run, tmp_path).read_text())
    assert content["checkpoint_hash"] and content["global_step"] == runs.MAX_STEPS
    protocols = {n["name"]: n["protocol"] for n in content["numbers"]}
    fid = protocols["val/fid[shapes]"]
    expected = {
        **{"num_prompts": 5, "num_generated": 5, "num_real": 20, "seed": 0, "weights": "ema"},
        **{"sampler": "DDIMScheduler", "num_inference_steps": 2, "guidance_scale": 2.0},
        **{"timestep_shift": 1.0},
        **{"resize": "none (64 x 64)", "extractor": "shapes-clip, length sqrt(F)"},
    }
    assert fid.items() >= expected.items()
    assert len(fid["prompts_hash"]) == len(fid["weights_hash"]) == 12
    cider = protocols["val/cider[shapes]"]
    assert (
        cider["temperature"] == 0.0
        and cider["max_new_tokens"] == 8
        and "guidance_scale" not in cider
    )
    for name in ("perplexity", "bits_per_byte"):
        text = protocols[f"val/text/{name}"]
        assert text["weights"] == "ema" and text["num_bytes"] > text["num_tokens"] > 0
        assert text["definition"].startswith(("exp(sum nll", "sum nll / ln 2"))


@pytest.fixture
def sampled(monkeypatch) -> dict[str, SamplingConfig]:
    """The sampling options of each kind of samples that Evaluate asks for from now on."""
    options, ask = {}, evaluate.sample

    def record(pipe, prompts, batches, sampling, *, kind, **how):
        options[kind] = sampling
        return ask(pipe, prompts, batches, sampling, kind=kind, **how)

    monkeypatch.setattr(evaluate, "sample", record)
    return options


def test_images_and_captions_are_sampled_with_the_options_of_the_callback(run, tmp_path, sampled):
    changed = {"sampling.num_inference_steps": 3, "sampling.max_new_tokens": 5}
    validate(run, tmp_path, *(f"--trainer.callbacks.{k}={v}" for k, v in changed.items()))
    expected = SamplingConfig(
        guidance_scale=2.0, num_inference_steps=3, max_new_tokens=5, sampler="DDIMScheduler"
    )
    assert sampled == {"generated": expected, "captioned": expected}


def test_the_command_line_changes_counts_steps_sampler_and_weights(run, tmp_path):
    changed = {
        "prompts.init_args.count": 3,
        "sampling.num_inference_steps": 3,
        "sampling.sampler": "DDPMScheduler",
        "sampling.timestep_shift": 2.0,
        "weights": "raw",
        "seed": 4,
    }
    arguments = [f"--trainer.callbacks.{key}={value}" for key, value in changed.items()]
    file = validate(run, tmp_path, *arguments)
    protocol = json.loads(file.read_text())["numbers"][2]["protocol"]
    assert protocol["num_prompts"] == 3 and protocol["seed"] == 4
    assert (protocol["num_inference_steps"], protocol["sampler"]) == (3, "DDPMScheduler")
    assert (protocol["timestep_shift"], protocol["weights"]) == (2.0, "raw")
    assert values(file)["val/fid[shapes]"] != values(validate(run, tmp_path))["val/fid[shapes]"]


def test_a_guidance_sweep_is_one_command_and_one_plot(run, tmp_path):
    file = validate(run, tmp_path, "--trainer.callbacks.guidance_scales=[1.0, 2.0, 5]")
    found = values(file)
    assert {f"val/fid[shapes]@{scale}" for scale in ("1", "2", "5")} <= found.keys()
    assert found["val/fid[shapes]@2"] == pytest.approx(
        values(run / "metrics" / f"step{runs.MAX_STEPS:07d}-val.json")["val/fid[shapes]"]
    )
    assert Image.open(file.with_name("guidance.png")).width > 500


@pytest.mark.slow
def test_two_processes_compute_the_values_of_one(run, tmp_path):
    (tmp_path / "two").mkdir()
    alone = values(validate(run, tmp_path))
    config = validate_config(run, tmp_path / "two")
    command = ["validate", "-c", str(config), "--ckpt_path", checkpoint_of(run)]
    ranks.run_ranks([*command, "--trainer.devices=2", "--trainer.strategy=ddp"], 2)
    together = values(tmp_path / "two" / "run" / "validate" / "metrics.json")
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-9)


def test_a_checkpoint_has_no_weights_of_a_metric(run):
    checkpoint = torch.load(checkpoint_of(run), weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"net", "ema"}
    assert not any("Evaluate" in name for name in checkpoint["callbacks"])


def test_nothing_is_sampled_in_the_sanity_check():
    callback = Evaluate(prompts=None)  # using it would fail
    trainer = SimpleNamespace(sanity_checking=True)
    callback.on_validation_epoch_end(trainer, None)
    callback.on_validation_end(trainer, None)
    assert callback.records == []


# Evaluations that fail


TOO_FEW = [{"class_path": "callbacks.metrics.ImageQuality", "init_args": {"scores": ["kid"]}}]
NOTHING = {"class_path": "callbacks.prompts.HeldOut", "init_args": {"source": "text"}}
UNMEASURABLE = {
    "kid[shapes] was given 5 generated": {"metrics": TOO_FEW},
    "source 'text' has no captioned image in its": {"prompts": NOTHING, "metrics": []},
}


@pytest.mark.parametrize("sentence", UNMEASURABLE)
def test_an_evaluation_that_fails_is_reported_in_one_sentence(sentence, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        validate(run, tmp_path, **UNMEASURABLE[sentence])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 1 and len(errors) == 1 and sentence in errors[0]
    assert not (tmp_path / "run" / "validate").exists()


@pytest.mark.parametrize("sentence", UNMEASURABLE)
def test_training_continues_after_an_evaluation_that_failed(sentence, tmp_path):
    config = runs.write_config(tmp_path, only_evaluate(tmp_path, **UNMEASURABLE[sentence]))
    text = config.read_text().replace("verbose: false\n", "")
    config.write_text(text)
    with pytest.warns(
        UserWarning, match="the evaluation at step 3 failed: .*" + re.escape(sentence[:12])
    ):
        main(["fit", "-c", str(config), "--trainer.max_steps", "4"])
    found = values(tmp_path / "run" / "metrics" / "step0000003-val.json")
    assert "val/text/perplexity" in found and not any("kid" in name for name in found)


def test_training_that_diverges_is_reported_at_each_validation_and_continues(tmp_path):
    config = runs.write_config(tmp_path, only_evaluate(tmp_path))
    config.write_text(config.read_text().replace("verbose: false\n", ""))
    huge = ["--model.lr=1e30", "--trainer.gradient_clip_val=null", "--trainer.max_steps=6"]
    with pytest.warns(UserWarning) as warnings:
        main(["fit", "-c", str(config), *huge])
    sentences = [str(w.message) for w in warnings if "the evaluation at" in str(w.message)]
    assert [sentence[18:25] for sentence in sentences] == ["step 3 ", "step 6 "]
    assert all("not a number (NaN or infinite)" in s and "\n" not in s for s in sentences)
    found = values(tmp_path / "run" / "metrics" / "step0000006-val.json")
    assert {"val/text/perplexity", "val/captions/loss_diffusion"} <= found.keys()
    assert all(value is None for value in found.values())


def test_images_of_weights_that_diverged_are_reported(run, tmp_path, capsys):
    checkpoint = torch.load(checkpoint_of(run), weights_only=True)
    for name, tensor in checkpoint["state_dict"].items():
        if "patch_decoder" in name or "patches" in name or "decoder" in name:
            tensor.fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    config = validate_config(run, tmp_path)
    with pytest.raises(SystemExit):
        main(["validate", "-c", str(config), "--ckpt_path", str(tmp_path / "nan.ckpt")])
    assert "not a number (NaN or infinite)" in capsys.readouterr().err


def test_a_source_without_validation_documents_is_named_and_the_rest_is_evaluated(run, tmp_path):
    nothing = "--data.init_args.sources.text.init_args.num_val=0"
    with pytest.warns(UserWarning, match="^no documents to validate on in text; hold some out$"):
        found = values(validate(run, tmp_path, nothing))
    assert "val/captions/perplexity" in found and not any("text" in name for name in found)


def test_an_evaluation_of_an_empty_validation_set_is_refused(run, tmp_path, capsys):
    sources = [f"--data.init_args.sources.{s}.init_args.num_val=0" for s in ("text", "captions")]
    with pytest.raises(SystemExit) as stop:
        validate(run, tmp_path, *sources)
    assert stop.value.code == 1
    assert "error: no documents to validate on in captions, text" in capsys.readouterr().err


def test_a_metric_of_samples_that_are_disabled_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        validate(run, tmp_path, "--trainer.callbacks.caption_images=false")
    assert "CaptionScores scores captioned images" in capsys.readouterr().err


# TensorBoard


class Writer:
    """A TensorBoard writer that keeps images and texts."""

    def __init__(self):
        self.images, self.texts = {}, {}

    def add_image(self, tag, image, step):
        self.images[tag, step] = image

    def add_text(self, tag, text, step):
        self.texts[tag, step] = text


def logged(batch: SampleBatch) -> Writer:
    """The writer after samples were logged at step 9."""
    writer = Writer()
    trainer = SimpleNamespace(logger=SimpleNamespace(experiment=writer), global_step=9)
    log_samples(trainer, ShapesPrompts(2), batch, "val")
    return writer


def red_ink(image) -> int:
    """Count the pixels of the color of wrong captions and marks."""
    return int((image.numpy() == np.array(WRONG)[:, None, None]).all(0).sum())


def test_generated_images_are_shown_above_their_prompts_which_are_red_if_wrong():
    asked = ShapesPrompts(2).prompts()
    right = [prompt.image() for prompt in asked]
    image = logged(SampleBatch(asked, range(2), right)).images["generated/val", 9]
    assert image.shape[0] == 3 and red_ink(image) == 0
    wrong = [Image.new("RGB", (64, 64))] * 2
    writer = logged(SampleBatch(asked, range(2), wrong))
    assert red_ink(writer.images["generated/val", 9]) > 50 and not writer.texts


def test_captions_are_shown_below_their_images_and_beside_the_references():
    asked = ShapesPrompts(2).prompts()
    images = [prompt.image() for prompt in asked]
    captions = [asked[0].references[-1], "wrong words"]
    writer = logged(SampleBatch(asked, range(2), images, captions))
    assert red_ink(writer.images["captioned/val", 9]) > 20
    rows = writer.texts["captions/val", 9].splitlines()
    assert rows[2].endswith(f"| {captions[0]} |") and asked[0].references[0] in rows[2]
    assert rows[3].endswith("| wrong words |") and len(rows) == 4
