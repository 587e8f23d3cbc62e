"""The LightningModule: losses, moving average, validation."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from support import fits, runs
from support.tiny import SIZES, VOCAB_SIZE, document, mixed_batch, packed, tiny_module
from tf_lightning.batch import IGNORE_INDEX, Batch
from tf_lightning.data import Mixture
from tf_lightning.diffusion.process import alphas_cumprod, cosine_betas
from tf_lightning.errors import UserError
from tf_lightning.model.attention import DenseAttention, build_attention
from tf_lightning.model.patches import LinearConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetConfig
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training import module as module_file
from tf_lightning.training.module import Transfusion


def losses_by_hand(
    net: TransfusionModel, batch: Batch, prediction_type: str
) -> tuple[float, float]:
    """Sums of both losses, from diffusers' schedule, the dense mask and log-probabilities."""
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
    nll, _, squared_error, *_ = module.loss_sums(module.net, batch)
    expected = losses_by_hand(module.net, batch, prediction_type)
    assert (nll.sum().item(), squared_error.item()) == pytest.approx(expected, rel=1e-4)
    # Targets are text, the <boi> after text, and <eos>; none in a document without a caption.
    assert len(nll) == (5 + 2) + (7 + 1) + 0 + (1 + 4 + 1) + (1 + 2 + 1 + 1)


def test_epsilon_and_v_predictions_have_different_targets():
    batch = mixed_batch()
    epsilon, v = (tiny_module(prediction_type=name) for name in ("epsilon", "v_prediction"))
    errors = [module.loss_sums(module.net, batch).diffusion for module in (epsilon, v)]
    assert not torch.isclose(*errors, rtol=1e-2)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(UserError, match="'x0' must be one of .*epsilon.*v_prediction"):
        tiny_module(prediction_type="x0")


def test_the_default_losses_equal_their_formulas_to_the_last_bit():
    """The formulas are written out for epsilon and the linear patch coder."""
    module, batch = tiny_module(), mixed_batch()
    table = alphas_cumprod(cosine_betas())
    timesteps = (batch.t * 1000).long()
    alpha_bar = table[timesteps].view(-1, 1, 1, 1)
    noised = alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * batch.noise
    logits, output = module.net(batch, noised, timesteps / 1000, build_attention(batch))
    nll, _, squared_error, *_ = module.loss_sums(module.net, batch)
    targets = batch.labels.flatten()[batch.target_index]
    assert torch.equal(nll, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(squared_error, F.mse_loss(output, batch.noise, reduction="sum"))

    layer = ["attention_norm", *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo"))]
    layer += ["ffn_norm", *(f"feed_forward.{w}" for w in ("w1", "w2", "w3"))]
    transformer = ["tok_embeddings", *(f"layers.{i}.{n}" for i in range(2) for n in layer)]
    names = [f"transformer.{name}.weight" for name in [*transformer, "norm", "output"]]
    linears = ["patch_encoder", "patch_decoder", "time_embedder.0", "time_embedder.2"]
    names += [f"patch_coder.{name}.{kind}" for name in linears for kind in ("weight", "bias")]
    names += [f"patch_coder.{name}_embedding.weight" for name in ("row", "column")]
    assert list(module.state_dict()) == [f"{n}.{name}" for n in ("net", "ema") for name in names]


VARIANTS = {
    "flow": {"prediction_type": "flow"},
    "linear schedule": {"noise_schedule": "linear"},
    "learned sigma": {"learned_sigma": True},
    "min-SNR": {"min_snr_gamma": 5.0},
    "U-Net": {"unet": UNetConfig((8, 16), num_blocks=1, head_dim=8)},
    "U-Net, learned sigma": {"unet": UNetConfig((8, 16), 1, 8), "learned_sigma": True},
    "MonoFormer": {
        "linear": LinearConfig(time="adaln", pos_embed="sincos", zero_init="input"),
        "noise_schedule": "linear",
        "learned_sigma": True,
    },
}


@pytest.mark.parametrize("changed", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_gives_every_weight_a_gradient_with_and_without_images(changed):
    module = tiny_module(**changed)
    for name, part in module.net.named_parameters():  # so that no branch starts at zero
        if part.ndim > 1 and not part.any():
            torch.nn.init.normal_(part, std=0.1)
        assert part.isfinite().all(), name
    for batch, taught in ((mixed_batch(), True), (packed([[document("9")]]), False)):
        module.zero_grad()
        nll, _, loss_diffusion, *_ = module.loss_sums(module.net, batch)
        (nll.sum() + loss_diffusion).backward()
        for name, part in module.net.patch_coder.named_parameters():
            assert part.grad is not None, name
            # Row and column embeddings beyond the grid have no gradient, but their tensor has.
            assert part.grad.any() == taught, name


def test_the_loss_of_a_flow_equals_the_one_computed_by_hand():
    module, batch = tiny_module(prediction_type="flow"), mixed_batch()
    t = batch.t.view(-1, 1, 1, 1)
    noised = (1 - t) * batch.latents + t * batch.noise
    _, output = module.net(batch, noised, batch.t, DenseAttention(batch))
    expected = ((output - (batch.noise - batch.latents)) ** 2).sum().item()
    assert module.loss_sums(module.net, batch).diffusion.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"prediction_type": "flow", "learned_sigma": True}, "use 'epsilon' or 'v_prediction'"),
        ({"unet": UNetConfig((8, 16, 16))}, "make patches of 4 but patch_size=2"),
        ({"text_lr_ratio": 1.5}, "text_lr_ratio=1.5 must be from 0 to 1"),
        *(
            ({"num_codes": 8} | option, f"{[*option][0]} has no effect with num_codes=8")
            for option in (
                {"linear": LinearConfig()},
                {"learned_sigma": True},
                {"min_snr_gamma": 5},
            )
        ),
        ({"lr_decay": "slow"}, "lr_decay='slow' must be one of .'cosine', 'linear'."),
    ],
)
def test_incompatible_arguments_are_refused_before_anything_is_built(changed, message):
    with pytest.raises(UserError, match=message):
        Transfusion(TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES), patch_size=2, **changed)


def test_causal_images_change_the_diffusion_loss():
    batch = mixed_batch()
    both, causal = (tiny_module(causal_images=causal) for causal in (False, True))
    errors = [module.loss_sums(module.net, batch).diffusion for module in (both, causal)]
    assert not torch.isclose(*errors, rtol=1e-3)


def test_a_batch_of_text_gives_the_patch_coder_zero_gradients():
    module, batch = tiny_module(), packed([[document("9")]])
    nll, _, squared_error, *_ = module.loss_sums(module.net, batch)
    (nll.sum() + squared_error).backward()
    gradients = [p.grad for p in module.net.patch_coder.parameters()]
    assert squared_error == 0 and all(g is not None and g.eq(0).all() for g in gradients)
    assert all(p.grad.ne(0).any() for p in module.net.transformer.layers.parameters())


# Training


class Watcher(L.Callback):
    """Records the weights after every step and the gradient norm before clipping."""

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
    """A module, its data, its trainer and the Watcher after four steps."""
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


def test_the_logged_gradient_norm_is_that_before_clipping(trained):
    module, _, _, watcher = trained
    assert watcher.logged == pytest.approx(watcher.norms, rel=1e-5)
    assert min(watcher.norms) > 0.5
    left = torch.stack([p.grad.square().sum() for p in module.net.parameters()]).sum().sqrt()
    assert left.item() == pytest.approx(0.5, rel=1e-4)


def test_the_decay_of_the_average_grows_to_ema_decay(trained):
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


def validated(trainer: L.Trainer, module: Transfusion, data: Mixture) -> dict[str, float]:
    """Validate; return all logged values."""
    trainer.validate(module, data, verbose=False)
    return {name: value.item() for name, value in trainer.logged_metrics.items()}


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


@pytest.mark.parametrize("ema_device", ["host", None])
def test_the_average_is_on_the_host_in_every_training_step(ema_device, monkeypatch, tmp_path):
    """Moves are recorded in place of a GPU, which is called "cpu" here."""
    places, seen, step = ["cpu"], [], Transfusion.training_step

    def training_step(module: Transfusion, *args):
        seen.append(places[-1])
        return step(module, *args)

    monkeypatch.setattr(Transfusion, "training_step", training_step)
    monkeypatch.setattr(module_file, "move", lambda net, to: places.append(str(to)) or net)
    module = fits.shapes_module()
    module.hparams.ema_device = ema_device
    options = {"val_check_interval": 2, "limit_val_batches": 1}
    fits.fit(module, fits.shapes_data(tmp_path), max_steps=4, default_root_dir=tmp_path, **options)
    assert "cpu" in places[1:]  # a validation
    assert seen == [ema_device or "cpu"] * 4


def test_an_average_on_the_host_is_moved_for_samples(monkeypatch):
    moved = []
    monkeypatch.setattr(TransfusionModel, "to", lambda net, device: moved.append(device) or net)
    module = tiny_module(ema_device="cpu")
    monkeypatch.setattr(Transfusion, "device", torch.device("cuda"))
    assert module.inference_net is module.ema and moved == [torch.device("cuda")]
    monkeypatch.setattr(Transfusion, "device", torch.device("cpu"))
    assert module.inference_net is module.ema and len(moved) == 1  # these weights are there
