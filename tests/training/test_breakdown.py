"""The losses by source and by noise level, and the gradient norm of each loss."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from callbacks.gradient_norms import GradientNorms
from support.tiny import SIZES, code_batch, document, packed, tiny_module
from tf_lightning.data import Mixture
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training.breakdown import LossBreakdown
from tf_lightning.training.module import Transfusion

ROWS = [[document("5i", 1), document("i3i", 2)], [document("9", 3)], [document("4i", 4)]]


@pytest.mark.parametrize("changed", [{}, {"learned_sigma": True}, {"prediction_type": "flow"}])
@pytest.mark.parametrize("clean_copies", [False, True])
def test_losses_by_source_and_level_are_means_of_each_row_and_image(changed, clean_copies):
    module = tiny_module(**changed)
    batch = packed(ROWS, 40, source_ids=[0, 1, 0], clean_copies=clean_copies)
    batch.t = torch.tensor([0.1, 0.24, 0.8, 0.999])  # an image in the two lowest and highest bins
    breakdown = LossBreakdown(["pairs", "text"], torch.device("cpu"))
    sums = module.loss_sums(module.net, batch, by_image=True)
    assert sums.by_image.sum().item() == pytest.approx(sums.diffusion.item(), rel=1e-5)
    for _ in range(2):  # means do not change when a batch is counted twice
        breakdown.add(batch, sums)
    means = breakdown.take_means(lambda x: x)
    rows = batch.target_index // 40
    of_text = rows == 1
    image = sums.by_image / batch.latents[0].numel()
    expected = {
        "pairs/loss_lm": sums.nll[~of_text].mean(),
        "text/loss_lm": sums.nll[of_text].mean(),
        "pairs/loss_diffusion": image.mean(),
        "loss_diffusion/t0.00-0.25": image[:2].mean(),
        "loss_diffusion/t0.75-1.00": image[2:].mean(),
    }
    assert means == pytest.approx({name: x.item() for name, x in expected.items()}, rel=1e-5)
    assert breakdown.take_means(lambda x: x) == {}


def test_each_image_has_the_loss_that_it_has_alone():
    """The images have two resolutions, and their rows have three sources."""
    module = tiny_module()
    small = torch.randn(3, 2, 4)
    rows = [[[torch.tensor([5, 6]), image]] for image in (small, document("i")[0], small + 1)]
    batch = packed(rows, 20, source_ids=[2, 1, 0])
    breakdown = LossBreakdown(["a", "b", "c"], torch.device("cpu"))
    breakdown.add(batch, module.loss_sums(module.net, batch, by_image=True))
    means = breakdown.take_means(lambda x: x)
    for number, name in enumerate("cba"):
        alone = packed([rows[number]], 20, row_ids=[number])
        sums = module.loss_sums(module.net, alone)
        mean = sums.diffusion.item() / rows[number][0][1].numel()
        assert means[f"{name}/loss_diffusion"] == pytest.approx(mean, rel=1e-4)
        assert means[f"{name}/loss_lm"] == pytest.approx(sums.nll.mean().item(), rel=1e-4)


def test_codes_are_counted_by_source(monkeypatch):
    config = TransformerConfig(vocab_size=20, **SIZES)
    module = Transfusion(config, patch_size=1, num_codes=11)
    module.configure_model()
    batch = code_batch()
    batch.source_ids = torch.tensor([1, 0])
    sums = module.loss_sums(module.net, batch, by_image=True)
    breakdown = LossBreakdown(["a", "b"], torch.device("cpu"))
    breakdown.add(batch, sums)
    means = breakdown.take_means(lambda x: x)
    second = batch.code_index // batch.input_ids.shape[1] == 1
    assert means["a/loss_codes"] == pytest.approx(sums.code_nll[second].mean().item())
    assert means["b/loss_codes"] == pytest.approx(sums.code_nll[~second].mean().item())
    assert set(means) == {f"{s}/{loss}" for s in "ab" for loss in ("loss_lm", "loss_codes")}


class Lines(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append({"step": step, **metrics})


class Record(L.Callback):
    """Keeps the norm of the whole gradient and that of the text's loss at each step."""

    def __init__(self):
        self.norms, self.of_text = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        sums = [pl_module.loss_sums(pl_module.net, part).nll for part in batch]
        mean = torch.cat(sums).mean()
        gradients = torch.autograd.grad(mean, list(pl_module.net.parameters()), allow_unused=True)
        squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
        self.of_text.append(torch.stack(squares).sum().sqrt().item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = [p.grad.square().sum() for p in pl_module.net.parameters()]
        self.norms.append(torch.stack(squares).sum().sqrt().item())


def test_gradient_norms_are_those_of_each_loss_and_change_nothing(tmp_path):
    runs = {}
    for callbacks in ((), (GradientNorms(every_n_logs=2),)):
        L.seed_everything(0)
        config = TransformerConfig(vocab_size=300, **SIZES)
        module = Transfusion(config, 16, 3, warmup_steps=1, diffusion_weight=2.0)
        data = Mixture(
            {"captions": ShapesCaptions(30, 6), "text": ShapesTexts(30, 6)},
            **{"autoencoder": "pixels", "vocab_size": 300, "patch_size": 16, "row_length": 256},
            **{"batch_size": 1, "cache_dir": str(tmp_path / "data")},
        )
        record = Record()
        trainer = L.Trainer(
            **{"accelerator": "cpu", "max_steps": 4, "default_root_dir": tmp_path},
            **{"logger": Lines(), "enable_progress_bar": False, "enable_model_summary": False},
            **{"enable_checkpointing": False, "limit_val_batches": 0, "log_every_n_steps": 1},
            **{"use_distributed_sampler": False, "accumulate_grad_batches": 2},
            callbacks=[*callbacks, record],
        )
        trainer.fit(module, data)
        runs[bool(callbacks)] = record
    assert runs[True].norms == runs[False].norms

    def logged(name: str) -> dict[int, float]:
        """The values of a curve by step."""
        return {line["step"]: line[name] for line in trainer.logger.lines if name in line}

    norms = [logged(f"train/grad_norm_{loss}") for loss in ("lm", "diffusion")]
    assert [list(values) for values in norms] == [[1, 3]] * 2 and list(logged("train/loss"))[0] == 0
    for step in (1, 3):
        lm, diffusion = (values[step] for values in norms)
        assert lm == pytest.approx(runs[True].of_text[step], rel=1e-5)
        assert abs(lm - 2 * diffusion) <= runs[True].norms[step] <= lm + 2 * diffusion
    by_level = [f"train/loss_diffusion/t{t:.2f}-{t + 0.25:.2f}" for t in (0, 0.25, 0.5, 0.75)]
    for step in range(4):  # a curve has no value at steps without an image
        levels = any(step in logged(name) for name in by_level)
        assert levels == (step in logged("train/captions/loss_diffusion"))
    assert len(logged("train/text/loss_lm")) == 4
    assert any(0 < len(logged(name)) < 4 for name in by_level)


def test_rows_of_text_with_frozen_text_weights_have_no_gradient_and_norms_of_zero(tmp_path):
    L.seed_everything(0)
    config = TransformerConfig(vocab_size=300, **SIZES)
    module = Transfusion(config, 16, 3, warmup_steps=1, text_lr_ratio=0.0)
    data = Mixture(
        {"captions": ShapesCaptions(30, 6), "text": ShapesTexts(30, 6)},
        {"captions": 1.0, "text": 9.0},
        **{"autoencoder": "pixels", "vocab_size": 300, "patch_size": 16, "row_length": 256},
        **{"batch_size": 1, "cache_dir": str(tmp_path / "data")},
    )
    trainer = L.Trainer(
        **{"accelerator": "cpu", "max_steps": 8, "default_root_dir": tmp_path},
        **{"logger": Lines(), "enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": False, "limit_val_batches": 0, "log_every_n_steps": 1},
        **{"use_distributed_sampler": False, "callbacks": [GradientNorms(every_n_logs=1)]},
    )
    trainer.fit(module, data)
    norms = [line["train/grad_norm_lm"] for line in trainer.logger.lines if len(line) == 3]
    assert len(norms) == 8 and 0.0 in norms
