"""Fine-tuning starts from the weights of another run and takes nothing else from it."""

import shutil

import pytest
import torch

from callbacks.init_from import InitFrom
from support import runs
from support.tiny import tiny_module
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.module import Transfusion


@pytest.fixture
def checkpoint(run) -> str:
    return str(run / "checkpoints" / "last.ckpt")


def write_config(run, folder, checkpoint, change=lambda config: None):
    """Write a run that starts from a checkpoint and uses the prepared data of the session's run."""

    def edit(config: dict) -> None:
        config["data"]["init_args"]["cache_dir"] = str(run.parent / "data")
        start = {
            "class_path": "callbacks.init_from.InitFrom",
            "init_args": {"checkpoint": checkpoint},
        }
        kept = config["trainer"]["callbacks"][:1]  # ModelCheckpoint
        config["trainer"]["callbacks"] = [*kept, start]
        config["trainer"]["limit_val_batches"] = 0
        change(config)

    return runs.write_config(folder, edit)


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def frozen(config: dict) -> None:
    """Set a learning rate of 0."""
    config["model"]["lr"] = 0.0


def test_a_run_starts_from_the_ema_weights_of_another(run, tmp_path, checkpoint):
    main(["fit", "-c", str(write_config(run, tmp_path, checkpoint, frozen))])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == runs.MAX_STEPS
    theirs, ours = weights(checkpoint), weights(last)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs["ema." + name.partition(".")[2]])
    name = "transformer.layers.0.attention.wq.weight"
    assert not torch.equal(theirs[f"net.{name}"], theirs[f"ema.{name}"])


def test_sizes_that_differ_are_refused_before_data_is_prepared(
    run, tmp_path, checkpoint, monkeypatch, capsys
):
    def wider(config: dict) -> None:
        config["model"]["transformer"]["ffn_dim"] = 64

    monkeypatch.setattr("tf_lightning.data.Mixture.prepare_data", lambda self: pytest.fail("late"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(write_config(run, tmp_path, checkpoint, wider))])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 1
    assert "feed_forward.w1.weight is (48, 32) there and (64, 32) here" in error


@pytest.mark.parametrize(("option", "value"), [("num_heads", 4), ("norm_order", "post")])
def test_options_that_shapes_do_not_show_are_refused_before_data_is_prepared(
    option, value, run, tmp_path, checkpoint, monkeypatch, refused
):
    def other(config: dict) -> None:
        config["model"]["transformer"][option] = value

    monkeypatch.setattr("tf_lightning.data.Mixture.prepare_data", lambda self: pytest.fail("late"))
    line = refused("fit", "-c", write_config(run, tmp_path, checkpoint, other))
    assert f"was trained with transformer.{option}=" in line and f"useless with {value}" in line


def test_options_that_change_what_the_weights_mean_are_told(checkpoint, caplog):
    hparams = read_checkpoint(checkpoint)["hyper_parameters"] | {"prediction_type": "flow"}
    transformer = hparams["transformer"] | {"rope_theta": 77.0, "dropout": 0.1}
    module = Transfusion(**hparams | {"transformer": TransformerConfig(**transformer)})
    with caplog.at_level("INFO"):
        InitFrom(checkpoint)._checkpoint_weights(module)
        InitFrom(checkpoint, transformer_only=True)._checkpoint_weights(module)
    theta = "transformer.rope_theta=77.0 (10000.0 there)"
    both, one = [text.partition("options: ")[2] for text in caplog.messages]
    assert both == f"prediction_type=flow (epsilon there), {theta}" and one == theta


def test_only_the_transformer_may_be_loaded(run, tmp_path, checkpoint):
    """As MonoFormer starts from a language model: the image side differs and is new."""

    def monoformer(config: dict) -> None:
        frozen(config)
        linear = {"time": "adaln", "pos_embed": "sincos", "zero_init": "input"}
        config["model"] |= {"linear": linear, "learned_sigma": True, "noise_schedule": "linear"}
        config["trainer"]["callbacks"][-1]["init_args"]["transformer_only"] = True

    main(["fit", "-c", str(write_config(run, tmp_path, checkpoint, monoformer))])
    theirs, ours = weights(checkpoint), weights(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for name, value in ours.items():
        if ".transformer." in name:
            torch.testing.assert_close(value, theirs["ema." + name.partition(".")[2]])
    assert not ours["net.patch_coder.patch_encoder.weight"].any()
    assert ours["net.patch_coder.patch_decoder.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_image_weights_start_as_copies_of_a_frozen_text_side(run, tmp_path, checkpoint):
    def own(config: dict) -> None:
        config["model"] |= {"text_lr_ratio": 0.0, "ema_decay": 0.0}
        config["model"]["transformer"]["modality_weights"] = "all"

    main(["fit", "-c", str(write_config(run, tmp_path, checkpoint, own))])
    theirs, ours = weights(checkpoint), weights(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for name, value in ours.items():
        start = theirs["ema." + name.removeprefix("net.").replace("image_layers.", "layers.")]
        trained = "image_layers" in name or "patch_coder" in name
        assert torch.equal(value, start) != trained, name
        assert (value - start).abs().max() < 0.05, name  # after six steps


def test_only_the_transformer_may_come_from_a_run_with_another_autoencoder(checkpoint):
    module = tiny_module()
    codec = {"autoencoder": "other", "fingerprint": "0" * 16, "latent_shape": [3, 64, 64]}
    module.image_codec = codec
    with pytest.raises(UserError, match="give the data that one"):
        InitFrom(checkpoint)._checkpoint_weights(module)
    assert InitFrom(checkpoint, transformer_only=True)._checkpoint_weights(module)
    assert module.image_codec == codec


def test_a_resumed_run_continues_from_its_own_checkpoint(run, tmp_path, checkpoint):
    copy = tmp_path / "start.ckpt"
    shutil.copy(checkpoint, copy)
    config = str(write_config(run, tmp_path, str(copy)))
    main(["fit", "-c", config, "--trainer.max_steps", "3"])
    copy.unlink()  # reading it again would stop the run
    main(["fit", "-c", config, "--ckpt_path", "last"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == runs.MAX_STEPS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"]["transformer"].update(ffn_dim=40), "does not fit this model"),
        (lambda c: c["data"]["init_args"]["sources"].pop("text"), "tokenizer is not the one"),
    ],
)
def test_weights_or_a_tokenizer_that_do_not_fit_are_refused(
    change, words, run, tmp_path, checkpoint, capsys
):
    config = write_config(run, tmp_path, checkpoint, change)
    own_data = f"--data.init_args.cache_dir={tmp_path / 'data'}"  # it may train a tokenizer
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(config), own_data])
    assert stop.value.code == 1 and words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_other_data_uses_the_tokenizer_of_the_checkpoint(run, tmp_path, checkpoint):
    def fewer(config: dict) -> None:
        frozen(config)
        config["data"]["init_args"]["sources"].pop("text")
        config["data"]["init_args"] |= {
            "tokenizer": checkpoint,
            "cache_dir": str(tmp_path / "data"),
        }

    main(["fit", "-c", str(write_config(run, tmp_path, checkpoint, fewer))])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    ours, theirs = Tokenizer(last), Tokenizer(checkpoint)
    assert ours.proto == theirs.proto
    assert ours.encode("a red circle") == theirs.encode("a red circle")
    assert not list((tmp_path / "data").glob("tokenizer-*"))  # no tokenizer was trained


def test_a_file_that_is_not_a_checkpoint_has_no_tokenizer(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        Tokenizer(tmp_path / "bad.ckpt")


def test_a_missing_checkpoint_is_reported(run, tmp_path, capsys):
    config = write_config(run, tmp_path, str(tmp_path / "none.ckpt"))
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config)])
    assert "no checkpoint at" in capsys.readouterr().err
