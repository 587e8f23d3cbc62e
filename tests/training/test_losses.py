"""The losses against their formulas."""

import math
from functools import partial

import pytest
import torch

from support.tiny import VOCAB_SIZE, mixed_batch, tiny_module, tiny_net
from tf_lightning.diffusion.process import diffusion_loss_sum
from tf_lightning.model import transfusion
from tf_lightning.training.losses import lm_loss, loss_sums, total_loss, z_loss


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


def record(sizes: list[int], layer, inputs, output) -> None:
    """Keep the number of rows of a layer's output."""
    sizes.append(len(output))


@pytest.mark.parametrize("vocabulary", [{}, {"pretrained_vocab_size": VOCAB_SIZE - 2}])
def test_losses_computed_in_chunks_equal_those_of_all_logits(monkeypatch, vocabulary):
    sums = []
    for limit in (transfusion.MAX_LOGITS, 3 * VOCAB_SIZE):  # 3 targets a chunk
        monkeypatch.setattr(transfusion, "MAX_LOGITS", limit)
        net, most = tiny_net(**vocabulary).requires_grad_(True), []
        net.transformer.output.register_forward_hook(partial(record, most))
        process = tiny_module().process
        sums.append(loss_sums(net, mixed_batch(), process, causal_images=False, with_z=True))
        (sums[-1].nll.square().sum() + sums[-1].z + sums[-1].diffusion).backward()
        sums[-1] = [*sums[-1], *(weight.grad for weight in net.parameters())]
    assert len(sums[0][0]) > 9 and max(most) == 3
    for chunked, whole in zip(*sums, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-5)


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
