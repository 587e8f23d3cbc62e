"""A resumed run: hyper-parameters that change take effect, or are refused."""

import lightning as L
import pytest
import torch

from support.fits import (
    Rates,
    autoencoder_module,
    fit,
    image_data,
    shapes_data,
    shapes_module,
)
from tf_lightning.errors import UserError
from tf_lightning.training.optim import keep_options, lr_scale, with_schedule
from tf_lightning.training.resume import check_resumed

START = {"lr": 1e-3, "warmup_steps": 2, "min_lr_ratio": 0.1, "ema_decay": 0.5}


@pytest.fixture(scope="module", params=[False, True], ids=["adamw", "muon"])
def interrupted(request, tmp_path_factory):
    """A checkpoint after 3 of 6 steps, its data, and the optimizer it was trained with."""
    folder = tmp_path_factory.mktemp("resumed")
    trainer = fit(shapes_module(**START, muon=request.param), shapes_data(folder), max_steps=3)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder, request.param


class Groups(L.Callback):
    """Keeps the options of the optimizer at the first step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        """Read them once."""
        self.groups = getattr(self, "groups", [dict(group) for group in optimizer.param_groups])


def test_new_rates_and_decays_take_effect_when_a_run_resumes(interrupted):
    folder, muon = interrupted
    new = {"lr": 1e-5, "betas": (0.8, 0.9), "weight_decay": 0.3, "min_lr_ratio": 0.5}
    rates, groups = Rates(), Groups()
    module = shapes_module(**START | new, muon=muon)
    fit(module, shapes_data(folder), folder / "last.ckpt", max_steps=6, callbacks=[rates, groups])
    expected = [1e-5 * lr_scale(step, 2, 6, 0.5) for step in (3, 4, 5)]
    assert rates.used == pytest.approx(expected)
    assert {group["betas"] for group in groups.groups} == {(0.8, 0.9)}
    assert {group["weight_decay"] for group in groups.groups} == {0.0, 0.3}


def test_an_unchanged_run_resumes_with_the_same_rates(interrupted):
    folder, muon = interrupted
    rates = Rates()
    module = shapes_module(**START, muon=muon)
    fit(module, shapes_data(folder), folder / "last.ckpt", max_steps=6, callbacks=[rates])
    assert rates.used == [1e-3 * lr_scale(step, 2, 6, 0.1) for step in (3, 4, 5)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"prediction_type": "flow"}, "prediction_type=flow differs from the checkpoint's epsilon"),
        ({"text_lr_ratio": 0.5}, "text_lr_ratio=0.5 differs from the checkpoint's 1.0"),
        ({"ema_decay": 0.0}, "ema_decay=0.0 differs from the checkpoint's 0.5"),
        ({"causal_images": True}, "causal_images=True differs"),
    ],
)
def test_what_weights_or_state_depend_on_cannot_change(interrupted, changed, told):
    folder, muon = interrupted
    module = shapes_module(**START | {"muon": muon} | changed)
    with pytest.raises(UserError, match=told):
        fit(module, shapes_data(folder), folder / "last.ckpt", max_steps=6)


def test_only_changed_values_are_compared(caplog):
    saved = {"lr": 1.0, "betas": [0.9, 0.95], "unet": None, "transformer": {"dim": 8, "old": 1}}
    same = {"lr": 2.0, "betas": (0.9, 0.95), "unet": None, "transformer": {"dim": 8, "new": 2}}
    checkpoint = {"hyper_parameters": saved, "optimizer_states": []}
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    check_resumed(same, checkpoint, {"lr"})
    assert caplog.messages == ["The run goes on with lr=2.0 (the checkpoint has 1.0)."]
    with pytest.raises(UserError, match="transformer.dim=16 differs from the checkpoint's 8"):
        check_resumed({**same, "transformer": {"dim": 16}}, checkpoint, {"lr"})


@pytest.mark.parametrize("make", [(shapes_module, shapes_data), (autoencoder_module, image_data)])
def test_weights_alone_are_not_resumed(tmp_path, make):
    module, data = make
    trainer = fit(module(), data(tmp_path), max_steps=2)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(UserError, match="holds weights only .save_weights_only.*InitFrom"):
        fit(module(), data(tmp_path), tmp_path / "weights.ckpt", max_steps=3)


def test_the_state_of_an_optimizer_is_restored_but_not_its_options():
    def trained(lr: float, steps: int):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=lr)
        both = with_schedule(optimizer, lambda step: 1 / (1 + step))
        for _ in range(steps):
            weight.grad = torch.randn(3)
            optimizer.step()
            both["lr_scheduler"]["scheduler"].step()
        return optimizer, both["lr_scheduler"]["scheduler"]

    old, old_schedule = trained(0.1, 3)
    new, schedule = trained(0.2, 0)
    new.load_state_dict(old.state_dict())
    schedule.load_state_dict(old_schedule.state_dict())
    assert new.param_groups[0]["lr"] == pytest.approx(0.2 / 4)
    state, expected = new.state_dict()["state"][0], old.state_dict()["state"][0]
    assert torch.equal(state["exp_avg"], expected["exp_avg"]) and state["step"] == 3


def test_an_optimizer_with_other_groups_is_left_to_torch():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    keep_options(optimizer)
    other = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())


def test_an_autoencoder_may_resume_with_other_losses_but_not_with_another_network(tmp_path):
    trainer = fit(autoencoder_module(), image_data(tmp_path), max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rates, last = Rates(), tmp_path / "last.ckpt"
    module = autoencoder_module(lr=1e-5, kl_weight=0.1)
    fit(module, image_data(tmp_path), last, max_steps=3, callbacks=[rates])
    assert rates.used == pytest.approx([1e-5])
    with pytest.raises(UserError, match="gan_weight=0.0 differs from the checkpoint's 0.5"):
        fit(autoencoder_module(gan_weight=0.0), image_data(tmp_path), last, max_steps=3)
