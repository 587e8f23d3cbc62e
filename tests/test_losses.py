"""The losses against their formulas."""

import pytest
import torch

from tf_lightning.losses import diffusion_loss_sum, lm_loss, total_loss


def test_lm_loss_is_the_negative_log_probability_of_each_target():
    logits, targets = torch.randn(6, 11), torch.tensor([0, 3, 10, 3, 5, 1])
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = -probabilities[torch.arange(6), targets].log()
    torch.testing.assert_close(lm_loss(logits, targets), expected)


def test_lm_loss_of_no_target_adds_nothing():
    logits = torch.randn(0, 11, requires_grad=True)
    total = lm_loss(logits, torch.empty(0, dtype=torch.long)).sum()
    total.backward()
    assert total == 0 and logits.grad.shape == (0, 11)


def test_diffusion_loss_is_the_squared_error_summed():
    output, target = torch.randn(2, 2, 3, 4, 4)
    pairs = zip(output.flatten().tolist(), target.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs)
    assert diffusion_loss_sum(output, target).item() == pytest.approx(expected, rel=1e-5)


def test_losses_are_computed_in_fp32():
    logits, targets = torch.randn(4, 11).bfloat16(), torch.tensor([0, 1, 2, 3])
    assert torch.equal(lm_loss(logits, targets), lm_loss(logits.float(), targets))
    output, target = torch.randn(2, 2, 3, 4, 4).bfloat16()
    loss = diffusion_loss_sum(output, target)
    assert torch.equal(loss, diffusion_loss_sum(output.float(), target.float()))
    assert loss.dtype == torch.float32


def test_the_total_is_weighted_by_lambda():
    assert total_loss(torch.tensor(2.0), torch.tensor(0.5), 5.0) == 4.5
