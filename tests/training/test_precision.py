"""Precisions and clipping: each gives what fp32 gives, up to its rounding, or is refused."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from support.fits import (
    QUIET,
    Rates,
    autoencoder_module,
    fit,
    image_data,
    shapes_data,
    shapes_module,
)
from tf_lightning.errors import UserError
from tf_lightning.training.precision import PRECISIONS, clip_gradients, loss_scale

NAME = "train/gan_scale"
ROUNDING = {"64-true": 1e-5, "16-mixed": 2e-3, "bf16-mixed": 2e-2}
MODELS = {"adamw": {}, "muon": {"muon": True}, "text": {"text_lr_ratio": 0.5}}


def losses_and_norms(folder, precision: str, clip: tuple, **changed) -> Rates:
    """A run of 6 steps; on a CPU, Lightning gives a GradScaler only to a plugin."""
    plugin = [MixedPrecision("16-mixed", "cpu")] if precision == "16-mixed" else []
    how = {"plugins": plugin} if plugin else {"precision": precision}
    rates, (limit, algorithm) = Rates(), clip
    module = shapes_module(lr=3e-3, warmup_steps=1, ema_decay=0.5, **changed)
    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    fit(module, shapes_data(folder), max_steps=6, callbacks=[rates], **options, **how)
    rates.net, rates.ema = module.net, module.ema
    return rates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("clip", [(0.5, "norm"), (1e-2, "value")], ids=["norm", "value"])
@pytest.mark.parametrize("model", MODELS)
def test_every_precision_trains_as_fp32_does_up_to_its_rounding(folder, model, clip):
    exact = losses_and_norms(folder, "32-true", clip, **MODELS[model])
    for precision, rounding in ROUNDING.items():
        other = losses_and_norms(folder, precision, clip, **MODELS[model])
        assert other.losses == pytest.approx(exact.losses, rel=rounding)
        assert other.norms == pytest.approx(exact.norms, rel=10 * rounding)
        dtypes = {p.dtype for net in (other.net, other.ema) for p in net.parameters()}
        assert dtypes == {torch.double if precision == "64-true" else torch.float}


def test_an_autoencoder_and_its_discriminator_train_in_fp16_as_in_fp32(folder):
    """The adaptive weight of the GAN is a ratio of gradients that are tiny in fp16."""

    class Scales(Rates):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            found = float(trainer.callback_metrics.get(NAME, 1))
            self.scales = [*getattr(self, "scales", []), found]
            weights = [w for w in module.discriminator.parameters() if w.grad is not None]
            self.clipped = [weight.grad.clone() for weight in weights]

    runs = {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # so that no step overflows
    half = [MixedPrecision("16-mixed", "cpu", scaler)]
    for precision, plugins in (("32-true", []), ("16-mixed", half)):
        runs[precision] = rates = Scales()
        options = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
        module, data = autoencoder_module(lr=1e-3), image_data(folder, batch_size=1)
        fit(module, data, max_steps=2, plugins=plugins or None, callbacks=[rates], **options)
    exact, half = runs.values()
    assert half.losses == pytest.approx(exact.losses, rel=1e-2)
    assert half.norms == pytest.approx(exact.norms, rel=5e-2)
    assert half.scales == pytest.approx(exact.scales, rel=5e-2) and exact.scales[-1] != 1
    largest = max(gradient.abs().max() for gradient in half.clipped)
    assert largest == pytest.approx(1e-4)


def test_precisions_that_round_weights_are_refused_before_any_data_is_prepared(tmp_path):
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(UserError, match=f"precision={precision} is not supported.*32-true"):
            fit(shapes_module(), shapes_data(tmp_path), max_steps=1, precision=precision)


def test_negative_clipping_is_refused(tmp_path):
    for limit in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="gradient_clip_val=.* must be at least 0"):
            fit(shapes_module(), shapes_data(tmp_path), max_steps=1, gradient_clip_val=limit)


def test_every_supported_precision_is_tested():
    assert set(PRECISIONS) == {"32-true", *ROUNDING}


def test_the_loss_scale_is_that_of_the_grad_scaler():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=512.0))
    assert loss_scale(L.Trainer(accelerator="cpu", plugins=[plugin], **QUIET)) == 512.0
    assert loss_scale(L.Trainer(accelerator="cpu", **QUIET)) == 1.0


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_network_without_gradients_is_not_clipped(algorithm):
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0, algorithm) == 0


GRADIENT = torch.tensor([3.0, -4.0])


@pytest.mark.parametrize(
    ("limit", "algorithm", "expected"),
    [
        (None, None, [3.0, -4.0]),
        (0, "value", [3.0, -4.0]),
        (1.0, None, [0.6, -0.8]),
        (1.0, "norm", [0.6, -0.8]),
        (3.5, "value", [3.0, -3.5]),
    ],
)
def test_gradients_are_clipped_by_their_norm_or_by_value(limit, algorithm, expected):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = GRADIENT.clone()
    norm = clip_gradients([weight], limit, algorithm)
    assert norm == pytest.approx(5.0)
    assert weight.grad.tolist() == pytest.approx(expected, rel=1e-5)
