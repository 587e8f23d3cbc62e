"""The LightningModule: losses, average, validation, checkpoints, exact resume, and ranks."""

import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import runs
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PATCH_SIZE, VOCAB_SIZE, document, packed
from torch import Tensor

from tf_lightning.attention import DenseAttention
from tf_lightning.batch import IGNORE_INDEX, Batch, pack
from tf_lightning.cli import main
from tf_lightning.data import Mixture
from tf_lightning.data.shapes_sources import ShapesCaptions, ShapesTexts
from tf_lightning.errors import UserError
from tf_lightning.module import Transfusion
from tf_lightning.net import Net
from tf_lightning.tokenizer import Tokenizer
from tf_lightning.transformer import TransformerConfig

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}


def tiny_module(**changed) -> Transfusion:
    """A module for `tiny`'s batches, whose denoiser's output is not zero."""
    torch.manual_seed(0)
    arguments = {"patch_size": PATCH_SIZE, "latent_channels": 3, "warmup_steps": 1} | changed
    module = Transfusion(TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES), **arguments)
    module.configure_model()
    torch.nn.init.normal_(module.net.patch_coder.patch_decoder.weight, std=0.2)
    return module


def mixed_batch() -> Batch:
    """Text, pictures in several places, and a document whose caption was dropped."""
    rows = [
        [document("5i", 1), document("7", 2), document("i", 3)],
        [document("i4", 4), document("i2i", 5)],
    ]
    return packed(rows, seed=3)


def losses_by_hand(net: Net, batch: Batch, prediction_type: str) -> tuple[float, float]:
    """Both sums, from diffusers' schedule, the dense mask and log-probabilities."""
    scheduler = DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )
    timesteps = (batch.t * 1000).long()
    noised = scheduler.add_noise(batch.latents, batch.noise, timesteps)
    target = batch.noise
    if prediction_type == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, timesteps)
    logits, output = net(batch, noised, timesteps / 1000, DenseAttention(batch))
    labels = batch.labels.flatten()
    labels = labels[labels != IGNORE_INDEX]
    nll = -F.log_softmax(logits, -1)[torch.arange(len(labels)), labels]
    return nll.sum().item(), ((output - target) ** 2).sum().item()


# Losses


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_sums_agree_with_an_independent_computation(prediction_type):
    module, batch = tiny_module(prediction_type=prediction_type), mixed_batch()
    nll, squared_error = module.loss_sums(module.net, batch)
    expected = losses_by_hand(module.net, batch, prediction_type)
    assert (nll.sum().item(), squared_error.item()) == pytest.approx(expected, rel=1e-4)
    # Targets: texts, <boi> where it comes next, <eos>; none where the caption was dropped.
    assert len(nll) == (5 + 2) + (7 + 1) + 0 + (1 + 4 + 1) + (1 + 2 + 1 + 1)


def test_epsilon_and_v_predictions_have_different_targets():
    batch = mixed_batch()
    epsilon, v = (tiny_module(prediction_type=name) for name in ("epsilon", "v_prediction"))
    errors = [module.loss_sums(module.net, batch)[1] for module in (epsilon, v)]
    assert not torch.isclose(*errors, rtol=1e-2)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(UserError, match="'x0' must be one of .*epsilon.*v_prediction"):
        tiny_module(prediction_type="x0")


def test_causal_images_change_the_denoisers_loss():
    batch = mixed_batch()
    both, causal = (tiny_module(causal_images=causal) for causal in (False, True))
    errors = [module.loss_sums(module.net, batch)[1] for module in (both, causal)]
    assert not torch.isclose(*errors, rtol=1e-3)


def test_a_batch_of_text_gives_the_patch_coder_gradients_of_zero():
    module, batch = tiny_module(), packed([[document("9")]])
    nll, squared_error = module.loss_sums(module.net, batch)
    (nll.sum() + squared_error).backward()
    gradients = [p.grad for p in module.net.patch_coder.parameters()]
    assert squared_error == 0 and all(g is not None and g.eq(0).all() for g in gradients)
    assert all(p.grad.ne(0).any() for p in module.net.transformer.layers.parameters())


# Training


class Watcher(L.Callback):
    """Keeps the weights after every step, and the gradients' norm before they are clipped."""

    def __init__(self):
        self.weights, self.norms, self.logged = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = [p.grad.double().square().sum() for p in pl_module.net.parameters()]
        self.norms.append(torch.stack(squares).sum().sqrt().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append([p.detach().clone() for p in pl_module.net.parameters()])
        self.logged.append(trainer.logged_metrics["train/grad_norm"].item())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module, its data, its trainer and what was watched, after four steps from Python."""
    folder = tmp_path_factory.mktemp("module")
    L.seed_everything(0)
    config = TransformerConfig(vocab_size=runs.VOCAB_SIZE, **SIZES)
    module = Transfusion(
        config, patch_size=16, latent_channels=3, lr=1e-2, warmup_steps=1, ema_decay=0.2
    )
    data = Mixture(
        {"captions": ShapesCaptions(30, 6), "text": ShapesTexts(30, 6)},
        **{"autoencoder": "pixels", "vocab_size": runs.VOCAB_SIZE, "patch_size": 16},
        **{"row_length": 256, "batch_size": 2, "cache_dir": str(folder / "data")},
    )
    watcher = Watcher()
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_steps": 4, "default_root_dir": folder},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0},
        **{"log_every_n_steps": 1, "use_distributed_sampler": False, "gradient_clip_val": 0.5},
        callbacks=[watcher],
    )
    trainer.fit(module, data)
    trainer.limit_val_batches = 1.0
    return module, data, trainer, watcher


def test_the_logged_gradient_norm_is_the_true_one_before_clipping(trained):
    module, _, _, watcher = trained
    assert watcher.logged == pytest.approx(watcher.norms, rel=1e-5)
    assert min(watcher.norms) > 0.5
    left = torch.stack([p.grad.square().sum() for p in module.net.parameters()]).sum().sqrt()
    assert left.item() == pytest.approx(0.5, rel=1e-4)


def test_the_average_forgets_the_start_first_and_then_decays_as_asked(trained):
    module, _, _, watcher = trained
    L.seed_everything(0)
    start = Transfusion(module.config, patch_size=16, latent_channels=3)
    start.configure_model()
    average = list(start.net.parameters())
    for step, weights in enumerate(watcher.weights):
        decay = [0.1, 2 / 11, 0.2, 0.2][step]
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for expected, parameter in zip(average, module.ema.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
        assert not parameter.requires_grad


def text_perplexity(net: Net, data: Mixture) -> float:
    """exp(sum nll / sum tokens) of the text corpus, one document at a time, starts left out."""
    corpus, tokenizer, total, count = data.corpora["val"]["text"], data.tokenizer, 0.0, 0
    for index in range(len(corpus)):
        (text,) = corpus.document(index)
        ids = torch.cat([torch.tensor([1]), text, torch.tensor([2])])
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        batch = pack([[[text]]], [0], tokenizer=tokenizer, row_length=len(ids), patch_size=16)
        hidden = net.transformer(
            net.transformer.tok_embeddings(ids).unsqueeze(0), batch.positions, DenseAttention(batch)
        )
        log_probs = net.transformer.output(hidden[0]).double().log_softmax(-1)
        nll = -log_probs[torch.arange(len(ids) - 1), ids[1:]]
        total, count = total + nll[1:].sum().item(), count + len(nll) - 1
    return math.exp(total / count)


def validated(trainer: L.Trainer, module: Transfusion, data: Mixture) -> dict[str, float]:
    """All that a validation logs."""
    trainer.validate(module, data, verbose=False)
    return {name: value.item() for name, value in trainer.logged_metrics.items()}


@torch.no_grad()
def test_validation_perplexity_is_that_of_the_averaged_weights_without_document_starts(trained):
    module, data, trainer, _ = trained
    logged = validated(trainer, module, data)
    expected = text_perplexity(module.ema, data)
    assert logged["val/text/perplexity"] == pytest.approx(expected, rel=1e-5)
    assert abs(text_perplexity(module.net, data) - expected) > 1e-3 * expected


@torch.no_grad()
def test_validation_losses_are_means_over_all_targets_and_elements_of_a_source(trained):
    module, data, trainer, _ = trained
    logged = validated(trainer, module, data)
    sums = torch.zeros(4)
    for batch in data.val_dataloader()[0]:
        nll, squared_error = losses_by_hand(module.ema, batch, "epsilon")
        sums += torch.tensor([nll, len(batch.target_index), squared_error, batch.latents.numel()])
    assert logged["val/captions/loss_lm"] == pytest.approx((sums[0] / sums[1]).item(), rel=1e-4)
    mean = (sums[2] / sums[3]).item()
    assert logged["val/captions/loss_diffusion"] == pytest.approx(mean, rel=1e-4)
    assert "val/text/loss_diffusion" not in logged


def test_without_an_average_the_trained_weights_are_validated():
    module = tiny_module(ema_decay=0)
    assert module.ema is None and module.inference_net is module.net


# Checkpoints


def load(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_a_checkpoint_holds_the_two_networks_the_tokenizer_and_the_autoencoders_name(run):
    checkpoint = load(run)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"net", "ema"}
    assert checkpoint["image_codec"] == {"autoencoder": "pixels", "latent_shape": [3, 64, 64]}
    (file,) = (run.parent / "data").glob("tokenizer-*.model")
    proto = bytes(checkpoint["tokenizer"].numpy())
    assert proto == file.read_bytes()
    assert Tokenizer.from_proto(proto).vocab_size == runs.VOCAB_SIZE


def test_a_checkpoint_from_python_loads_without_running_what_it_holds(trained, tmp_path):
    module, _, trainer, _ = trained
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    checkpoint = torch.load(tmp_path / "python.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["transformer"] == module.config


def same(a, b) -> bool:
    """Equal in every bit, down to the last tensor of nested dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    kill = ["--trainer.callbacks+=runs.StopAt", "--trainer.callbacks.step=5"]
    with pytest.raises(runs.Killed):
        runs.fit(tmp_path, *kill)
    assert load(tmp_path / "run")["global_step"] == 3
    resumed = load(runs.fit(tmp_path, "--ckpt_path", "last"))
    whole = load(run)
    assert whole["global_step"] == resumed["global_step"] == runs.MAX_STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "Mixture"):
        assert same(whole[part], resumed[part]), part
    assert not same(whole["state_dict"], load(run, "step0000003")["state_dict"])
    assert whole["Mixture"] == {"next_row": 2 * runs.MAX_STEPS, "global_step": runs.MAX_STEPS}


def test_a_resumed_run_goes_on_counting_its_seconds(run, tmp_path):
    first = load(run, "step0000003")
    (state,) = [s for name, s in first["callbacks"].items() if "ShapesReport" in name]
    state["train_seconds"] = 1000.0
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(first, tmp_path / "run" / "checkpoints" / "last.ckpt")
    last = load(runs.fit(tmp_path, "--ckpt_path", "last"))
    (state,) = [s for name, s in last["callbacks"].items() if "ShapesReport" in name]
    assert 1000 < state["train_seconds"] < 1100


# Ranks


def two_rank_config(config: dict) -> None:
    """Three steps; with one row a rank, some rank has no picture and some step has none at all."""
    data = config["data"]["init_args"]
    data["weights"] = {"captions": 0.5, "text": 0.5}
    config["trainer"] |= {"max_steps": 3, "limit_val_batches": 0, "callbacks": []}
    config["trainer"]["callbacks"] = runs.config(Path())["trainer"]["callbacks"][:1]


def pictures_in_rows(cache_dir: Path, count: int) -> list[int]:
    """How many pictures each of the first rows of `two_rank_config` has."""
    data = Mixture(
        {"captions": ShapesCaptions(runs.NUM_CAPTIONS, 6), "text": ShapesTexts(40, 6)},
        {"captions": 0.5, "text": 0.5},
        **{"autoencoder": "pixels", "vocab_size": runs.VOCAB_SIZE, "patch_size": 16},
        **{"row_length": 256, "batch_size": 1, "cache_dir": str(cache_dir)},
    )
    data.setup()
    batches = iter(data.train_dataloader())
    return [next(batches).num_images for _ in range(count)]


def logged_losses(run: Path) -> list[float]:
    """The losses and the gradient's norm at every step."""
    events = EventAccumulator(str(run)).Reload()
    names = ("loss", "loss_lm", "loss_diffusion", "grad_norm")
    return [event.value for name in names for event in events.Scalars(f"train/{name}")]


@pytest.mark.slow
def test_two_ranks_equal_one_with_the_same_rows(tmp_path):
    weights = {}
    for ranks, rows in ((1, 2), (2, 1)):
        folder = tmp_path / f"ranks{ranks}"
        folder.mkdir()
        arguments = ["fit", "-c", str(runs.write_config(folder, two_rank_config))]
        arguments += [f"--data.init_args.batch_size={rows}", f"--trainer.devices={ranks}"]
        arguments += [f"--data.init_args.cache_dir={tmp_path}/data"]
        if ranks == 1:
            main(arguments)
        else:
            command = [sys.executable, "-m", "tf_lightning", *arguments, "--trainer.strategy=ddp"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=180)
        weights[ranks] = load(folder / "run")["state_dict"]
    one, two = (logged_losses(tmp_path / f"ranks{ranks}" / "run") for ranks in (1, 2))
    assert len(one) == 12 and one == pytest.approx(two, rel=1e-5)  # Adam would hide a wrong scale
    pictures = pictures_in_rows(tmp_path / "data", 6)
    assert 0 in pictures and max(pictures) > 0
    assert weights[1].keys() == weights[2].keys()
    for name, value in weights[1].items():
        torch.testing.assert_close(value, weights[2][name], atol=2e-6, rtol=1e-5, msg=name)
