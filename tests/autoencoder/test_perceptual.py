"""LPIPS and self-supervised features: what they compute, and files that are absent or damaged."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchvision import models

from tf_lightning.autoencoder.losses import LPIPS, LPIPS_WEIGHTS, FeatureDistance
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


def resnet(depth=models.resnet18):
    torch.manual_seed(0)
    return depth().eval()


@pytest.mark.parametrize("depth", [models.resnet18, models.resnet34, models.resnet50])
def test_feature_distance_is_that_of_the_stages(tmp_path, depth):
    network = resnet(depth)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    distance = FeatureDistance(str(tmp_path / "weights.pth"))
    images, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1

    def stages(x):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
        x = network.maxpool(F.relu(network.bn1(network.conv1((x * 0.5 + 0.5 - mean) / std))))
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = layer(x)
            yield x

    wanted = 0.0  # |a - b|^2 = 2 - 2 cos of unit vectors
    for a, b in zip(stages(images), stages(others), strict=True):
        wanted = wanted + (2 - 2 * F.cosine_similarity(a, b)).mean()
    torch.testing.assert_close(distance(images, others), wanted)
    assert distance(images, images) == 0


def test_feature_models_come_as_their_authors_offer_them(tmp_path):
    weights = resnet().state_dict()
    moco = {f"module.encoder_q.{name}": w for name, w in weights.items()}
    moco |= {f"module.encoder_k.{name}": w + 1 for name, w in weights.items() if w.ndim}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": moco}, tmp_path / "moco.pth.tar")
    save_file(weights, tmp_path / "plain.safetensors")
    images, others = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    one, two = (
        FeatureDistance(str(tmp_path / name))(images, others)
        for name in ("moco.pth.tar", "plain.safetensors")
    )
    assert one == two > 0


def test_feature_models_that_do_not_fit_are_one_sentence(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    weights = resnet().state_dict()
    del weights["layer2.0.conv1.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    for name in ("absent.pth", "broken.safetensors", "part.safetensors"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as told:
            FeatureDistance(str(tmp_path / name))
        assert "\n" not in str(told.value)
