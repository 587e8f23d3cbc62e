"""LPIPS: its values, its gradients, and weights that are missing or damaged."""

import pytest
import torch
from torchmetrics.functional.image.lpips import _NoTrainLpips

from tf_lightning.autoencoder.losses import LPIPS, LPIPS_WEIGHTS
from tf_lightning.errors import UserError


def test_lpips_equals_torchmetrics_and_accepts_values_out_of_range(squeezenet_weights):
    ours, theirs = LPIPS("squeeze"), _NoTrainLpips(net="squeeze")
    images, others = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(ours(images, others), theirs(images, others).mean())
    assert ours(images, images) == 0
    assert ours(images, 1.5 * others).isfinite()


def test_frozen_networks_pass_gradients_to_their_input_only(squeezenet_weights):
    network = LPIPS("squeeze")
    made = torch.zeros(1, 3, 64, 64, requires_grad=True)
    network(torch.rand(1, 3, 64, 64), made).backward()
    assert made.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("damage", [None, b"no weights at all"])
def test_missing_or_damaged_weights_are_refused_in_one_sentence(torchvision_folder, damage):
    file = torchvision_folder / LPIPS_WEIGHTS["squeeze"].url.rpartition("/")[2]
    if damage:
        file.write_bytes(damage)
    with pytest.raises(UserError) as caught:
        LPIPS("squeeze")
    assert str(file) in str(caught.value) and "lpips_weight: 0" in str(caught.value)
    assert "\n" not in str(caught.value)
