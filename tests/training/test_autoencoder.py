"""Training an autoencoder: gradients of each loss, exact resume, ranks, and mistakes."""

import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from support import autoencoder_runs as aruns
from support import runs
from support.compare import bit_equal
from support.ranks import run_ranks
from tf_lightning.autoencoder import losses
from tf_lightning.autoencoder.network import AutoencoderConfig
from tf_lightning.cli.main import main
from tf_lightning.training.autoencoder import AutoencoderModule

KINDS = {"vae": {}, "vq": aruns.VQ}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    """The autoencoder's type and the folder of its finished run; tests do not modify it."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, aruns.fit(folder, **KINDS[request.param])


def load(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def logged(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), {"images": 0, "scalars": 0}).Reload()


# A run


def test_losses_and_metrics_are_logged_under_their_names(trained):
    kind, run = trained
    events = logged(run)
    steps = {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    always = ["train/loss", "train/loss_l1", "train/grad_norm", "train/steps_left_out"]
    always += {"vae": ["train/loss_kl"], "vq": ["train/loss_codebook"]}[kind]
    always += ["train/code_perplexity", "train/dead_codes"] if kind == "vq" else []
    groups = ("decay", "no_decay", "discriminator_decay", "discriminator_no_decay")
    always += [f"lr-AdamW/{group}" for group in groups]
    gan = ["train/loss_gan", "train/loss_discriminator", "train/gan_scale"]
    val = ["val/loss_l1", "val/psnr", "val/ssim", "val/rfid[shapes]"]
    val += ["val/code_use", "val/code_perplexity", "val/dead_codes"] if kind == "vq" else []
    assert steps.pop("epoch")
    assert steps == dict.fromkeys(always, 6) | dict.fromkeys(gan, 3) | dict.fromkeys(val, 2)
    assert len(events.Images("reconstructions/val")) == 2


def test_the_logged_loss_is_the_weighted_sum_of_its_terms(trained):
    kind, run = trained
    events = logged(run)
    value = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    bottleneck, weight = ("codebook", 1.0) if kind == "vq" else ("kl", 1e-3)
    for step in range(6):
        told = value["train/loss_l1"][step] + weight * value[f"train/loss_{bottleneck}"][step]
        if step >= aruns.GAN_START:
            gan, own, scale = (
                value[f"train/{name}"][step - aruns.GAN_START]
                for name in ("loss_gan", "loss_discriminator", "gan_scale")
            )
            told += own + 0.5 * scale * gan
        assert value["train/loss"][step] == pytest.approx(told, rel=1e-5)


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(trained, tmp_path):
    kind, run = trained
    kill = ["--trainer.callbacks+=support.runs.StopAt", "--trainer.callbacks.step=5"]
    with pytest.raises(runs.Killed):
        aruns.fit(tmp_path, *kill, **KINDS[kind])
    assert load(tmp_path / "run")["global_step"] == 5  # saved when it crashed
    resumed = load(aruns.fit(tmp_path, "--ckpt_path", "last", **KINDS[kind]))
    whole = load(run)
    assert whole["global_step"] == resumed["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ImageData"):
        assert bit_equal(whole[part], resumed[part]), part
    assert not bit_equal(whole["state_dict"], load(run, "step0000003")["state_dict"])
    assert whole["ImageData"] == {"next_row": 12, "global_step": 6, "seed": 0}


def test_the_position_in_the_data_is_found_in_an_old_checkpoint(trained):
    """ImageData was PictureData in checkpoints of version 0.1."""
    _, run = trained
    checkpoint = load(run)
    checkpoint["PictureData"] = checkpoint.pop("ImageData")
    small_module().on_load_checkpoint(checkpoint)
    assert checkpoint["ImageData"] == {"next_row": 12, "global_step": 6, "seed": 0}


def test_a_discriminator_that_has_not_started_has_no_state_and_its_first_weights(trained):
    _, run = trained
    early, late = load(run, "step0000003"), load(run)

    def with_state(checkpoint: dict) -> dict[str, bool]:
        optimizer = checkpoint["optimizer_states"][0]
        return {
            group["name"]: all(number in optimizer["state"] for number in group["params"])
            for group in optimizer["param_groups"]
        }

    assert with_state(early) == {
        **{"decay": True, "no_decay": True},
        **{"discriminator_decay": False, "discriminator_no_decay": False},
    }
    assert all(with_state(late).values())
    names = [name for name in early["state_dict"] if name.startswith("discriminator.")]
    assert names
    moved = [n for n in names if not torch.equal(early["state_dict"][n], late["state_dict"][n])]
    assert len(moved) > len(names) // 2


def test_validate_on_a_checkpoint_equals_validation_in_fit(trained, tmp_path):
    _, run = trained
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    main(["validate", "-c", str(run / "config.yaml"), "--ckpt_path", checkpoint])
    in_fit = (run / "metrics" / "step0000006-val.json").read_text()
    alone = (run / "validate" / "metrics.json").read_text()
    assert in_fit[in_fit.index('"numbers"') :] == alone[alone.index('"numbers"') :]
    one, two = (
        (folder / "autoencoder" / "diffusion_pytorch_model.safetensors").read_bytes()
        for folder in (run, run / "validate")
    )
    assert one == two


# Gradients of each loss


def small_module(**arguments) -> AutoencoderModule:
    torch.manual_seed(0)
    network = AutoencoderConfig((4, 8), 1, 2, norm_groups=2, mid_attention=False)
    module = AutoencoderModule(network, **{"lpips_weight": 0.0} | arguments)
    module.configure_model()
    return module


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters()}


@pytest.mark.parametrize("adaptive", [True, False])
def test_one_backward_gives_each_network_the_gradient_of_its_own_loss(adaptive):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    ours, theirs = (small_module(adaptive_gan=adaptive) for _ in range(2))
    made = ours.reconstruct(images).images
    reconstruction = (made - images).abs().mean()
    (reconstruction + ours.adversarial(images, made, reconstruction)[0]).backward()

    # The usual implementation: two steps, each with the other network frozen.
    theirs.discriminator.requires_grad_(False)
    made = theirs.reconstruct(images).images
    reconstruction = (made - images).abs().mean()
    gan = losses.gan_loss(theirs.discriminator(made))
    last, scale = theirs.autoencoder.decoder.conv_out.weight, 1.0
    if adaptive:
        norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm()
                 for x in (reconstruction, gan)]  # fmt: skip
        scale = norms[0] / (norms[1] + 1e-4)
    (reconstruction + 0.5 * scale * gan).backward()
    theirs.discriminator.requires_grad_(True)
    theirs.autoencoder.requires_grad_(False)
    real, fake = theirs.discriminator(images), theirs.discriminator(made.detach())
    losses.discriminator_loss(real, fake).backward()

    wanted = gradients(theirs)
    assert any(name.startswith("discriminator") for name in wanted)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_frozen_networks_are_neither_saved_nor_optimized(squeezenet_weights, tmp_path):
    changes = {"lpips_weight": 1.0, "lpips_network": "squeeze", "gan_weight": 0.0}
    run = aruns.fit(tmp_path, "--trainer.max_steps", "3", **changes)
    checkpoint = load(run)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"autoencoder"}
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    counted = sum(len(group["params"]) for group in groups)
    assert counted == len(checkpoint["state_dict"])
    assert len(logged(run).Scalars("train/loss_lpips")) == 3


def test_a_vq_starts_with_codes_at_its_encoder_outputs(tmp_path):
    changes = aruns.VQ | {"lr": 0.0, "gan_weight": 0.0}
    run = aruns.fit(tmp_path / "on", "--trainer.max_steps", "3", **changes)
    codebook = load(run)["state_dict"]["autoencoder.quantize.embedding.weight"]
    assert codebook.abs().max() > 1 / 16  # diffusers initializes uniformly within 1/16
    changes["restart_dead_codes"] = False
    run = aruns.fit(tmp_path / "off", "--trainer.max_steps", "3", **changes)
    codebook = load(run)["state_dict"]["autoencoder.quantize.embedding.weight"]
    assert codebook.abs().max() <= 1 / 16


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_two_batches_a_step_equal_one_with_the_same_images(kind, tmp_path):
    def few(config: dict) -> None:
        # In double precision: a convolution rounds one image differently from two, and Adam
        # amplifies the difference.
        config["trainer"] |= {"max_steps": 4, "val_check_interval": 4, "precision": "64-true"}
        config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 4

    values = {}
    for ranks, pictures in ((1, 4), (2, 1)):
        folder = tmp_path / f"ranks{ranks}"
        path = aruns.write_config(folder, few, **KINDS[kind])
        arguments = ["fit", "-c", str(path), f"--data.init_args.batch_size={pictures}"]
        arguments += [f"--trainer.devices={ranks}", f"--trainer.accumulate_grad_batches={ranks}"]
        if ranks == 1:
            main(arguments)
        else:
            run_ranks([*arguments, "--trainer.strategy=ddp"], ranks)
        values[ranks] = folder / "run"
    one, two = (logged(run) for run in values.values())
    assert one.Tags()["scalars"] == two.Tags()["scalars"]
    for tag in one.Tags()["scalars"]:
        a, b = ([event.value for event in events.Scalars(tag)] for events in (one, two))
        assert a == pytest.approx(b, rel=1e-5), tag
    first, second = map(load, values.values())
    for name, weight in first["state_dict"].items():
        if name.startswith("autoencoder."):
            theirs = second["state_dict"][name]
            torch.testing.assert_close(weight, theirs, atol=1e-6, rtol=0, msg=name)
    # The first step of Adam is the sign of the gradient, which rounding decides near zero. The
    # discriminator has taken one step only, so its gradients are compared.
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        ours, theirs = state["exp_avg"], states[1][number]["exp_avg"]
        close = 1e-6 * float(ours.abs().max()) + 1e-7
        torch.testing.assert_close(ours, theirs, atol=close, rtol=0)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gan_start_step": 6}, "gan_start_step=6 is not before the last step (max_steps=6)"),
        ({"lpips_weight": 1.0}, "lpips_weight: 0"),
        ({"network": {"channels": [4] * 8}}, "images of 64x64 pixels are not divisible"),
        ({"network": {"channels": [3, 4]}}, "norm_groups=2"),
        (aruns.VQ | {"latent_noise": 0.1}, "latent_noise=0.1"),
    ],
)
def test_mistakes_are_reported_before_images_are_read(
    changes, told, torchvision_folder, tmp_path, refused
):
    assert told in refused("fit", "-c", aruns.write_config(tmp_path / "it", **changes))
    assert not (tmp_path / "it" / "data").exists()


def test_checkpoints_of_the_wrong_kind_and_damaged_ones_are_refused(
    trained, run, tmp_path, refused
):
    kind, folder = trained
    ours, theirs = folder / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt"
    config = folder / "config.yaml"
    assert "a Transfusion model's" in refused("validate", "-c", config, "--ckpt_path", theirs)
    told = refused("validate", "-c", run / "config.yaml", "--ckpt_path", ours)
    assert "an autoencoder's" in told
    assert "an autoencoder's" in refused("generate", ours, "a red circle", "-o", tmp_path)
    (tmp_path / "half.ckpt").write_bytes(ours.read_bytes()[:5000])
    told = refused("fit", "-c", config, "--ckpt_path", tmp_path / "half.ckpt")
    assert "damaged" in told
    other = aruns.write_config(tmp_path / "other", **(aruns.VQ if kind == "vae" else {}))
    (tmp_path / "other" / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(ours, tmp_path / "other" / "run" / "checkpoints" / "last.ckpt")
    assert "differs from the checkpoint's" in refused("fit", "-c", other, "--ckpt_path", "last")
