"""The length of a run in steps, epochs or time, over which the learning rate decays."""

from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.callbacks import Timer

from support.fits import (
    QUIET,
    Rates,
    autoencoder_module,
    fit,
    image_data,
    shapes_data,
    shapes_module,
)
from tf_lightning.data import Mixture
from tf_lightning.data.stream import CYCLE, Rows
from tf_lightning.errors import UserError
from tf_lightning.training.horizon import epochs_to_steps, expected_steps, has_end
from tf_lightning.training.optim import lr_scale


def trainer_after(seconds: float, max_steps: int = -1, max_time: float | None = 100.0):
    """A stand-in for a trainer in which these seconds of training are over."""
    timers = []
    if max_time is not None:
        timers.append(Timer(timedelta(seconds=max_time), verbose=False))
        timers[0].load_state_dict({"time_elapsed": {"train": seconds}})
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(max_steps=max_steps, callbacks=timers, strategy=strategy)


def test_the_steps_of_a_run_are_its_max_steps_or_follow_from_the_time_so_far():
    assert expected_steps(trainer_after(50, max_steps=7), 3) == 7
    assert expected_steps(trainer_after(25), 10) == 40
    assert expected_steps(trainer_after(100), 30) == 30
    assert expected_steps(trainer_after(0), 0) == float("inf")
    assert expected_steps(trainer_after(0, max_time=None), 10) == float("inf")


def test_the_rate_of_a_run_limited_by_time_decays_over_the_time_after_the_warm_up():
    """10 steps take 10 of 100 s; the decay covers the other 90 s at any later pace."""
    for seconds, step, expected in ((10, 10, 1.0), (55, 55, 0.55), (100, 100, 0.1), (120, 90, 0.1)):
        end = expected_steps(trainer_after(seconds), step)
        assert lr_scale(step, 10, end, 0.1, "linear") == pytest.approx(expected)


def test_the_rate_of_a_run_without_limits_is_constant_after_the_warm_up():
    end = expected_steps(trainer_after(50, max_time=None), 20)
    assert lr_scale(20, 10, end, 0.1) == lr_scale(10**6, 10, end, 0.1) == 1
    assert has_end(trainer_after(0)) and not has_end(trainer_after(0, max_time=None))


def test_an_epoch_of_a_mixture_lasts_until_every_source_was_read_once():
    corpora = [SimpleNamespace(rows_per_epoch=n, fill=1.0) for n in (30, 700, 5)]
    for weights in ([1.0, 1.0, 0.0], [0.1, 0.9, 0.0], [30.0, 700.0, 5.0]):
        rows = Rows(corpora, weights)
        used = np.array(weights) > 0
        needed = np.array([30, 700, 5])[used]
        count = rows.rows_per_epoch
        assert (rows.before(count)[used] >= needed).all()
        assert not (rows.before(count - 1)[used] >= needed).all()
    assert Rows(corpora, [1.0, 1.0, 0.0]).rows_per_epoch == pytest.approx(1400, abs=2)
    many = SimpleNamespace(rows_per_epoch=3 * CYCLE, fill=1.0)
    assert Rows([many], [1.0]).rows_per_epoch == 3 * CYCLE


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_epochs": 3}, (8, None)),  # 15 rows an epoch, 6 rows a step: 7.5
        ({"max_epochs": 3, "max_steps": 5}, (5, None)),
        ({"max_epochs": 1, "max_steps": 5}, (3, None)),
        ({"max_steps": 5, "min_epochs": 1}, (5, 3)),
        ({"max_steps": 5, "min_steps": 2}, (5, 2)),
        ({"max_epochs": 3, "limit_train_batches": 2}, (6, None)),
        ({"max_epochs": 3, "limit_train_batches": 0.4}, (3, None)),
        ({"max_epochs": -1}, (-1, None)),
    ],
)
def test_epochs_are_counted_in_optimizer_steps_of_all_ranks(limits, steps, monkeypatch):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **limits)
    data = shapes_data(batch_size=3)
    monkeypatch.setattr(type(data), "rows_per_epoch", 15)
    monkeypatch.setattr(type(data), "world_size", 2)
    trainer.datamodule = data
    epochs_to_steps(trainer)
    assert (trainer.max_steps, trainer.min_steps) == steps
    assert (trainer.max_epochs, trainer.min_epochs) == (-1, 0)


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        ({}, 5),  # 30 rows an epoch, 6 rows a step
        ({"check_val_every_n_epoch": 2}, 10),
        ({"val_check_interval": 0.4}, 2),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, 7),
    ],
)
def test_validations_in_epochs_count_epochs_of_the_data(options, interval, monkeypatch):
    for limit in ({"max_epochs": 3}, {"max_time": "00:01:00:00"}):
        trainer = L.Trainer(accelerator="cpu", **QUIET, **limit, **options)
        trainer.datamodule = shapes_data(batch_size=3)
        monkeypatch.setattr(Mixture, "rows_per_epoch", 30)
        monkeypatch.setattr(Mixture, "world_size", 2)
        epochs_to_steps(trainer)
        assert trainer.val_check_interval == interval
        assert trainer.check_val_every_n_epoch is None


def test_validations_that_never_come_are_refused(tmp_path):
    with pytest.raises(UserError, match="check_val_every_n_epoch=2 never validates"):
        fit(shapes_module(), shapes_data(tmp_path), max_steps=4, check_val_every_n_epoch=2)


def test_a_run_of_two_epochs_ends_after_them_with_the_last_rate(tmp_path):
    data, rates = shapes_data(tmp_path), Rates()
    module = shapes_module(lr=1e-3, warmup_steps=2, min_lr_ratio=0.1, lr_decay="linear")
    trainer = fit(module, data, max_epochs=2, callbacks=[rates])
    steps = -(-2 * data.rows_per_epoch // data.batch_size)
    assert trainer.global_step == steps and all(n >= 2 for n in data.epochs().values())
    expected = [1e-3 * lr_scale(step, 2, steps, 0.1, "linear") for step in range(steps)]
    assert rates.used == pytest.approx(expected)


def test_a_run_limited_by_time_keeps_its_rate_after_the_warm_up(tmp_path):
    """Far from its end; it ends by another callback."""
    rates = Rates(stop_after=6)
    module = shapes_module(lr=1e-3, warmup_steps=2, min_lr_ratio=0.0)
    fit(module, shapes_data(tmp_path), max_time="01:00:00:00", callbacks=[rates])
    assert rates.used == pytest.approx([5e-4, *[1e-3] * 5], rel=1e-4)


def test_an_autoencoder_trains_for_epochs_and_refuses_noise_that_would_never_come(tmp_path):
    rates = Rates()
    module = autoencoder_module(lr=1e-3, min_lr_ratio=0.1)
    trainer = fit(module, image_data(tmp_path), max_epochs=2, callbacks=[rates])
    assert trainer.global_step == 6  # 6 images, 2 a step
    assert rates.used == pytest.approx([1e-3 * lr_scale(step, 1, 6, 0.1) for step in range(6)])
    with pytest.raises(UserError, match="gan_start_step=9 is not before the last step"):
        fit(autoencoder_module(gan_start_step=9), image_data(tmp_path), max_epochs=2)
    with pytest.raises(UserError, match="latent_noise=0.2 grows .* has no end"):
        fit(autoencoder_module(), image_data(tmp_path), max_epochs=-1)
