"""LightningCLI: defaults, links between model and data, precision, and short messages."""

from pathlib import Path

import pytest
import torch

from support import autoencoder_runs, runs
from tf_lightning.cli.checks import fast_precision
from tf_lightning.cli.lightning import TransfusionCLI, build
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion


@pytest.mark.parametrize(
    ("capability", "precision"),
    [("avx512_bf16", "bf16-mixed"), ("amx_bf16", "bf16-mixed"), ("avx512_f", "32-true")],
)
def test_a_cpu_multiplies_bf16_only_where_it_has_the_instructions(
    capability, precision, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert fast_precision("cpu") == precision


def test_a_torch_that_does_not_tell_gets_full_precision(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_precision("cpu") == "32-true"


def built(folder: Path, *args: str, change=lambda config: None) -> TransfusionCLI:
    """Returns the command with data, model and trainer built, and nothing run."""
    return build(["-c", str(runs.write_config(folder, change)), *args], run=False)


def callbacks_of(command: TransfusionCLI) -> list[str]:
    return [type(callback).__name__ for callback in command.trainer.callbacks]


def without_callbacks(config: dict) -> None:
    config["trainer"]["callbacks"] = []
    config["trainer"]["enable_progress_bar"] = True


def test_the_callbacks_of_every_run_come_first(tmp_path):
    names = callbacks_of(built(tmp_path, change=without_callbacks))
    assert names[:3] == ["TrainingProgress", "PrintScores", "LearningRateMonitor"]
    # Lightning moves these to the end.
    assert names[-3:] == ["ModelCheckpoint", "LastCheckpoint", "MissedWork"]


def test_a_callback_that_the_configuration_lists_is_not_added_a_second_time(tmp_path):
    """Configurations written before the command had default callbacks list them."""

    def list_all(config: dict) -> None:
        names = ("TQDMProgressBar", "LearningRateMonitor", "ModelCheckpoint")
        paths = [f"lightning.pytorch.callbacks.{name}" for name in names]
        config["trainer"]["callbacks"] = [{"class_path": path} for path in paths]
        config["trainer"]["enable_progress_bar"] = True

    names = callbacks_of(built(tmp_path, change=list_all))
    for name in ("TQDMProgressBar", "LearningRateMonitor", "ModelCheckpoint"):
        assert names.count(name) == 1
    assert "TrainingProgress" not in names


def test_callbacks_with_a_key_come_between_those_of_every_run_and_the_list(tmp_path):
    def own(config: dict) -> None:
        config["trainer"]["callbacks"] = [
            {"class_path": "support.runs.StopAt", "init_args": {"step": 9}}
        ]
        config["retrieval_accuracy"] = {"source": "captions"}

    command = built(tmp_path, "--evaluate.prompts=callbacks.prompts.ShapesPrompts", change=own)
    names = [name for name in callbacks_of(command) if name in {"Throughput", "Evaluate", "StopAt"}]
    assert names == ["Throughput", "Evaluate", "StopAt"]
    assert "RetrievalAccuracy" in callbacks_of(command)
    assert "ShapesReport" not in callbacks_of(command)


def test_a_run_whose_folder_cannot_be_written_is_refused_before_data_is_prepared(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "run").write_text("a file")
    monkeypatch.setattr("tf_lightning.data.Mixture.prepare_data", lambda self: pytest.fail("late"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(runs.write_config(tmp_path))])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and f"{tmp_path / 'run'} is a file" in error


def test_a_listed_callback_replaces_the_one_of_its_key(tmp_path):
    """Configurations written before callbacks had keys list them."""
    names = callbacks_of(built(tmp_path))
    assert all(names.count(name) == 1 for name in ("Throughput", "TextPerplexity", "Evaluate"))
    with pytest.warns(UserWarning, match="has a ShapesReport too, so `shapes_report` is not used"):
        names = callbacks_of(built(tmp_path, "--shapes_report.num_prompts=9"))
    assert names.count("ShapesReport") == 1


@pytest.mark.parametrize(
    ("option", "left_out"),
    [
        ("enable_progress_bar", "TrainingProgress"),
        ("enable_checkpointing", "ModelCheckpoint"),
        ("logger", "LearningRateMonitor"),
    ],
)
def test_what_a_run_switches_off_has_no_callback(option, left_out, tmp_path):
    command = built(tmp_path, f"--trainer.{option}=false", change=without_callbacks)
    assert left_out not in callbacks_of(command)


def test_the_data_follows_the_model_whatever_the_file_says(tmp_path):
    def disagree(config: dict) -> None:
        config["model"]["linear"] = {"time": "token", "pos_embed": "sincos"}
        config["data"]["init_args"] |= {"patch_size": 4, "vocab_size": 310, "time_token": False}

    with pytest.warns(UserWarning) as warned:
        data = built(tmp_path, "--model.patch_size=8", change=disagree).datamodule
    said = " ".join(str(warning.message) for warning in warned)
    assert "data.patch_size=4 is not used; the data takes patch_size from the model" in said
    assert "data.vocab_size=310 is not used" in said and "data.time_token=False" in said
    assert (data.patch_size, data.vocab_size, data.time_token) == (8, runs.VOCAB_SIZE, True)


def test_the_model_takes_its_latent_channels_from_the_autoencoder(tmp_path):
    def leave_out(config: dict) -> None:
        del config["model"]["latent_channels"]

    pixels = built(tmp_path, change=leave_out).model
    assert pixels.hparams.latent_channels == 3
    latents = built(tmp_path, "--data.autoencoder=shapes", "--model.patch_size=2", change=leave_out)
    assert latents.model.hparams.latent_channels == 8
    text = built(tmp_path, "--data.autoencoder=null", "--model.latent_channels=5").model
    assert text.hparams.latent_channels == 5  # nothing to take it from


def test_another_class_inherits_no_argument_of_the_default_class(tmp_path):
    command = built(
        tmp_path,
        change=lambda config: config.update(
            model={"class_path": "tf_lightning.training.autoencoder.AutoencoderModule"},
            data={
                "class_path": "tf_lightning.data.ImageData",
                "init_args": {"source": runs.shapes("Captions", 9)},
            },
            trainer={"enable_progress_bar": False},
        ),
    )
    own = AutoencoderModule().hparams
    for name in ("lr", "weight_decay", "warmup_steps", "min_lr_ratio"):
        assert command.model.hparams[name] == own[name]
    assert tuple(command.model.hparams["betas"]) == own["betas"]
    assert not {"Throughput", "TextPerplexity", "GradientNorms"} & set(callbacks_of(command))


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ([], 0),
        (["--seed_everything=5"], 5),
        (["--seed_everything=5", "--data.seed=3"], 3),
        (["--data.init_args.seed", "3"], 3),
    ],
)
def test_the_seed_of_the_run_is_that_of_the_data(options, seed, tmp_path):
    command = built(tmp_path, *options)
    assert command.datamodule.seed == seed
    assert command.config.data.init_args.seed == seed  # what config.yaml records
    assert command.datamodule.sources["captions"].seed == 0  # other images are other data


@pytest.mark.parametrize(("more", "seed"), [([], 5), (["--model.seed=3"], 3)])
def test_the_seed_of_the_run_is_that_of_an_autoencoders_noise(tmp_path, more, seed):
    path = autoencoder_runs.write_config(tmp_path)
    command = build(["-c", str(path), "--seed_everything=5", *more], run=False)
    assert command.model.hparams.seed == command.config.model.init_args.seed == seed
    assert command.datamodule.seed == 5


def test_a_file_that_gives_the_data_a_seed_keeps_it(tmp_path):
    def give(config: dict) -> None:
        config["data"]["init_args"]["seed"] = 3

    assert built(tmp_path, "--seed_everything=5", change=give).datamodule.seed == 3


def test_a_run_does_not_resume_with_rows_of_another_seed(run, tmp_path, fails):
    last = str(run / "checkpoints" / "last.ckpt")
    command = ["fit", "-c", runs.write_config(tmp_path), "--ckpt_path", last]
    for option in ("--seed_everything=5", "--data.seed=5"):
        code, line = fails(*command, option)
        assert code == 1 and "had seed=0, but now has seed=5; resume it with --data.seed 0" in line
    data = built(tmp_path / "other", "--data.seed=3").datamodule
    assert data.state_dict() == {"next_row": 0, "global_step": 0, "seed": 3}
    with pytest.raises(UserError, match="had seed=5, but now has seed=3; resume it with"):
        data.load_state_dict({"next_row": 0, "global_step": 0, "seed": 5})


class MyModel(Transfusion):
    """A model of the user."""

    def __init__(self, extra: int = 3, **options):
        super().__init__(**options)
        self.extra = extra


def test_another_class_takes_the_flat_arguments_of_the_file(tmp_path):
    name = f"{__name__}.MyModel"
    for options in ([f"--model.class_path={name}"], ["--model", name, "--model.extra=7"]):
        command = built(tmp_path, *options, "--model.lr=0.01")
        assert type(command.model).__name__ == "MyModel"
        assert command.model.extra == (7 if len(options) > 1 else 3)
        assert command.model.hparams["lr"] == 0.01
        assert command.model.hparams["warmup_steps"] == runs.WARMUP_STEPS  # of the file


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_file_may_mix_a_class_path_with_flat_arguments(section, tmp_path):
    def mix(config: dict) -> None:
        values = config[section].pop("init_args", config[section])
        paths = {"model": "tf_lightning.Transfusion", "data": "tf_lightning.data.Mixture"}
        config[section] = {"class_path": paths[section], **values}

    command = built(tmp_path, change=mix)
    assert command.model.hparams["lr"] == runs.PEAK_LR and command.datamodule.row_length == 256
