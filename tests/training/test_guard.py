"""Steps that are not finite are left out, end the run when they go on, and are never saved."""

import copy
from collections import deque
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from support import autoencoder_runs as aruns
from support import fits
from support.compare import bit_equal
from support.sources import GreyImages, RepeatedWord
from support.tiny import SIZES, tiny_module
from tf_lightning.checkpoint import select_weights
from tf_lightning.cli.main import main
from tf_lightning.data.stream import as_batches
from tf_lightning.errors import UserError
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training import guard
from tf_lightning.training.guard import StepGuard, floating_tensors
from tf_lightning.training.module import Transfusion
from tf_lightning.training.optim import MuonAdamW


class Inject(L.Callback):
    """Spoils some steps, and keeps the weights, the optimizer and the average after each."""

    def __init__(self, what: str, steps: range):
        self.what, self.steps, self.states, self.counts = what, steps, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step not in self.steps:
            return
        if self.what == "latent":  # of one batch of the step
            next(part for part in as_batches(batch) if part.num_images).latents.view(-1)[0] = (
                torch.nan
            )
        if self.what == "weight":
            pl_module.net.transformer.norm.weight.data[0] = torch.inf

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.what == "gradient" and trainer.global_step in self.steps:
            pl_module.net.transformer.norm.weight.grad[0] = torch.nan
        if self.what == "spike" and trainer.global_step in self.steps:
            pl_module.net.transformer.norm.weight.grad[0] = 1e6

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = pl_module.state_dict(), trainer.optimizers[0].state_dict()["state"]
        self.states.append(copy.deepcopy(state))
        self.counts.append(trainer.logged_metrics["train/steps_left_out"].item())


@pytest.fixture
def fit(mixture, tmp_path):
    """A function that trains a tiny model on pictures; returns its trainer."""

    def train(
        callback: L.Callback, max_steps: int = 8, accumulate: int = 1, plugins=None, **options
    ) -> L.Trainer:
        L.seed_everything(0)
        config = TransformerConfig(vocab_size=300, **SIZES)
        module = Transfusion(config, 4, 3, warmup_steps=1, lr=1e-3, ema_decay=0.5, **options)
        sources = {"pictures": GreyImages(), "words": RepeatedWord("red", 5)}
        data = mixture(sources, {"pictures": 0.8, "words": 0.2}, batch_size=4)
        how = {"gradient_clip_val": 1.0, "log_every_n_steps": 1, "default_root_dir": tmp_path}
        how |= {"accumulate_grad_batches": accumulate, "plugins": plugins}
        return fits.fit(module, data, max_steps=max_steps, callbacks=[callback], **how)

    return train


@pytest.mark.parametrize("what", ["latent", "gradient"])
@pytest.mark.parametrize("muon", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(fit, what, muon):
    callback = Inject(what, range(3, 5))
    fit(callback, muon=muon)
    assert callback.counts == [0, 0, 0, 1, 2, 2, 2, 2]
    for step, state in enumerate(callback.states[1:], 1):
        assert bit_equal(state, callback.states[step - 1]) == (step in (3, 4)), step
    assert all(x.isfinite().all() for _, x in floating_tensors(callback.states[-1]))


@pytest.mark.parametrize(
    ("what", "muon"), [("latent", False), ("gradient", False), ("latent", True)]
)
def test_optimizers_leave_out_the_same_steps_without_the_host(fit, monkeypatch, what, muon):
    callbacks = []
    for on_device in (False, True):
        monkeypatch.setattr(StepGuard, "can_mark", lambda *_, on_device=on_device: on_device)
        callbacks.append(Inject(what, range(3, 5)))
        trainer = fit(callbacks[-1], muon=muon)
    assert callbacks[1].counts == [0, 0, 0, 1, 2, 2, 2, 2]
    for states in zip(*(callback.states for callback in callbacks), strict=True):
        assert bit_equal(*states)
    guard_state = trainer.lightning_module.guard.state_dict()
    assert guard_state == {"left_out": 2, "in_a_row": 0, "norms": []}


def test_marked_steps_end_the_run_when_the_trainer_logs(fit, monkeypatch):
    monkeypatch.setattr(StepGuard, "can_mark", lambda *_: True)
    callback = Inject("gradient", range(2, 8))
    with pytest.raises(UserError, match=r"in 3 steps in a row \(steps 3 to 5, rows 8 to 19"):
        fit(callback, max_bad_steps=3)
    assert len(callback.states) == 4


def adamw(fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.zeros(1)], fused=fused)


MUON = MuonAdamW([{"params": [torch.zeros(1)]}], 1e-3, (0.9, 0.95), bf16=False)


@pytest.mark.parametrize(
    ("optimizer", "device", "spike_sigma", "scaler", "marks"),
    [
        (adamw(True), "cuda", None, None, True),
        (MUON, "cuda", None, None, True),
        (adamw(False), "cuda", None, None, False),
        (adamw(True), "cpu", None, None, False),
        (adamw(True), "cuda", 3.0, None, False),
        (MUON, "cuda", None, "scaler", False),
    ],
)
def test_where_the_optimizer_leaves_out_steps_by_itself(
    optimizer, device, spike_sigma, scaler, marks
):
    plugin = SimpleNamespace(scaler=scaler)
    trainer = SimpleNamespace(optimizers=[optimizer], precision_plugin=plugin)
    norm = SimpleNamespace(is_cuda=device == "cuda")
    assert StepGuard(5, spike_sigma).can_mark(trainer, norm) == marks


def test_steps_that_are_not_finite_end_the_run_with_their_rows(fit):
    callback = Inject("gradient", range(2, 8))
    told = r"in 3 steps in a row \(steps 3 to 5, rows 8 to 19 of the data\)"
    with pytest.raises(UserError, match=told):
        fit(callback, max_bad_steps=3)
    assert len(callback.states) == 4


@pytest.mark.parametrize("what", ["latent", "gradient"])
def test_accumulated_steps_are_left_out_as_a_whole_and_named_with_all_their_rows(fit, what):
    callback = Inject(what, range(1, 8))
    with pytest.raises(UserError, match=r"steps 2 to 3, rows 12 to 35 of the data"):
        fit(callback, accumulate=3, max_bad_steps=2)  # 4 rows a batch
    assert callback.counts == [0, 1] and bit_equal(*callback.states)


def test_overflows_while_fp16_finds_its_scale_do_not_end_the_run(fit):
    """The trainer halves the scale after each; their loss is finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    callback = Inject("none", range(0))
    fit(callback, 16, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_bad_steps=2)
    overflows = int(callback.counts[-1])
    assert 2 < overflows < 14 and scaler.get_scale() == 2.0 ** (30 - overflows)
    assert callback.counts == [*range(1, overflows + 1), *[overflows] * (16 - overflows)]
    assert bit_equal(callback.states[0], callback.states[overflows - 1])
    assert not bit_equal(callback.states[overflows - 1], callback.states[overflows])


def test_a_loss_that_is_not_finite_ends_a_run_in_fp16(fit):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    callback = Inject("latent", range(1, 8))
    with pytest.raises(UserError, match="in 3 steps in a row"):
        fit(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_bad_steps=3)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("wrong", ["loss", "norm"])
def test_all_ranks_count_a_step_that_is_not_finite_on_one_of_them(monkeypatch, scale, wrong):
    """Two ranks, one after the other; each hears what the other decides from its own values."""
    values = {"loss": torch.tensor(1.0), "norm": torch.tensor(2.0)}
    spoilt = values | {wrong: torch.tensor(torch.nan)}
    monkeypatch.setattr(guard, "loss_scale", lambda trainer: scale)
    guards, ranks = [StepGuard(), StepGuard()], [values, spoilt]
    for each, mine, other in zip(guards, ranks, ranks[::-1], strict=True):
        theirs = iter([False, other["loss"].isfinite().item()])
        strategy = SimpleNamespace(
            reduce_boolean_decision=lambda flag, all, theirs=theirs: next(theirs) and flag
        )
        module = SimpleNamespace(
            trainer=SimpleNamespace(strategy=strategy),
            zero_grad=lambda: None,
            log=lambda *_, **__: None,
        )
        each.check(module, mine["loss"], mine["norm"])
        assert each.leaves_out and each.left_out == 1
    search = scale > 1 and wrong == "norm"
    assert [each.in_a_row for each in guards] == [0 if search else 1] * 2


def test_weights_that_are_not_finite_are_not_saved(fit, tmp_path):
    trainer = fit(Inject("none", range(0)), max_steps=2)
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    good = (tmp_path / "good.ckpt").read_bytes()
    weight = trainer.lightning_module.ema.transformer.norm.weight.data
    weight[0] = torch.inf
    with pytest.raises(UserError, match="1 weights .* state_dict.ema.transformer.norm.weight; no"):
        trainer.save_checkpoint(tmp_path / "good.ckpt")
    weight[0] = 1
    next(iter(trainer.optimizers[0].state.values()))["exp_avg_sq"][0] = torch.inf
    with pytest.raises(UserError, match="optimizer_states.0.state.0.exp_avg_sq; no checkpoint is"):
        trainer.save_checkpoint(tmp_path / "good.ckpt")
    assert (tmp_path / "good.ckpt").read_bytes() == good


def test_a_large_gradient_is_left_out_where_asked(fit, monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", 4)
    usual, careful = Inject("spike", range(6, 7)), Inject("spike", range(6, 7))
    fit(usual)
    fit(careful, spike_sigma=20.0)
    assert usual.counts[-1] == 0 and careful.counts == [0] * 6 + [1, 1]
    assert bit_equal(careful.states[6], careful.states[5])
    assert not bit_equal(usual.states[6], usual.states[5])


def test_gradients_that_stay_large_become_usual(monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", 10)
    each = StepGuard(5, 3.0)
    each.norms = deque([1.0, 1.2] * 5, maxlen=10)
    left_out = [each.is_spike(4.0) for _ in range(30)]
    assert left_out[0] and not any(left_out[20:])
    single = StepGuard(5, 3.0)
    single.norms = deque([1.0, 1.2] * 5, maxlen=10)
    assert single.is_spike(1e6) and single.is_spike(2.5) and not single.is_spike(1.1)


def test_the_guard_continues_from_a_checkpoint():
    first, second = StepGuard(5, 3.0), StepGuard(5, 3.0)
    first.left_out, first.in_a_row = 7, 2
    first.norms.extend([1.0] * 60 + [2.0] * 60)  # the window keeps the last 100
    second.load_state_dict(first.state_dict())
    assert (second.left_out, second.in_a_row) == (7, 2)
    mean, std = 1.6, (0.6 * 0.4 * 100 / 99) ** 0.5
    assert not first.is_spike(mean + 2.99 * std) and second.is_spike(mean + 3.01 * std)
    assert second.norms[-1] == pytest.approx(mean + 3 * std)
    assert not StepGuard(5, None).is_spike(1e9)


# Most of 2,000 codes are unused, so they restart in every other step.
MANY_CODES = aruns.VQ | {"network": {"num_codes": 2000, "code_dim": 3}}


@pytest.mark.parametrize("options", [{}, MANY_CODES], ids=["vae", "vq"])
def test_an_autoencoders_step_that_is_not_finite_changes_nothing(tmp_path, options):
    def often(config: dict) -> None:
        config["trainer"] |= {"max_steps": 5, "limit_val_batches": 0}
        config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
        config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 1

    config = aruns.write_config(tmp_path, often, **options)
    spoil = "--trainer.callbacks+=support.autoencoder_runs.Spoil"
    main(["fit", "-c", str(config), spoil])
    states = [
        torch.load(tmp_path / "run" / "checkpoints" / f"step000000{step}.ckpt", weights_only=True)
        for step in (3, 4, 5)
    ]
    assert not bit_equal(states[1]["state_dict"], states[2]["state_dict"])
    for part in ("state_dict", "optimizer_states"):
        assert bit_equal(states[0][part], states[1][part]), part
    assert [state["step_guard"]["left_out"] for state in states] == [0, 1, 1]


def test_weights_of_a_checkpoint_that_are_not_finite_are_refused():
    """So `export`, `generate` and InitFrom refuse them."""
    weights = tiny_module().state_dict()
    select_weights(weights)
    weights["ema.transformer.norm.weight"][0] = torch.nan
    with pytest.raises(UserError, match="1 of the .* the first is transformer.norm.weight"):
        select_weights(weights)
    select_weights(weights, "raw")
