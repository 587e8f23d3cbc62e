"""Text parameters that are frozen or have their own learning rate (LMFusion)."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support.tiny import SIZES, VOCAB_SIZE, document, mixed_batch, packed
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.training.module import Transfusion


def optimizer_of(module: Transfusion) -> torch.optim.Optimizer:
    module._trainer = SimpleNamespace(max_steps=10, precision="32-true", callbacks=[])
    return module.configure_optimizers()["optimizer"]


def stepped(module: Transfusion) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """Take one optimizer step on both losses; return the optimizer and the weights before it."""
    optimizer = optimizer_of(module)
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    nll, _, loss_diffusion, *_ = module.loss_sums(module.net, mixed_batch())
    (nll.sum() + loss_diffusion).backward()
    optimizer.step()
    return optimizer, before


def is_image_side(name: str) -> bool:
    return name.startswith(("patch_coder.", "transformer.image_layers."))


@pytest.mark.parametrize("modality_weights", ["shared", "ffn", "all"])
def test_frozen_weights_get_no_gradient_and_no_optimizer_state(modality_weights):
    torch.manual_seed(0)
    config = TransformerConfig(VOCAB_SIZE, **SIZES, modality_weights=modality_weights)
    module = Transfusion(config, latent_channels=3, text_lr_ratio=0.0, warmup_steps=1)
    module.configure_model()
    torch.nn.init.normal_(module.net.patch_coder.patch_decoder.weight, std=0.2)
    optimizer, before = stepped(module)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.net.named_parameters():
        image = is_image_side(name)
        assert (parameter.grad is not None) == image, name
        assert (id(parameter) in known) == (parameter in optimizer.state) == image, name
        assert torch.equal(parameter, before[name]) != image, name


def test_text_parameters_have_their_own_learning_rate():
    config = TransformerConfig(VOCAB_SIZE, **SIZES, modality_weights="all")
    rates = {"lr": 1e-3, "text_lr_ratio": 0.1, "weight_decay": 0.0, "warmup_steps": 1}
    module = Transfusion(config, latent_channels=3, **rates)
    module.configure_model()
    torch.nn.init.normal_(module.net.patch_coder.patch_decoder.weight, std=0.2)
    torch.nn.init.normal_(module.net.patch_coder.patch_decoder.bias, std=0.2)
    optimizer, before = stepped(module)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["decay", "no_decay", "text_decay", "text_no_decay"]
    for name, parameter in module.net.named_parameters():
        # The first step of Adam is as large as the learning rate.
        step = (parameter - before[name]).abs().max().item()
        expected = 1e-3 if is_image_side(name) else 1e-4
        assert step == pytest.approx(expected, rel=0.05), name


def test_a_batch_of_text_can_be_trained_on_with_frozen_text_parameters():
    config = TransformerConfig(VOCAB_SIZE, **SIZES, modality_weights="all")
    module = Transfusion(config, latent_channels=3, text_lr_ratio=0.0)
    module.configure_model()
    nll, _, loss_diffusion, *_ = module.loss_sums(module.net, packed([[document("9")]]))
    (nll.sum() + loss_diffusion).backward()
    gradients = [p.grad for p in module.net.parameters() if p.requires_grad]
    assert gradients and not any(gradient.any() for gradient in gradients)
