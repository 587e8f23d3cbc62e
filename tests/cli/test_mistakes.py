"""Each mistake on the command line is answered with one sentence."""

import json
from pathlib import Path

import pytest
import torch

from support import runs
from support.files import write_tar
from tf_lightning.cli.main import VERBS, main


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def test_an_unknown_command_is_named_with_the_known_ones(fails):
    code, line = fails("fti")
    assert code == 1
    assert "'fti'; did you mean 'fit'?" in line
    assert all(verb in line for verb in VERBS)


def test_encode_is_an_unknown_command_whose_error_names_prepare(fails):
    code, line = fails("encode")
    assert code == 1
    assert "'encode'" in line and "prepare" in line


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_an_unknown_key_is_named(verb, tmp_path, fails):
    config = runs.write_config(tmp_path)
    code, line = fails(verb, "-c", config, "--model.patchsize", "3")
    assert code == 2 and "--model.patchsize" in line


@pytest.mark.parametrize("section", ["trainer", "model", "data"])
def test_an_unknown_key_in_the_file_is_named(section, tmp_path, fails):
    def misspell(config: dict) -> None:
        part = config[section]
        part.get("init_args", part)["mispelt"] = 3

    code, line = fails("fit", "-c", runs.write_config(tmp_path, misspell))
    assert code == 2 and "mispelt" in line


@pytest.mark.parametrize(
    "verb,limit",
    [
        ("fit", "max_steps"),
        ("fit", "max_epochs"),
        ("validate", "limit_val_batches"),
        ("test", "limit_test_batches"),
        ("predict", "limit_predict_batches"),
    ],
)
def test_a_limit_of_zero_is_refused_by_name(verb, limit, tmp_path, fails):
    more = [] if verb == "fit" else ["--ckpt_path", tmp_path / "any.ckpt"]
    config = runs.write_config(tmp_path)
    code, line = fails(verb, "-c", config, f"--trainer.{limit}=0", *more)
    assert code == 1 and f"{limit}=0" in line


@pytest.mark.parametrize("file", ["nowhere.yaml", ""])
def test_a_missing_config_file_is_named(file, tmp_path, fails):
    code, line = fails("fit", "-c", tmp_path / file)
    assert code == 2 and str(tmp_path / file) in line


def test_a_config_file_that_is_no_yaml_is_refused(tmp_path, fails):
    (tmp_path / "bad.yaml").write_text("trainer: [1\nmodel: 2")
    assert fails("fit", "-c", tmp_path / "bad.yaml")[0] == 2


@pytest.fixture
def bad_checkpoint(run, tmp_path):
    """Writes a file with a fault, by the name of the fault."""

    def make(fault: str) -> Path:
        path = tmp_path / f"{fault}.ckpt"
        if fault == "cut":
            content = checkpoint_of(run).read_bytes()
            path.write_bytes(content[: len(content) // 2])
        elif fault == "text":
            path.write_text("hello world, not a checkpoint")
        elif fault == "foreign":
            torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
        elif fault == "pickle":
            a_class = Path  # which torch.load(weights_only=True) refuses
            torch.save({"state_dict": {}, "image_codec": a_class}, path)
        elif fault == "folder":
            path.mkdir()
        return path

    return make


@pytest.mark.parametrize("fault", ["missing", "cut", "text", "foreign", "pickle", "folder"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "generate"])
def test_a_bad_checkpoint_is_refused_by_name_before_anything_is_written(
    verb, fault, bad_checkpoint, tmp_path, fails
):
    path = bad_checkpoint(fault)
    config = runs.write_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if verb == "generate":
        code, line = fails(verb, path, "a red circle", "-o", tmp_path / "out")
    else:
        code, line = fails(verb, "-c", config, "--ckpt_path", path)
    assert code == 1 and str(path) in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", [[], ["--ckpt_path", "last"]])
def test_an_evaluation_without_a_checkpoint_file_is_refused(given, tmp_path, fails):
    code, _ = fails("validate", "-c", runs.write_config(tmp_path), *given)
    assert code == 1


def test_a_damaged_last_checkpoint_is_refused_when_resuming(tmp_path, run, fails):
    config = runs.write_config(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(checkpoint_of(run).read_bytes()[:10_000])
    code, line = fails("fit", "-c", config, "--ckpt_path", "last")
    assert code == 1 and "last.ckpt (10,000 bytes) cannot be read" in line


def test_another_models_checkpoint_does_not_resume(tmp_path, run, fails):
    config = runs.write_config(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(checkpoint_of(run).read_bytes())
    wider = ["--model.transformer.dim", "64"]
    code, line = fails("fit", "-c", config, "--ckpt_path", "last", *wider)
    assert code == 1 and "transformer.dim=64 differs from the checkpoint's 32" in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_resume_that_is_refused_is_not_advised_to_repeat_its_command(tmp_path, run, capsys):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(checkpoint_of(run).read_bytes())
    wider = ["--ckpt_path", "last", "--model.transformer.dim", "64"]
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(runs.write_config(tmp_path)), *wider])
    assert "Go on with" not in capsys.readouterr().err


MISTAKES = {
    "--data.init_args.vocab_size=310": "give --model.transformer.vocab_size",
    "--model.transformer.vocab_size=20": "vocab_size=20 is too small",
    "--data.patch_size=8": "the data takes patch_size from the model; give --model.patch_size",
    "--data.time_token=true": "the data takes time_token from the model; give --model.linear.time",
    "--model.latent_channels=4": "has 3 channels but the model has latent_channels=4",
    "--model.prediction_type=x0": "x0",
    "--data.init_args.autoencoder=none/": "there is no autoencoder",
    "--data.init_args.autoencoder=null": "name data.autoencoder, such as 'pixels'",
    "--data.init_args.image_first_prob=2": "image_first_prob=2.0 must be from 0 to 1",
    "--data.init_args.weights={captions: 1}": "weights are given for ['captions']",
    "--data.init_args.row_length=20": "longer than a row of 20 tokens); give a larger data.row_len",
    "--data.init_args.tokenizer=nowhere.model": "nowhere.model",
    "--data.init_args.sources.text.init_args.num_documents=0": "num_documents=0",
    "--trainer.accelerator=nonsense": "nonsense",
    "--trainer.devices=0": "devices",
    "--trainer.precision=16-mixed": "precision=16-mixed needs a GPU; use bf16-mixed or 32-true",
    "--trainer.precision=transformer-engine": "precision=transformer-engine is not supported",
    "--trainer.devices=99": "trainer.devices=99 starts as many processes on this CPU; give at most",
    "--trainer.precision=bf16-true": "precision=bf16-true is not supported",
    "--trainer.gradient_clip_val=-1.0": "gradient_clip_val=-1.0 must be at least 0",
    "--model.lr=-1.0": "lr=-1.0 must be at least 0",
    "--model.lr=.nan": "lr=nan must be at least 0",
    "--model.betas=[1.5,0.9]": "betas=(1.5, 0.9) must be at least 0 and less than 1, each",
    "--model.transformer.num_heads=3": "dim=32 does not divide into num_heads=3 heads",
    "--data.init_args.num_workers=-1": "num_workers=-1 must be at least 0",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_wrong_value_is_answered_with_one_sentence(argument, tmp_path, fails):
    code, line = fails("fit", "-c", runs.write_config(tmp_path), argument)
    assert code == 1 and MISTAKES[argument] in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_images_that_do_not_fit_the_model_are_refused_before_anything_is_prepared(tmp_path, fails):

    def without_callbacks(config: dict) -> None:
        config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]

    config = runs.write_config(tmp_path, without_callbacks)
    pictures = {"class_path": "tf_lightning.data.CaptionTars"}
    tar = write_tar(tmp_path / "a.tar", {"a.txt": b"red"})
    pictures["init_args"] = {"paths": str(tar), "image_size": 40}
    change = f"--data.init_args.sources.captions={json.dumps(pictures)}"
    for argument, told in {
        "--model.latent_channels=4": 'autoencoder "pixels" has 3 channels',
        change: "captions: image_size=40 does not divide into patches of 16 pixels",
    }.items():
        code, line = fails("fit", "-c", config, argument)
        assert code == 1 and told in line
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("kind", "setting", "told"),
    [
        ("flow", {"sampler": "DDPMScheduler"}, "does not fit a model that predicts 'flow'"),
        (
            "v_prediction",
            {"sampler": "UniPCMultistepScheduler", "timestep_shift": 2.5},
            "timestep_shift=2.5 does not fit UniPCMultistepScheduler, whose",
        ),
    ],
)
def test_a_sampler_that_does_not_fit_the_model_is_refused_before_training(
    kind, setting, told, tmp_path, fails
):
    def change(config: dict) -> None:
        config["model"]["prediction_type"] = kind
        callbacks = {
            call["class_path"]: call["init_args"] for call in config["trainer"]["callbacks"]
        }
        callbacks["callbacks.evaluate.Evaluate"]["sampling"] |= setting

    code, line = fails("fit", "-c", runs.write_config(tmp_path, change))
    assert code == 1 and told in line
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "there is no file or"), ("", "unusable"), ("{}\n", "unusable")]
)
def test_a_file_without_documents_is_refused_and_nothing_half_written_is_left(
    content, sentence, tmp_path, fails
):
    files = tmp_path / "corpus.jsonl"
    if content is not None:
        files.write_text("not json\n" + content)

    def read_files(config: dict) -> None:
        config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
        config["data"] = {
            "class_path": "tf_lightning.data.TextData",
            "init_args": {
                **{"paths": str(files), "cache_dir": str(tmp_path / "data")},
                **{"vocab_size": runs.VOCAB_SIZE, "patch_size": runs.PATCH_SIZE},
            },
        }

    code, line = fails("fit", "-c", runs.write_config(tmp_path, read_files))
    assert code == 1 and (sentence in line or "no text" in line)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_a_tokenizer_other_than_the_checkpoints_is_refused(run, tmp_path, fails):
    other_words = "--data.init_args.sources.text.init_args.seed=9"
    config = runs.write_config(tmp_path)
    code, line = fails("validate", "-c", config, "--ckpt_path", checkpoint_of(run), other_words)
    assert code == 1 and "tokenizer is not the one that this checkpoint was trained with" in line


def test_an_evaluation_refuses_another_value_of_the_model_than_the_checkpoint_has(
    run, tmp_path, fails
):
    config = runs.write_config(tmp_path)
    arguments = ["validate", "-c", config, "--ckpt_path", checkpoint_of(run)]
    code, line = fails(*arguments, "--model.diffusion_weight=2")
    assert code == 1 and "--model.diffusion_weight 2.0: validate takes the model from the" in line
    code, line = fails(*arguments, "--model.transformer.dim", "64")
    assert code == 1 and "which has 32; leave it out" in line


def test_a_prediction_that_would_write_nothing_is_refused(run, tmp_path, fails):
    config = runs.write_config(tmp_path, runs.only_checkpoints)
    code, line = fails("predict", "-c", config, "--ckpt_path", checkpoint_of(run))
    assert code == 1 and "predict would write nothing; add --prediction_writer {}" in line
    assert not (tmp_path / "run").exists()
