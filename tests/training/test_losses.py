"""The losses against their formulas."""

import math

import pytest
import torch

from tf_lightning.diffusion.process import diffusion_loss_sum
from tf_lightning.training.losses import lm_loss, total_loss, z_loss


def test_lm_loss_is_the_negative_log_probability_of_each_target():
    logits, targets = torch.randn(6, 11), torch.tensor([0, 3, 10, 3, 5, 1])
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = -probabilities[torch.arange(6), targets].log()
    torch.testing.assert_close(lm_loss(logits, targets), expected)


def test_lm_loss_of_no_target_is_zero():
    logits = torch.randn(0, 11, requires_grad=True)
    total = lm_loss(logits, torch.empty(0, dtype=torch.long)).sum()
    total.backward()
    assert total == 0 and logits.grad.shape == (0, 11)


def test_z_loss_is_the_squared_logarithm_of_the_partition_function():
    logits = 3 * torch.randn(6, 11) - 2
    expected = torch.tensor([math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()])
    torch.testing.assert_close(z_loss(logits), expected)
    # A shift of all logits changes this loss only; its gradient is 2 log Z softmax.
    logits.requires_grad_()
    z_loss(logits).sum().backward()
    by_hand = 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1)
    torch.testing.assert_close(logits.grad, by_hand)
    low = logits.detach().bfloat16()
    assert torch.equal(z_loss(low), z_loss(low.float())) and z_loss(low).dtype == torch.float32


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
