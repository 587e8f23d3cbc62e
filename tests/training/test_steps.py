"""An optimizer step of several batches: means over all of them, places of saving, settings."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor

from support.fits import autoencoder_module, shapes_module
from support.sources import GreyImages, RepeatedWord
from support.tiny import IMAGE_CODES, SIZES, TOKENIZER, document, packed, tiny_module
from tf_lightning.autoencoder.losses import ReconstructionLoss
from tf_lightning.batch import Batch, pack
from tf_lightning.data.image_only import ImageBatch
from tf_lightning.data.stream import as_batches
from tf_lightning.errors import UserError
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training import steps
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

# Means


def one_process(module: L.LightningModule, monkeypatch) -> dict[str, Tensor]:
    """Let a module's training_step run outside a trainer; return what it will log."""
    logged: dict[str, Tensor] = {}
    strategy = SimpleNamespace(backward=lambda loss, optimizer: loss.backward())
    trainer = SimpleNamespace(
        world_size=1, strategy=strategy, global_step=7, max_steps=20, callbacks=[]
    )
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(type(module), "global_step", trainer.global_step)
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    return logged


def step(module: L.LightningModule, batches: list, logged: dict) -> tuple[dict, dict]:
    """Gradients and logged values of a step."""
    loss = module.training_step(batches if len(batches) > 1 else batches[0], 0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    return gradients, dict(logged)


def assert_same_steps(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    """Assert that the gradients and logged values of two steps are equal to 1e-6."""
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert (value - theirs[name]).norm() <= 1e-6 * value.norm(), name
    assert all(gradient.any() for gradient in one[0].values())


@pytest.fixture
def double():
    """Compute in double precision, so that rounding does not hide a wrong formula."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


ROWS = [[document("3i7", 1)], [document("9", 2)], [document("i", 3)], [document("2", 4)]]


def in_double(batch: Batch) -> Batch:
    return batch._map(lambda x: x.double() if x.is_floating_point() else x)


def split(sizes: tuple[int, ...]) -> list[range]:
    """Consecutive ranges of these sizes."""
    return [range(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
@pytest.mark.parametrize("changed", [{"z_loss_weight": 0.1}, {"learned_sigma": True}])
def test_batches_of_a_step_give_the_gradients_and_losses_of_one_batch(
    double, monkeypatch, sizes, changed
):
    """Rows with many, few and no text targets, with and without an image."""
    module = tiny_module(diffusion_weight=3.0, **changed).double()
    logged = one_process(module, monkeypatch)
    whole, *parts = (
        in_double(packed([ROWS[n] for n in numbers], 24, row_ids=list(numbers)))
        for numbers in (range(4), *split(sizes))
    )
    assert {part.num_images > 0 for part in parts} == {True, False} or len(parts) == 2
    assert_same_steps(step(module, [whole], logged), step(module, parts, logged))


def test_batches_of_codes_give_the_gradients_and_losses_of_one_batch(double, monkeypatch):
    config = TransformerConfig(vocab_size=TOKENIZER.vocab_size, **SIZES)
    module = Transfusion(config, patch_size=1, num_codes=11, z_loss_weight=0.1)
    module.configure_model()
    module.double()
    logged = one_process(module, monkeypatch)
    whole = [[[IMAGE_CODES], [torch.tensor([5, 6]), IMAGE_CODES]], [[torch.tensor([7, 8, 9])]]]
    batches = [
        pack(rows, list(range(len(rows))), tokenizer=TOKENIZER, row_length=20, patch_size=1)
        for rows in (whole, whole[:1], whole[1:])
    ]
    assert len(batches[2].code_index) == 0 < len(batches[1].code_index)
    assert_same_steps(step(module, batches[:1], logged), step(module, batches[1:], logged))


def images(rows: range) -> ImageBatch:
    """Images of different contrast."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    drawn = drawn * torch.tensor([0.1, 0.9, 0.3, 0.5]).view(4, 1, 1, 1)
    return ImageBatch(drawn[list(rows)], torch.tensor(rows))


@pytest.mark.parametrize(
    "changed", [{"latent_noise": 0.3, "kl_weight": 0.1}, {"network": {"num_codes": 8}}]
)
@pytest.mark.parametrize("gan_start_step", [0, 10])  # before and after step 7
def test_batches_of_images_give_the_gradients_and_losses_of_one_batch(
    double, monkeypatch, changed, gan_start_step
):
    """With the scale of the adversarial loss, the unit of the noise and restarted codes."""
    sizes = {"channels": (4, 8), "layers_per_block": 1, "latent_channels": 2, "norm_groups": 2}
    sizes |= {"mid_attention": False, "code_dim": 2} | changed.get("network", {})
    results = []
    for parts in ((4,), (2, 2), (1, 1, 1, 1)):
        torch.manual_seed(0)
        module = AutoencoderModule(
            **{"network": sizes, "lpips_weight": 0.0, "gan_start_step": gan_start_step}
            | {name: value for name, value in changed.items() if name != "network"}
        )
        module.configure_model()
        module.reconstruction_loss = ReconstructionLoss()
        logged = one_process(module.double(), monkeypatch)
        found = step(module, [images(rows) for rows in split(parts)], logged)
        if gan_start_step:  # the discriminator's gradient is dropped before it starts
            for name in [name for name in found[0] if name.startswith("discriminator")]:
                assert not found[0].pop(name).any()
        results.append((found, module.state_dict()))
    for found, state in results[1:]:
        assert_same_steps(results[0][0], found)
        for name, value in state.items():  # restarted codes, counts of idle steps
            torch.testing.assert_close(value, results[0][1][name], msg=name)


# Places of saving


class Recorder(L.Callback):
    """Records the text of the rows, the loss and the validations of each step; saves between."""

    def __init__(self, folder=None, save_at: int = 0):
        self.rows, self.losses, self.validated = [], [], []
        self.folder, self.save_at = folder, save_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append(torch.cat([part.input_ids for part in as_batches(batch)]))
        self.losses.append(trainer.logged_metrics["train/loss"].item())

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.folder / "validated.ckpt")


@pytest.fixture
def fit(mixture, tmp_path):
    """A function that trains a tiny model; returns the Recorder and the module."""

    def train(
        batch_size: int,
        accumulate: int,
        *callbacks,
        resume: str | None = None,
        num_workers: int = 0,
        **arguments,
    ) -> tuple[Recorder, Transfusion]:
        L.seed_everything(0)
        config = TransformerConfig(vocab_size=300, **SIZES)
        module = Transfusion(config, patch_size=4, latent_channels=3, warmup_steps=1, lr=1e-2)
        sources = {"words": RepeatedWord("red", 5), "pictures": GreyImages()}
        data = mixture(sources, {"words": 0.5, "pictures": 0.5}, batch_size=batch_size)
        data.num_workers = num_workers
        recorder = Recorder(tmp_path, save_at=3)
        trainer = L.Trainer(
            **{"accelerator": "cpu", "max_steps": 6, "default_root_dir": tmp_path}
            | {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            | {"num_sanity_val_steps": 0, "limit_val_batches": 1, "log_every_n_steps": 1}
            | {"use_distributed_sampler": False, "precision": "64-true", "val_check_interval": 3}
            | {"check_val_every_n_epoch": None, "accumulate_grad_batches": accumulate}
            | {"callbacks": [recorder, *callbacks], "enable_checkpointing": bool(callbacks)}
            | arguments
        )
        trainer.fit(module, data, ckpt_path=resume and tmp_path / resume, weights_only=True)
        assert trainer.accumulate_grad_batches == accumulate
        assert data.next_row() - data._first_row == len(recorder.rows) * batch_size * accumulate
        return recorder, module

    return train


def saver(folder) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=3,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )


@pytest.mark.parametrize("saved", [(4, 1), (2, 2), (1, 4)])
def test_a_run_resumes_the_same_rows_with_another_division_of_its_steps(fit, tmp_path, saved):
    """Saved after a step and at the end of its validation."""
    whole, expected = fit(4, 1)
    first, _ = fit(*saved, saver(tmp_path))
    assert whole.validated == first.validated == [3, 6]
    for file, validated in (("step=3.ckpt", [6]), ("validated.ckpt", [6])):
        for batch_size, accumulate in {(4, 1), (2, 2), (1, 4)} - {saved}:
            resumed, module = fit(batch_size, accumulate, resume=file)
            assert torch.equal(torch.cat(resumed.rows), torch.cat(whole.rows[3:]))
            assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-6)
            assert resumed.validated == validated
            for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_workers_load_the_batches_of_a_step_together(fit):
    alone, workers = fit(2, 3)[0], fit(2, 3, num_workers=1)[0]
    assert torch.equal(torch.cat(workers.rows), torch.cat(alone.rows))
    assert workers.losses == alone.losses


def test_a_run_resumes_at_the_next_row_with_other_rows_a_step(fit, tmp_path):
    whole, _ = fit(8, 1)
    first, _ = fit(2, 2, saver(tmp_path), max_steps=3)
    resumed, _ = fit(2, 4, resume="step=3.ckpt")
    read = torch.cat(first.rows + resumed.rows)
    assert torch.equal(read, torch.cat(whole.rows)[: len(read)])
    assert len(read) == 3 * 4 + 3 * 8


def test_a_checkpoint_of_an_older_version_continues_at_the_beginning_of_its_step(fit, tmp_path):
    """There, the trainer counted batches: 14 are three steps of 4 and half of the next."""
    whole, _ = fit(4, 1)
    fit(1, 4, saver(tmp_path), max_steps=3)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for span in ("total", "current"):
        assert progress[span]["ready"] == 3
        progress[span] = {name: number + 11 for name, number in progress[span].items()}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed, _ = fit(2, 2, resume="old.ckpt")
    assert torch.equal(torch.cat(resumed.rows), torch.cat(whole.rows[3:]))
    assert resumed.validated == [6]


def test_epochs_of_limited_batches_do_not_break_a_step(fit):
    whole, _ = fit(4, 1)
    cut, _ = fit(1, 4, limit_train_batches=5)
    assert torch.equal(torch.cat(cut.rows), torch.cat(whole.rows))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6)


# Settings


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 must be at least 1"),
        ({"accumulate_grad_batches": -2}, "accumulate_grad_batches=-2 must be at least 1"),
        ({"log_every_n_steps": 0}, "log_every_n_steps=0 must be at least 1"),
        ({"log_every_n_steps": -1}, "log_every_n_steps=-1 must be at least 1"),
        ({"gradient_clip_val": -0.5}, "gradient_clip_val=-0.5 must be at least 0"),
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm=value has no effect"),
        (
            {"gradient_clip_algorithm": "norm", "gradient_clip_val": 0},
            "gradient_clip_algorithm=norm has no effect",
        ),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler"),
        ({"overfit_batches": 3}, "overfit_batches=3 has no effect"),
        ({"reload_dataloaders_every_n_epochs": 1}, "every_n_epochs=1 has no effect"),
        ({"val_check_interval": 0}, "val_check_interval=0 must be a number of steps"),
        ({"val_check_interval": "00:00:01:00"}, "a val_check_interval in time"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0 must be at least 1"),
        ({"check_val_every_n_epoch": -2}, "check_val_every_n_epoch=-2 must be at least 1"),
        ({"check_val_every_n_epoch": 2, "max_steps": 6}, "every_n_epoch=2 never validates"),
        ({"num_sanity_val_steps": -5}, "num_sanity_val_steps=-5 must be at least 0, or -1"),
        ({"max_steps": 6, "min_steps": 7}, "min_steps=7 is after the last step"),
        ({"min_steps": -1}, "min_steps=-1 must be at least 0"),
        ({"min_epochs": -1}, "min_epochs=-1 must be at least 0"),
        ({"max_time": "00:00:00:00"}, "max_time=0 has nothing to do"),
        ({"max_time": {"minutes": -2}}, "max_time=0 has nothing to do"),
        ({"precision": "bf16-true"}, "precision=bf16-true is not supported"),
    ],
)
@pytest.mark.parametrize("module", [shapes_module, autoencoder_module])
def test_settings_that_a_stream_cannot_follow_are_refused(module, changed, told):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **changed)
    with pytest.raises(UserError, match=told):
        module().before_training(trainer, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_sanity_val_steps": -1},
        {"gradient_clip_algorithm": "value", "gradient_clip_val": 1.0},
        {"max_time": "00:00:00:01"},
        {"min_steps": 6, "max_steps": 6},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"check_val_every_n_epoch": 2, "max_epochs": 3},
    ],
)
def test_settings_that_take_effect_are_not_refused(changed):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **changed)
    steps.check_trainer(trainer)


@pytest.mark.parametrize(
    "changed",
    [
        *({f"limit_{loop}_batches": wrong} for loop in ("train", "val") for wrong in (-0.5, 1.5)),
        *({"max_steps": -2}, {"max_epochs": -2}, {"max_time": "0:0"}, {"fast_dev_run": -1}),
        {"check_val_every_n_epoch": 0.5},
    ],
)
def test_settings_that_lightning_itself_refuses(changed):
    with pytest.raises((MisconfigurationException, ValueError)):
        L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **changed)


def test_ranks_that_do_not_divide_are_refused():
    strategy = ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1)
    trainer = SimpleNamespace(strategy=strategy, world_size=4)
    for shard_size in (None, 2, 4):
        steps.check_shards(trainer, shard_size)
    with pytest.raises(UserError, match="shard_size=3 does not divide the 4 ranks; give a div"):
        steps.check_shards(trainer, 3)
    with pytest.raises(UserError, match="shard_size=8 does not divide the 4 ranks; give a div"):
        steps.check_shards(trainer, 8)
    with pytest.raises(UserError, match="data_parallel_size=4, but the number of ranks .* is 6"):
        steps.check_shards(SimpleNamespace(strategy=strategy, world_size=6), None)
    alone = SimpleNamespace(strategy=SingleDeviceStrategy(), world_size=1)
    steps.check_shards(alone, None)
    with pytest.raises(UserError, match="shard_size=2 has no effect without .*ModelParallel"):
        steps.check_shards(alone, 2)


def test_strategies_that_would_train_diverging_copies_are_refused():
    with pytest.raises(UserError, match="FSDPStrategy is not supported; set trainer.strategy"):
        steps.check_strategy(FSDPStrategy(), shards=True)
    steps.check_strategy(ModelParallelStrategy(), shards=True)
    with pytest.raises(UserError, match="cannot train an autoencoder; set .* to ddp"):
        steps.check_strategy(ModelParallelStrategy(), shards=False)
    two = [torch.device("cpu")] * 2
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    steps.check_strategy(sharded, shards=True)
    for given in ({}, {"data_parallel_size": 1, "tensor_parallel_size": 2}):
        default = ModelParallelStrategy(**given)
        default.parallel_devices = two
        with pytest.raises(UserError, match="tensor_parallel_size=2 .* number of ranks .2. and"):
            steps.check_strategy(default, shards=True)
    steps.check_mesh(2, 1)
    with pytest.raises(UserError, match="tensor_parallel_size=4 .* number of ranks .8. and"):
        steps.check_mesh(2, 4)
