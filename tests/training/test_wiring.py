"""Every hyper-parameter reaches its formula: a step at unusual values against plain torch.

The network is replaced by a small function, so that each loss can be computed here from its inputs.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from support.tiny import VOCAB_SIZE, code_batch, document, mixed_batch, packed, tiny_module
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.patches import LinearConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.model.unet import UNetConfig
from tf_lightning.training import module as module_file
from tf_lightning.training.module import Transfusion
from tf_lightning.training.optim import MuonAdamW

T, GAMMA, LAMBDA, Z_WEIGHT = 37, 1.7, 3.0, 0.02
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}


class Formula(nn.Module):
    """Stands for the network: logits and outputs that follow from one weight and the inputs."""

    def __init__(self, num_outputs: int = 1, num_codes: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.num_outputs, self.num_codes, self.calls = num_outputs, num_codes, []

    def forward(self, batch, noised: Tensor, t: Tensor, attend, score) -> tuple[tuple, Tensor]:
        self.calls.append((noised, t, attend))
        targets = batch.labels.flatten()[torch.cat([batch.target_index, batch.code_index])]
        scores = score(self.logits(batch), targets)
        return scores, None if self.num_codes else self.output(noised, t)

    def logits(self, batch) -> Tensor:
        count = len(batch.target_index) + len(batch.code_index)
        vocabulary = VOCAB_SIZE + self.num_codes
        steps = torch.arange(count * vocabulary, dtype=torch.float32).view(count, vocabulary)
        return self.weight * 3 * steps.sin()

    def output(self, noised: Tensor, t: Tensor) -> Tensor:
        parts = [self.weight * noised + t.view(-1, 1, 1, 1), (self.weight * noised).sin()]
        return torch.cat(parts[: self.num_outputs], 1)


def made(net: nn.Module, **options) -> tuple[Transfusion, dict[str, Tensor]]:
    """A module with this network and a trainer of one process, and the values that it logs."""
    module = Transfusion(TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES), **options)
    module.net, logged = net, {}
    strategy = SimpleNamespace(backward=lambda loss, optimizer: loss.backward())
    module.kept_trainer = SimpleNamespace(
        world_size=1,
        strategy=strategy,
        max_steps=12,
        precision="bf16-mixed",
        global_step=5,
        callbacks=[],
    )
    module.trainer = module.kept_trainer
    module.log_dict = lambda values, **_: logged.update(values)
    return module, logged


def batches() -> list:
    """The two batches of a step; they differ in text targets, images and noise levels."""
    rows = [[[document("2i3i", 1), document("4", 2)]], [[document("i5", 3)], [document("3", 4)]]]
    made_batches = [packed(part, row_ids=[7, 8][: len(part)]) for part in rows]
    first = made_batches[0]
    first.t = torch.tensor([0.01, 0.61])  # timestep 0, whose bound differs, and another
    # Predicted well at timestep 0, because fp32 has few digits for an event of small probability.
    first.noise[0] = 0.7 * first.latents[0] + 0.01 + 0.2 * first.noise[0]
    return made_batches


# ------------------------------------------------------------------------------ by hand


def betas_of(schedule: str) -> Tensor:
    if schedule == "linear":
        return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    places = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * torch.pi / 2
    alpha_bar = places.cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def ddpm(schedule: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """beta, alpha_bar and the previous alpha_bar at the timesteps of noise levels, (M, 1, 1, 1)."""
    betas, timestep = betas_of(schedule), (t * T).floor().long()
    alpha_bar = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])
    return tuple(x[timestep].float().view(-1, 1, 1, 1) for x in (betas, alpha_bar, before))


def noised_by_hand(batch, options: dict) -> Tensor:
    t = batch.t.view(-1, 1, 1, 1)
    if options["prediction_type"] == "flow":
        return (1 - t) * batch.latents + t * batch.noise
    alpha_bar = ddpm(options["noise_schedule"], batch.t)[1]
    return alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * batch.noise


def diffusion_by_hand(output: Tensor, batch, options: dict) -> Tensor:
    """The loss summed over elements: Min-SNR's weight of the error, and the variational term."""
    x_0, noise, channels = batch.latents, batch.noise, batch.latents.shape[1]
    prediction, t = output[:, :channels], batch.t.view(-1, 1, 1, 1)
    if options["prediction_type"] == "flow":
        weight = ((1 - t) / t).square().clamp(max=GAMMA) * t.square()
        return (weight * (prediction - (noise - x_0)).square()).sum()
    beta, alpha_bar, before = ddpm(options["noise_schedule"], batch.t)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    snr = alpha_bar / (1 - alpha_bar)
    x_t = alpha * x_0 + sigma * noise
    if options["prediction_type"] == "epsilon":
        target, weight = noise, snr.clamp(max=GAMMA) / snr
        predicted_x_0 = (x_t - sigma * prediction) / alpha
    else:
        target, weight = alpha * noise - sigma * x_0, snr.clamp(max=GAMMA) * sigma.square()
        predicted_x_0 = alpha * x_t - sigma * prediction
    loss = (weight * (prediction - target).square()).sum()
    if not options["learned_sigma"]:
        return loss
    # q(x_{t-1} | x_t, x_0) and the predicted distribution, whose mean is not trained here.
    first, second = before.sqrt() * beta, (1 - beta).sqrt() * (1 - before)
    mean, predicted = (
        (first * x + second * x_t) / (1 - alpha_bar) for x in (x_0, predicted_x_0.detach())
    )
    lower = (beta * (1 - before) / (1 - alpha_bar)).log()
    table = betas_of(options["noise_schedule"])
    at_one = (table[1] * table[0] / (1 - (1 - table[0]) * (1 - table[1]))).log().float()
    is_first = (batch.t * T < 1).view(-1, 1, 1, 1)
    lower = torch.where(is_first, at_one, lower)
    u = (output[:, channels:] + 1) / 2
    log_variance = u * beta.log() + (1 - u) * lower
    normal = Normal(predicted, (log_variance / 2).exp())
    kl = kl_divergence(Normal(mean, (lower / 2).exp()), normal)
    nll = -(normal.cdf(x_0 + 1 / 255) - normal.cdf(x_0 - 1 / 255)).clamp(min=1e-12).log()
    bits = torch.where(is_first, nll, kl).sum() / torch.tensor(2.0).log()
    return loss + 0.001 * T * bits


def nll_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.exp().sum(-1).log() - logits[torch.arange(len(targets)), targets]


def losses_by_hand(net: Formula, parts: list, options: dict) -> dict[str, Tensor]:
    """The losses of a step of images of latents, each a mean over all batches."""
    lm, z, diffusion, targets, elements = 0.0, 0.0, 0.0, 0, 0
    for batch in parts:
        logits = net.logits(batch)
        labels = batch.labels.flatten()[batch.target_index]
        lm = lm + nll_by_hand(logits, labels).sum()
        z = z + logits.exp().sum(-1).log().square().sum()
        t = batch.t if options["prediction_type"] == "flow" else (batch.t * T).floor() / T
        output = net.output(noised_by_hand(batch, options), t)
        diffusion = diffusion + diffusion_by_hand(output, batch, options)
        targets, elements = targets + len(labels), elements + batch.latents.numel()
    losses = {
        "loss_lm": lm / targets,
        "loss_diffusion": diffusion / elements,
        "loss_z": z / targets,
    }
    total = losses["loss_lm"] + LAMBDA * losses["loss_diffusion"] + Z_WEIGHT * losses["loss_z"]
    return losses | {"loss": total}


# ------------------------------------------------------------------------------ losses

VARIANTS = {
    "v, linear": ("v_prediction", "linear", True),
    "v, cosine": ("v_prediction", "cosine", False),
    "epsilon, linear": ("epsilon", "linear", False),
    "epsilon, cosine": ("epsilon", "cosine", True),
    "flow": ("flow", "cosine", False),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_training_step_has_the_losses_and_the_gradient_computed_by_hand(variant):
    options = dict(
        zip(("prediction_type", "noise_schedule", "learned_sigma"), variant, strict=True)
    )
    options |= {"num_train_timesteps": T, "min_snr_gamma": GAMMA}
    net = Formula(num_outputs=2 if options["learned_sigma"] else 1)
    module, logged = made(
        net, **options, diffusion_weight=LAMBDA, z_loss_weight=Z_WEIGHT, latent_channels=3
    )
    parts = batches()
    module.training_step(parts, 0).backward()
    expected = losses_by_hand(net, parts, options)
    near = dict.fromkeys(("atol", "rtol"), 5e-4 if options["learned_sigma"] else 1e-5)
    assert logged.keys() == {f"train/{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(logged[f"train/{name}"], value.detach(), **near)
    (gradient,) = torch.autograd.grad(expected["loss"], net.weight)
    torch.testing.assert_close(net.weight.grad, gradient, **near)
    for (noised, _, _), batch in zip(net.calls, parts, strict=True):
        torch.testing.assert_close(noised, noised_by_hand(batch, options))


def test_a_step_of_codes_has_one_mean_over_text_and_codes():
    net, batch = Formula(num_codes=11), code_batch()
    module, logged = made(net, num_codes=11, patch_size=1, z_loss_weight=Z_WEIGHT)
    loss = module.training_step(batch, 0).detach()
    logits = net.logits(batch).detach()
    targets = batch.labels.flatten()[torch.cat([batch.target_index, batch.code_index])]
    nll, num_text = nll_by_hand(logits, targets), len(batch.target_index)
    z = logits.exp().sum(-1).log().square().mean()
    expected = {
        "train/loss_lm": nll[:num_text].mean(),
        "train/loss_codes": nll[num_text:].mean(),
        "train/loss_z": z,
        "train/loss": nll.mean() + Z_WEIGHT * z,
    }
    torch.testing.assert_close(logged, expected)
    torch.testing.assert_close(loss, expected["train/loss"])


@pytest.mark.parametrize("causal", [False, True])
def test_causal_images_reach_the_attention(causal):
    net = Formula()
    module, _ = made(net, causal_images=causal, latent_channels=3)
    batch = packed([[document("i1")]])
    module.training_step(batch, 0)
    (attend,) = (call[2] for call in net.calls)
    queries = torch.zeros(len(attend.index), 1, 1)
    values = torch.zeros_like(queries)
    values[3] = 1.0  # <bos> <boi> and 4 patches: the second patch
    seen = attend(queries, queries, values).flatten() > 0
    assert seen[2].item() == (not causal) and seen[3]  # the first patch sees a later one


# ------------------------------------------------------------------------------ network


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 4, "latent_channels": 5, "learned_sigma": True},
        {"linear": LinearConfig(time="adaln", pos_embed="sincos"), "latent_channels": 3},
        {"unet": UNetConfig((8, 16), num_blocks=1, head_dim=8), "latent_channels": 3},
        {"num_codes": 11, "patch_size": 1},
    ],
)
def test_the_sizes_of_the_network_reach_it(options):
    config = TransformerConfig(vocab_size=VOCAB_SIZE, qk_norm=True, num_kv_heads=1, **SIZES)
    module = Transfusion(config, **options)
    module.configure_model()
    sizes = {"patch_size": 2, "latent_channels": 8, "num_codes": 0} | options
    same = TransfusionModel(config, sizes.pop("patch_size"), sizes.pop("latent_channels"), **sizes)
    shapes = [{n: w.shape for n, w in net.state_dict().items()} for net in (module.net, same)]
    assert shapes[0] == shapes[1] and repr(module.net) == repr(same)
    assert module.net.transformer.config == same.transformer.config


def test_the_blocks_are_compiled_only_on_demand(monkeypatch):
    compiled = []
    monkeypatch.setattr("tf_lightning.training.module.compile_blocks", compiled.append)
    for wanted in (False, True):
        module = Transfusion(TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES), compile=wanted)
        module.configure_model()
        assert compiled == [module.net.transformer] * wanted


def test_flash_attention_is_used_only_in_training(monkeypatch):
    calls = []

    def build(batch, causal, flash):
        calls.append((causal, flash))
        return DenseAttention(batch, causal)

    monkeypatch.setattr("tf_lightning.training.module.build_attention", build)
    for flash in (False, True):
        module = tiny_module(flash_attention=flash, causal_images=True)
        sums = module.loss_sums(module.net, mixed_batch())
        assert calls == [(True, True)] * flash and sums.nll.requires_grad
    with torch.no_grad():
        module.loss_sums(module.net, mixed_batch())
    assert len(calls) == 1


def test_options_of_newer_gpus_are_checked_before_training(monkeypatch):
    calls, file = [], "tf_lightning.training.module"
    for name in ("check_trainer", "check_strategy", "check_shards"):
        monkeypatch.setattr(f"{file}.{name}", lambda *_, **__: None)
    for name in ("check_fp8", "check_flash"):
        monkeypatch.setattr(f"{file}.{name}", lambda *call, name=name: calls.append((name, *call)))
    strategy = SimpleNamespace(root_device="device")
    trainer = SimpleNamespace(precision="16-mixed", strategy=strategy)
    config = TransformerConfig(vocab_size=VOCAB_SIZE, **SIZES)
    Transfusion(config).before_training(trainer, None)
    assert not calls
    Transfusion(config, fp8="tensorwise", flash_attention=True).before_training(trainer, None)
    run = (config, "16-mixed", "device")
    assert calls == [("check_fp8", "tensorwise", *run), ("check_flash", *run)]


# ------------------------------------------------------------------------------ optimizer


def optimizer_of(**options) -> tuple[Transfusion, dict]:
    module, _ = made(None, latent_channels=3, **options)
    module.configure_model()
    return module, module.configure_optimizers()


def test_the_options_of_adamw_reach_it():
    options = {"lr": 0.02, "betas": (0.8, 0.7), "weight_decay": 0.3, "text_lr_ratio": 0.25}
    module, made_optimizer = optimizer_of(**options, warmup_steps=0)
    optimizer = made_optimizer["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    text = {id(p) for p in module.net.transformer.text_parameters()}
    embeddings = {id(m.weight) for m in module.net.modules() if isinstance(m, nn.Embedding)}
    found = {
        id(p): (group["initial_lr"], group["betas"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        id(p): (
            0.005 if id(p) in text else 0.02,
            (0.8, 0.7),
            0.3 if p.ndim >= 2 and id(p) not in embeddings else 0.0,
        )
        for p in module.net.parameters()
    }


@pytest.mark.parametrize(("precision", "fused"), [("bf16-mixed", True), ("16-mixed", False)])
def test_adamw_is_fused_except_where_its_gradients_are_scaled(precision, fused):
    module, _ = made(None, latent_channels=3)
    module.configure_model()
    module.kept_trainer.precision = precision
    optimizer = module.configure_optimizers()["optimizer"]
    assert all(group["fused"] == fused for group in optimizer.param_groups)


def test_muon_takes_the_matrices_of_the_blocks_in_the_precision_of_the_run():
    module, made_optimizer = optimizer_of(muon=True, weight_decay=0.3, betas=(0.8, 0.7), lr=0.02)
    optimizer = made_optimizer["optimizer"]
    assert type(optimizer) is MuonAdamW and optimizer.precision == torch.bfloat16
    (group,) = (group for group in optimizer.param_groups if group["muon"])
    assert {id(p) for p in group["params"]} == {
        id(p) for p in module.net.transformer.block_matrices()
    }
    assert (group["initial_lr"], group["weight_decay"]) == (0.02, 0.3)
    assert all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)


def test_frozen_text_has_no_optimizer():
    module, made_optimizer = optimizer_of(text_lr_ratio=0.0)
    frozen = {id(p) for p in module.net.transformer.parameters()}
    groups = made_optimizer["optimizer"].param_groups
    learned = {id(p) for group in groups for p in group["params"]}
    assert learned == {id(p) for p in module.net.parameters()} - frozen


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_options_of_the_schedule_reach_the_learning_rate(decay):
    """3 steps of warm-up, then 9 steps to a fifth of the peak."""
    options = {"warmup_steps": 3, "min_lr_ratio": 0.2, "lr_decay": decay, "lr": 0.6}
    _, made_optimizer = optimizer_of(**options)
    optimizer, scheduler = made_optimizer["optimizer"], made_optimizer["lr_scheduler"]
    assert scheduler["interval"] == "step"
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler["scheduler"].step()
    progress = torch.arange(10) / 9
    left = (1 + (torch.pi * progress).cos()) / 2 if decay == "cosine" else 1 - progress
    expected = [0.2, 0.4, 0.6, *(0.6 * (0.2 + 0.8 * left)).tolist()]
    assert rates == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------ moving average


@pytest.mark.parametrize("ema_decay", [0.0, 0.3, 0.5])
def test_the_decay_of_the_average_reaches_it(ema_decay, monkeypatch):
    """At step 5 the decay may be at most 6 / 15."""
    module, _ = made(None, latent_channels=3, ema_decay=ema_decay)
    module.configure_model()
    used = []
    monkeypatch.setattr(module_file, "update_ema", lambda ema, net, decay, *_: used.append(decay))
    monkeypatch.setattr("lightning.LightningModule.optimizer_step", lambda self: None)
    module.optimizer_step()
    assert used == {0.0: [], 0.3: [0.3], 0.5: [6 / 15]}[ema_decay]
    assert (module.ema is None) == (ema_decay == 0)
    assert module.inference_net is (module.net if ema_decay == 0 else module.ema)


def test_dropout_is_seeded_by_the_data_and_the_step(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for seed, step in ((3, 5), (4, 5), (3, 6), (3, 5)):
        module, _ = made(None)
        module.config.dropout = 0.5
        module.kept_trainer.global_step = step
        module.kept_trainer.datamodule = SimpleNamespace(seed=seed)
        module.kept_trainer.global_rank = 0
        module.on_train_batch_start(None, 0)
    assert seeds[0] == seeds[3] and len(set(seeds)) == 3
