"""LPIPS and self-supervised features: what they compute, and files that are absent or damaged."""

import pytest
import torch
from torchmetrics.functional.image.lpips import _NoTrainLpips

from tf_lightning.autoencoder.losses import LPIPS, LPIPS_WEIGHTS
from tf_lightning.errors import UserError


def test_lpips_is_torchmetrics_and_takes_what_is_out_of_range(squeeze):
    ours, theirs = LPIPS("squeeze"), _NoTrainLpips(net="squeeze")
    images, others = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(ours(images, others), theirs(images, others).mean())
    assert ours(images, images) == 0
    assert ours(images, 1.5 * others).isfinite()


def test_frozen_networks_pass_gradients_on_and_keep_none(squeeze):
    network = LPIPS("squeeze")
    made = torch.zeros(1, 3, 64, 64, requires_grad=True)
    network(torch.rand(1, 3, 64, 64), made).backward()
    assert made.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("damage", [None, b"no weights at all"])
def test_absent_and_damaged_lpips_weights_are_one_sentence(cache, damage):
    file = cache / LPIPS_WEIGHTS["squeeze"].url.rpartition("/")[2]
    if damage:
        file.write_bytes(damage)
    with pytest.raises(UserError) as told:
        LPIPS("squeeze")
    assert str(file) in str(told.value) and "lpips_weight: 0" in str(told.value)
    assert "\n" not in str(told.value)
