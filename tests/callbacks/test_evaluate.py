"""Validation gives equal values in a run and on its checkpoint, and on one process and on two."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import evaluate
from callbacks.contact_sheet import WRONG
from callbacks.evaluate import Evaluate, log_samples
from callbacks.geneval import GenEvalFolder
from callbacks.metrics import CaptionScores
from callbacks.prompts import ShapesPrompts
from callbacks.published_prompts import GenEvalPrompts
from callbacks.sampling import SampleBatch
from support import ranks, runs
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
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
    folder.mkdir(exist_ok=True)
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


def test_an_evaluation_is_logged_at_the_step_of_its_weights(run, tmp_path):
    validate(run, tmp_path)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.step for e in events.Scalars("val/fid[shapes]")] == [runs.MAX_STEPS - 1]
    assert [e.step for e in events.Images("generated/val")] == [runs.MAX_STEPS - 1]
    in_fit = EventAccumulator(str(run)).Reload()
    assert [e.step + 1 for e in in_fit.Scalars("val/fid[shapes]")][-1] == runs.MAX_STEPS


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
    assert (
        values(file)["val/fid[shapes]"]
        != values(validate(run, tmp_path / "unchanged"))["val/fid[shapes]"]
    )


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


def test_guidance_scales_without_images_are_refused():
    with pytest.raises(UserError, match="guidance_scales=.2.0. has no effect with generate_images"):
        Evaluate(prompts=None, guidance_scales=[2.0], generate_images=False)


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


def image_quality(**arguments) -> dict:
    return {"class_path": "callbacks.metrics.ImageQuality", "init_args": arguments}


def prompts(name: str, **arguments) -> dict:
    return {"class_path": f"callbacks.{name}", "init_args": arguments}


HELD_OUT = prompts("prompts.HeldOut", source="captions", count=3)
GENEVAL_FILE = {"prompt": "a circle", "tag": "single_object", "include": []}
REFUSED = {
    "kid[shapes] needs 1000 generated images but there are 5": {
        "metrics": [image_quality(scores=["fid", "kid"])]
    },
    "kid[shapes] needs 3 real images but there are 2": {
        "metrics": [image_quality(scores=["kid"], kid_subset_size=3)],
        "prompts": prompts("prompts.ShapesPrompts", count=5, real_per_prompt=1),
        "real": 2,
    },
    "fid[shapes] needs 2 generated images but there are 1": {
        "prompts": prompts("prompts.ShapesPrompts", count=1)
    },
    "scores=['fid', 'fid'] names a score twice": {
        "metrics": [image_quality(scores=["fid", "fid"])]
    },
    "kid_subset_size=1 must be at least 2": {"metrics": [image_quality(kid_subset_size=1)]},
    "two metrics are named fid[shapes]": {"metrics": [image_quality(), image_quality()]},
    "source 'text' has no captioned image in its": {
        "prompts": prompts("prompts.HeldOut", source="text"), "metrics": [],
    },
    "the data has no source 'caption'; name one of captions, text": {
        "prompts": prompts("prompts.HeldOut", source="caption"), "metrics": [],
    },
    "ShapesComposition judges images of the shapes world alone": {
        "prompts": HELD_OUT, "metrics": [{"class_path": "callbacks.geneval.ShapesComposition"}],
    },
    "no Inception weights at gone.pth": {
        "metrics": [image_quality(extractor="inception", weights="gone.pth")]
    },
    "open_clip cannot load 'ViT-L-14' with pretrained='gone.pt'": {
        "metrics": [
            {
                "class_path": "callbacks.metrics.CLIPScore",
                "init_args": {"model": "ViT-L-14", "pretrained": "gone.pt"},
            }
        ]
    },
    "gone.json cannot be read; give the file of a local copy": {
        "prompts": prompts("published_prompts.KarpathyPrompts", annotations="gone.json", images=""),
        "metrics": [], "generate_images": False,
    },
    "num_inference_steps=1001 must be from 1 to 990": {
        "sampling": {"num_inference_steps": 1001, "sampler": "DDPMScheduler"}
    },
    "sampler='DDPM' is not a sampler for a model that predicts": {"sampling": {"sampler": "DDPM"}},
    "CaptionScores scores captioned images, but caption_images is false": {"caption_images": False},
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_measured_is_refused_before_data_is_prepared(
    sentence, tmp_path, monkeypatch, capsys
):
    changed = dict(REFUSED[sentence])
    if real := changed.pop("real", None):
        monkeypatch.setattr(ShapesPrompts, "real_images", lambda self, data=None: [None] * real)
    config = runs.write_config(tmp_path, only_evaluate(tmp_path, **changed))
    config.write_text(config.read_text().replace("verbose: false\n", ""))
    monkeypatch.setattr("tf_lightning.data.Mixture.prepare_data", lambda self: pytest.fail("late"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(config)])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 1 and len(errors) == 1 and sentence in errors[0]
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


def test_geneval_is_refused_where_a_batch_divides_a_prompt_or_the_folder_is_a_file(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text(json.dumps(GENEVAL_FILE) + "\n")
    asked = GenEvalPrompts(str(file), copies=4).prompts(None)
    GenEvalFolder(str(tmp_path / "new" / "folder")).check(asked, None, 8)
    assert not (tmp_path / "new").exists()  # nothing is written yet
    with pytest.raises(UserError, match="batch_size=6 divides the 4 images of a prompt"):
        GenEvalFolder(str(tmp_path)).check(asked, None, 6)
    with pytest.raises(UserError, match="evaluation_metadata.jsonl is a file"):
        GenEvalFolder(str(file / "below")).check(asked, None, 8)
    with pytest.raises(UserError, match="GenEvalFolder needs the prompts"):
        GenEvalFolder(str(tmp_path)).check(ShapesPrompts(2).prompts(), None, 8)
    with pytest.raises(UserError, match="need reference captions, which 4 of 4 prompts lack"):
        CaptionScores().check(asked, None, 8)


def refuse(self, *args) -> None:
    raise ValueError("kid[shapes] met something new")


KID = [
    image_quality(scores=["fid", "kid"], kid_subset_size=2),
    {"class_path": "callbacks.metrics.CLIPScore"},
]


def test_a_score_that_fails_in_training_is_a_warning_and_takes_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.kid.KID.compute", refuse)
    config = runs.write_config(tmp_path, only_evaluate(tmp_path, metrics=KID))
    config.write_text(config.read_text().replace("verbose: false\n", ""))
    with pytest.warns(UserWarning, match="a score at step 3 is missing: kid.shapes. met something"):
        main(["fit", "-c", str(config), "--trainer.max_steps", "4"])
    found = values(tmp_path / "run" / "metrics" / "step0000003-val.json")
    assert {"val/fid[shapes]", "val/clip_score[shapes]", "val/text/perplexity"} <= found.keys()
    assert not any("kid" in name for name in found)


def test_a_score_that_fails_in_an_evaluation_is_an_error_after_the_others_are_written(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("callbacks.metrics.CLIPScore.update", refuse)
    with pytest.raises(SystemExit) as stop:
        validate(run, tmp_path, metrics=KID)
    said = capsys.readouterr()
    assert stop.value.code == 1 and "error: kid[shapes] met something new" in said.err
    found = values(tmp_path / "run" / "validate" / "metrics.json")
    assert {"val/fid[shapes]", "val/kid[shapes]"} <= found.keys() and "clip" not in str(found)
    assert "val/kid[shapes]" in said.out  # the table


def test_training_continues_after_an_evaluation_that_failed(tmp_path, monkeypatch):
    def fail(*args, **how):
        raise ValueError("the images are not a number")

    monkeypatch.setattr(evaluate, "sample", fail)
    config = runs.write_config(tmp_path, only_evaluate(tmp_path))
    config.write_text(config.read_text().replace("verbose: false\n", ""))
    with pytest.warns(UserWarning) as warnings:
        main(["fit", "-c", str(config)])
    sentences = [str(w.message) for w in warnings if "the evaluation at" in str(w.message)]
    assert [sentence[18:25] for sentence in sentences] == ["step 3 ", "step 6 "]
    found = values(tmp_path / "run" / "metrics" / "step0000006-val.json")
    assert {"val/text/perplexity", "val/captions/loss_diffusion"} <= found.keys()
    assert not any("fid" in name for name in found)


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
    with pytest.warns(UserWarning, match="^no documents to validate on in text; give"):
        found = values(validate(run, tmp_path, nothing))
    assert "val/captions/perplexity" in found and not any("text" in name for name in found)


def test_an_evaluation_of_an_empty_validation_set_is_refused(run, tmp_path, capsys):
    sources = [f"--data.init_args.sources.{s}.init_args.num_val=0" for s in ("text", "captions")]
    with pytest.raises(SystemExit) as stop:
        validate(run, tmp_path, *sources)
    assert stop.value.code == 1
    assert "error: no documents to validate on in captions, text" in capsys.readouterr().err


# TensorBoard


class Writer:
    """A TensorBoard writer that keeps images and texts."""

    def __init__(self):
        self.images, self.texts = {}, {}

    def add_image(self, tag, image, step):
        self.images[tag, step] = image

    def add_text(self, tag, text, step):
        self.texts[tag, step] = text


def logged(folder: Path, batch: SampleBatch) -> Writer:
    """The writer after samples of a run in a folder were logged at step 9."""
    writer = Writer()
    trainer = SimpleNamespace(loggers=[SimpleNamespace(experiment=writer)])
    log_samples(trainer, folder, 9, ShapesPrompts(2), batch, "val")
    return writer


def red_ink(image) -> int:
    """Count the pixels of the color of wrong captions and marks."""
    return int((image.numpy() == np.array(WRONG)[:, None, None]).all(0).sum())


def test_generated_images_are_shown_above_their_prompts_which_are_red_if_wrong(tmp_path):
    asked = ShapesPrompts(2).prompts()
    right = [prompt.image() for prompt in asked]
    image = logged(tmp_path, SampleBatch(asked, range(2), right)).images["generated/val", 8]
    assert image.shape[0] == 3 and red_ink(image) == 0
    wrong = [Image.new("RGB", (64, 64))] * 2
    writer = logged(tmp_path, SampleBatch(asked, range(2), wrong))
    assert red_ink(writer.images["generated/val", 8]) > 50 and not writer.texts


def test_captions_are_shown_below_their_images_and_beside_the_references(tmp_path):
    asked = ShapesPrompts(2).prompts()
    images = [prompt.image() for prompt in asked]
    captions = [asked[0].references[-1], "wrong words"]
    writer = logged(tmp_path, SampleBatch(asked, range(2), images, captions))
    assert red_ink(writer.images["captioned/val", 8]) > 20
    rows = writer.texts["captions/val", 8].splitlines()
    assert rows[2].endswith(f"| {captions[0]} |") and asked[0].references[0] in rows[2]
    assert rows[3].endswith("| wrong words |") and len(rows) == 4
