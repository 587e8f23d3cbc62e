"""One code path for validation in a run and on its checkpoint, on one process and on two."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from callbacks.evaluate import Evaluate
from support import ranks, runs
from tf_lightning.cli.main import main


def checkpoint_of(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


def numbers(file: Path) -> dict[str, float]:
    return {n["name"]: n["value"] for n in json.loads(file.read_text())["numbers"]}


def only_evaluate(folder: Path, **changed):
    """Changes a run's configuration to measuring alone, with other arguments."""

    def change(config: dict) -> None:
        (found,) = (c for c in config["trainer"]["callbacks"] if "Evaluate" in c["class_path"])
        found["init_args"] |= changed
        text = {"class_path": "callbacks.text_perplexity.TextPerplexity"}
        config["trainer"]["callbacks"] = [text, found]
        config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
        config["verbose"] = False

    return change


def validate_config(run: Path, folder: Path, **changed) -> Path:
    """The configuration of `run` for `validate`, which writes into `folder`/run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config.pop("ckpt_path", None)
    only_evaluate(folder, **changed)(config)
    path = folder / "validate.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def validate(run: Path, folder: Path, *arguments: str, **changed) -> Path:
    """The metrics.json of an evaluation of the run's checkpoint."""
    config = validate_config(run, folder, **changed)
    main(["validate", "-c", str(config), "--ckpt_path", checkpoint_of(run), *arguments])
    return folder / "run" / "validate" / "metrics.json"


def test_validate_on_a_checkpoint_equals_the_validation_that_was_run(run, tmp_path, capsys):
    of_the_run = run / "metrics" / f"step{runs.MAX_STEPS:07d}-val.json"
    before = of_the_run.read_bytes()
    file = validate(run, tmp_path)
    expected, found = numbers(of_the_run), numbers(file)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert {"val/fid[shapes]", "val/clip_score[shapes]", "val/text/perplexity"} <= found.keys()
    assert "val/cider[shapes]" in found and "val/composition[shapes]/overall" in found
    assert of_the_run.read_bytes() == before
    table = capsys.readouterr().out
    assert table.count("val/fid[shapes]") == 1 and "val/text/perplexity" in table


def test_every_number_has_its_whole_protocol(run, tmp_path):
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
    assert numbers(file)["val/fid[shapes]"] != numbers(validate(run, tmp_path))["val/fid[shapes]"]


def test_a_guidance_sweep_is_one_command_and_one_plot(run, tmp_path):
    file = validate(run, tmp_path, "--trainer.callbacks.guidance_scales=[1.0, 2.0, 5]")
    found = numbers(file)
    assert {f"val/fid[shapes]@{scale}" for scale in ("1", "2", "5")} <= found.keys()
    assert found["val/fid[shapes]@2"] == pytest.approx(
        numbers(run / "metrics" / f"step{runs.MAX_STEPS:07d}-val.json")["val/fid[shapes]"]
    )
    assert Image.open(file.with_name("guidance.png")).width > 500


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, tmp_path):
    (tmp_path / "two").mkdir()
    alone = numbers(validate(run, tmp_path))
    config = validate_config(run, tmp_path / "two")
    command = ["validate", "-c", str(config), "--ckpt_path", checkpoint_of(run)]
    ranks.together([*command, "--trainer.devices=2", "--trainer.strategy=ddp"], 2)
    together = numbers(tmp_path / "two" / "run" / "validate" / "metrics.json")
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-9)


def test_a_checkpoint_has_nothing_of_a_metrics_network(run):
    checkpoint = torch.load(checkpoint_of(run), weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"net", "ema"}
    assert not any("Evaluate" in name for name in checkpoint["callbacks"])


def test_nothing_is_sampled_in_the_sanity_check():
    callback = Evaluate(prompts=None)  # whose use would fail
    trainer = SimpleNamespace(sanity_checking=True)
    callback.on_validation_epoch_end(trainer, None)
    callback.on_validation_end(trainer, None)
    assert callback.numbers == []


# What cannot be measured


TOO_FEW = [{"class_path": "callbacks.metrics.ImageQuality", "init_args": {"scores": ["kid"]}}]
NOTHING = {"class_path": "callbacks.prompts.HeldOut", "init_args": {"source": "text"}}
UNMEASURABLE = {
    "kid[shapes] was given 5 generated": {"metrics": TOO_FEW},
    "source 'text' holds no captioned picture out": {"prompts": NOTHING, "metrics": []},
}


@pytest.mark.parametrize("sentence", UNMEASURABLE)
def test_an_evaluation_that_cannot_be_made_is_one_sentence(sentence, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        validate(run, tmp_path, **UNMEASURABLE[sentence])
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 1 and len(told) == 1 and sentence in told[0]
    assert not (tmp_path / "run" / "validate").exists()


@pytest.mark.parametrize("sentence", UNMEASURABLE)
def test_training_goes_on_after_a_measurement_that_failed(sentence, tmp_path):
    config = runs.write_config(tmp_path, only_evaluate(tmp_path, **UNMEASURABLE[sentence]))
    text = config.read_text().replace("verbose: false\n", "")
    config.write_text(text)
    with pytest.warns(UserWarning, match="step 3 is not measured: .*" + re.escape(sentence[:12])):
        main(["fit", "-c", str(config), "--trainer.max_steps", "4"])
    found = numbers(tmp_path / "run" / "metrics" / "step0000003-val.json")
    assert "val/text/perplexity" in found and not any("kid" in name for name in found)


def test_training_that_diverges_is_told_at_each_validation_and_goes_on(tmp_path):
    config = runs.write_config(tmp_path, only_evaluate(tmp_path))
    config.write_text(config.read_text().replace("verbose: false\n", ""))
    huge = ["--model.lr=1e30", "--trainer.gradient_clip_val=null", "--trainer.max_steps=6"]
    with pytest.warns(UserWarning) as told:
        main(["fit", "-c", str(config), *huge])
    sentences = [str(w.message) for w in told if "is not measured" in str(w.message)]
    assert [sentence[:7] for sentence in sentences] == ["step 3 ", "step 6 "]
    assert all("not a number (NaN or infinite)" in s and "\n" not in s for s in sentences)
    found = numbers(tmp_path / "run" / "metrics" / "step0000006-val.json")
    assert {"val/text/perplexity", "val/captions/loss_diffusion"} <= found.keys()
    assert all(value is None for value in found.values())


def test_pictures_of_weights_that_diverged_are_told(run, tmp_path, capsys):
    checkpoint = torch.load(checkpoint_of(run), weights_only=True)
    for name, tensor in checkpoint["state_dict"].items():
        if "patch_decoder" in name or "patches" in name or "decoder" in name:
            tensor.fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    config = validate_config(run, tmp_path)
    with pytest.raises(SystemExit):
        main(["validate", "-c", str(config), "--ckpt_path", str(tmp_path / "nan.ckpt")])
    assert "not a number (NaN or infinite)" in capsys.readouterr().err


def test_a_source_that_holds_nothing_out_is_named_and_the_rest_is_measured(run, tmp_path):
    nothing = "--data.init_args.sources.text.init_args.num_val=0"
    with pytest.warns(UserWarning, match="^no documents to validate on in text; hold some out$"):
        found = numbers(validate(run, tmp_path, nothing))
    assert "val/captions/perplexity" in found and not any("text" in name for name in found)


def test_an_evaluation_of_an_empty_validation_set_is_refused(run, tmp_path, capsys):
    sources = [f"--data.init_args.sources.{s}.init_args.num_val=0" for s in ("text", "captions")]
    with pytest.raises(SystemExit) as stop:
        validate(run, tmp_path, *sources)
    assert stop.value.code == 1
    assert "error: no documents to validate on in captions, text" in capsys.readouterr().err


def test_a_measure_of_what_is_switched_off_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        validate(run, tmp_path, "--trainer.callbacks.caption_images=false")
    assert "CaptionScores measures captioned images" in capsys.readouterr().err
