"""A monitored score that a run does not have is refused before it begins."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks.evaluate import Evaluate
from callbacks.metrics import CaptionScores, CLIPScore, ImageQuality
from callbacks.monitor import check_monitors, check_train_monitors
from callbacks.prompts import ShapesPrompts
from callbacks.reconstruct import Reconstruct
from callbacks.text_perplexity import TextPerplexity
from support import runs
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

DATA = SimpleNamespace(source_names=["captions", "text"])
KNOWN = [
    *("val/text/perplexity", "val/captions/bits_per_byte", "val/captions/loss_diffusion"),
    *("val/fid[shapes]", "val/clip_score[shapes]", "val/cider[shapes]", "val/bleu4[shapes]"),
    *("step", "epoch", "train/anything", None),
]
UNKNOWN = {
    "val/fid": "did you mean val/fid[shapes]?",
    "val/kid[shapes]": "did you mean val/fid[shapes]?",
    "val/txt/perplexity": "did you mean val/text/perplexity?",
    "val/text/loss_codes": "did you mean val/text/loss_",
    "zzz": "use one of epoch, step, val/bleu4[shapes]",
}


@pytest.fixture(scope="module")
def module() -> Transfusion:
    return Transfusion(
        TransformerConfig(vocab_size=300, dim=32, num_layers=1, num_heads=2, ffn_dim=48)
    )


def trainer(monitor: str | None, *others: L.Callback) -> SimpleNamespace:
    metrics = [ImageQuality(), CLIPScore(), CaptionScores()]
    evaluate = Evaluate(ShapesPrompts(2), metrics)
    saver = ModelCheckpoint(monitor=monitor)
    return SimpleNamespace(callbacks=[TextPerplexity(), evaluate, saver, *others])


@pytest.mark.parametrize("name", KNOWN)
def test_a_score_of_the_run_can_be_monitored(name, module):
    check_monitors(trainer(name), module, DATA)


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_name_is_refused_with_the_nearest(name, module):
    with pytest.raises(UserError) as error:
        check_monitors(trainer(name), module, DATA)
    assert str(error.value).startswith(f"monitor={name!r} is not a score of this run; ")
    assert UNKNOWN[name] in str(error.value)


def test_every_callback_with_a_monitor_is_checked(module):
    with pytest.raises(UserError, match="monitor='val/los' is not a score"):
        check_monitors(trainer(None, EarlyStopping("val/los")), module, DATA)


def test_a_sweep_has_names_with_scales(module):
    run = trainer("val/fid[shapes]@2")
    run.callbacks[1].scales = [1.0, 2.0]
    check_monitors(run, module, DATA)
    run.callbacks[2].monitor = "val/fid[shapes]"
    with pytest.raises(UserError):
        check_monitors(run, module, DATA)


def test_an_autoencoder_has_scores_of_its_own():
    run = SimpleNamespace(callbacks=[Reconstruct(), ModelCheckpoint(monitor="val/psnr")])
    check_monitors(run, AutoencoderModule(), None)
    run.callbacks[1].monitor = "val/rfid[inception]"
    with pytest.raises(UserError, match="did you mean val/rfid.shapes"):
        check_monitors(run, AutoencoderModule(), None)


def test_a_callback_of_the_user_may_log_any_score(module):
    check_monitors(trainer("val/mine", runs.StopAt(9)), module, DATA)


def test_a_value_of_training_is_looked_for_after_the_first_log():
    run = SimpleNamespace(
        callbacks=[ModelCheckpoint(monitor="train/los")],
        callback_metrics={"train/loss": torch.tensor(1.0), "val/x": torch.tensor(1.0)},
    )
    with pytest.raises(UserError, match="did you mean train/loss"):
        check_train_monitors(run)
    run.callbacks[0].monitor = "train/loss"
    check_train_monitors(run)


def test_a_run_with_a_wrong_monitor_stops_before_data_is_prepared(tmp_path, monkeypatch, capsys):
    def change(config: dict) -> None:
        config["trainer"]["callbacks"] = []

    monkeypatch.setattr("tf_lightning.data.Mixture.prepare_data", lambda self: pytest.fail("late"))
    config = runs.write_config(tmp_path, change)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "fit",
                "-c",
                str(config),
                "--checkpoint.monitor=val/text/perplexty",
                "--checkpoint.save_top_k=1",
            ]
        )
    assert stop.value.code == 1
    assert "did you mean val/text/perplexity?" in capsys.readouterr().err
