"""The length of a run in steps, epochs or time, over which the learning rate decays."""

import math
import warnings
from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
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
from tf_lightning.autoencoder.network import row_noise
from tf_lightning.data import Mixture
from tf_lightning.data.stream import CYCLE, Rows
from tf_lightning.errors import UserError
from tf_lightning.training import autoencoder, horizon
from tf_lightning.training.horizon import epochs_to_steps, expected_steps, has_end
from tf_lightning.training.optim import lr_scale


class Validated(L.Callback):
    """Keeps the steps at which a run validates."""

    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, module):
        self.steps.append(trainer.global_step)


def trainer_after(seconds: float, max_steps: int = -1, max_time: float | None = 100.0, **more):
    """A stand-in for a trainer in which these seconds of training are over."""
    timers = []
    if max_time is not None:
        timers.append(Timer(timedelta(seconds=max_time), verbose=False))
        timers[0].load_state_dict({"time_elapsed": {"train": seconds}})
    strategy = SimpleNamespace(broadcast=lambda value: value)
    how = {"max_steps": max_steps, "min_steps": None} | more
    return SimpleNamespace(callbacks=timers, strategy=strategy, **how)


def test_the_steps_of_a_run_are_its_max_steps_or_follow_from_the_time_so_far():
    assert expected_steps(trainer_after(50, max_steps=7, max_time=None), 3) == 7
    assert expected_steps(trainer_after(25), 10) == 40
    assert expected_steps(trainer_after(100), 30) == 30
    assert expected_steps(trainer_after(0), 0) == expected_steps(trainer_after(5), 0) == math.inf
    assert expected_steps(trainer_after(0, max_time=None), 10) == float("inf")


def test_a_run_ends_at_the_earlier_of_its_steps_and_its_time():
    assert expected_steps(trainer_after(25, max_steps=50), 10) == 40
    assert expected_steps(trainer_after(25, max_steps=30), 10) == 30
    assert expected_steps(trainer_after(0, max_steps=30), 0) == 30
    assert expected_steps(trainer_after(25, min_steps=45), 10) == 45
    assert expected_steps(trainer_after(25, max_steps=50, min_steps=20), 10) == 40
    both = trainer_after(25)
    both.callbacks.append(Timer(timedelta(seconds=50), verbose=False))
    both.callbacks[-1].load_state_dict({"time_elapsed": {"train": 25}})
    assert expected_steps(both, 10) == 20


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
        ({"max_epochs": 3}, (9, None)),  # 15 rows an epoch, 6 rows a step: 2.5, rounded up
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
        ({"val_check_interval": 0.5}, 2),  # 2.5: the second half would end after the epoch
        ({"val_check_interval": 0.01}, 1),
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
    steps = 2 * -(-data.rows_per_epoch // data.batch_size)
    assert trainer.global_step == steps and all(n >= 2 for n in data.epochs().values())
    expected = [1e-3 * lr_scale(step, 2, steps, 0.1, "linear") for step in range(steps)]
    assert rates.used == pytest.approx(expected)


def test_a_run_limited_by_time_keeps_its_rate_after_the_warm_up(tmp_path):
    """Far from its end; it ends by another callback."""
    rates = Rates(stop_after=6)
    module = shapes_module(lr=1e-3, warmup_steps=2, min_lr_ratio=0.0)
    fit(module, shapes_data(tmp_path), max_time="01:00:00:00", callbacks=[rates])
    assert rates.used == pytest.approx([5e-4, *[1e-3] * 5], rel=1e-4)


class Clock(Rates):
    """Lets each step take 10 s of the time that Lightning's Timer counts."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now = 0.0
        monkeypatch.setattr(Timer, "time_elapsed", lambda timer, stage=None: self.now)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.now = 10.0 * (trainer.global_step + 1)


@pytest.mark.parametrize(("max_steps", "end"), [(40, 10), (6, 6), (-1, 10)])
@pytest.mark.parametrize("kind", ["transfusion", "autoencoder"])
def test_the_rate_decays_over_the_earlier_of_time_and_steps(
    tmp_path, monkeypatch, kind, max_steps, end
):
    """100 s are over after 10 steps."""
    options = {"lr": 1e-3, "warmup_steps": 2, "min_lr_ratio": 0.1}
    if kind == "transfusion":
        module, data = shapes_module(**options), shapes_data(tmp_path)
    else:
        module, data = autoencoder_module(**options), image_data(tmp_path)
    clock = Clock(monkeypatch)
    limits = {"max_steps": max_steps, "max_time": "00:00:01:40"}
    trainer = fit(module, data, callbacks=[clock], **limits)
    assert trainer.global_step == end
    expected = [1e-3 * lr_scale(step, 2, end, 0.1) for step in range(end)]
    assert clock.used == pytest.approx(expected)


def test_epochs_and_time_limit_a_run_together(tmp_path, monkeypatch):
    clock, module = Clock(monkeypatch), autoencoder_module(lr=1e-3, min_lr_ratio=0.1)
    options = {"callbacks": [clock], "max_time": "00:00:00:50", "max_epochs": 3}
    trainer = fit(module, image_data(tmp_path), **options)  # 3 steps an epoch
    assert trainer.global_step == 5
    assert clock.used == pytest.approx([1e-3 * lr_scale(step, 1, 5, 0.1) for step in range(5)])


def test_the_latent_noise_grows_over_a_third_of_the_expected_steps_known_before_the_forward(
    tmp_path, monkeypatch
):
    """The ranks agree on the end of the run once a step, and never within a forward pass."""
    calls, strengths, module = [], [], autoencoder_module(latent_noise=0.3, gan_weight=0.0)
    state = {"inside": False}

    def ends_after_20(trainer: L.Trainer, step: int) -> float:
        assert not state["inside"]
        calls.append(step)
        return 20.0

    def add(latents, std, strength, noise):
        strengths.append((strength, latents.detach()))
        return latents

    def step(batch, batch_index, original=module.training_step):
        state["inside"] = True
        loss = original(batch, batch_index)
        state["inside"] = False
        return loss

    monkeypatch.setattr(horizon, "expected_steps", ends_after_20)
    monkeypatch.setattr(autoencoder, "add_latent_noise", add)
    monkeypatch.setattr(module, "training_step", step)
    fit(module, image_data(tmp_path), max_steps=4, accumulate_grad_batches=2)
    assert calls == [0, 1, 2, 3, 4] and len(strengths) == 8
    for number, (strength, like) in enumerate(strengths):
        share = row_noise(like, torch.arange(2 * number, 2 * number + 2), module.hparams.seed)[2]
        torch.testing.assert_close(strength, 0.3 * 3 * (number // 2) / 20 * share)


def test_a_run_that_ends_before_its_first_validation_validates_at_its_last_step(tmp_path):
    validated = Validated()
    options = {"limit_val_batches": 1, "callbacks": [validated], "num_sanity_val_steps": 0}
    options |= {"val_check_interval": 90, "max_steps": 3, "check_val_every_n_epoch": None}
    message = r"trainer.val_check_interval=90 is after the last step \(3\)"
    with pytest.warns(UserWarning, match=message) as told:
        trainer = L.Trainer(accelerator="cpu", **QUIET | options)
        trainer.fit(shapes_module(warmup_steps=2), shapes_data(tmp_path))
    assert validated.steps == [3]
    assert len([one for one in told if "val_check_interval" in str(one.message)]) == 1


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"val_check_interval": 6}])
def test_nothing_is_told_without_validations_or_with_one(options):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, **QUIET | {"val_check_interval": 7} | options
    )
    trainer.datamodule = shapes_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs_to_steps(trainer)


def test_the_last_validation_of_a_run_of_epochs_is_after_its_last_step(tmp_path):
    """1.5 steps an epoch, rounded up to 2."""
    validated, data = Validated(), image_data(tmp_path, batch_size=4)
    options = {"limit_val_batches": 1, "callbacks": [validated], "num_sanity_val_steps": 0}
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, **QUIET | options)
    trainer.fit(autoencoder_module(gan_weight=0.0), data)  # 6 images, 4 a step
    assert trainer.global_step == 6 and validated.steps == [2, 4, 6]


@pytest.mark.parametrize("module", [shapes_module, autoencoder_module])
def test_a_warm_up_that_the_run_does_not_finish_is_told(tmp_path, module):
    data = shapes_data(tmp_path) if module is shapes_module else image_data(tmp_path)
    message = r"model.warmup_steps=2 does not end before the last step \(2\)"
    with pytest.warns(UserWarning, match=message):
        trainer = L.Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, **QUIET)
        trainer.fit(module(warmup_steps=2), data)
    trainer = SimpleNamespace(max_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        horizon.check_warmup(trainer, 2)


def test_a_run_that_ends_before_its_first_log_is_told():
    trainer = SimpleNamespace(loggers=["a logger"], log_every_n_steps=25, max_steps=24)
    with pytest.warns(UserWarning, match=r"trainer.log_every_n_steps=25 is after .* \(24\)"):
        horizon.check_logging(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in ({"max_steps": 25}, {"max_steps": -1}, {"max_steps": 24, "loggers": []}):
            horizon.check_logging(SimpleNamespace(**vars(trainer) | other))


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
