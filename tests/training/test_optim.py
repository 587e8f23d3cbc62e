"""The learning rate against PyTorch's schedules, and the weights that have weight decay."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from support.tiny import tiny_net
from tf_lightning.training.optim import lr_scale, parameter_groups


def test_the_warm_up_is_linear_and_reaches_the_peak():
    scales = [lr_scale(step, 4, 100, 0.05) for step in range(5)]
    assert scales == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_decays_as_in_pytorch(decay):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = (
        CosineAnnealingLR(optimizer, T_max=90, eta_min=0.05)
        if decay == "cosine"
        else LinearLR(optimizer, start_factor=1.0, end_factor=0.05, total_iters=90)
    )
    for step in range(10, 101):
        assert lr_scale(step, 10, 100, 0.05, decay) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_the_learning_rate_stays_at_its_minimum_after_the_last_step():
    assert lr_scale(100, 10, 100, 0.05) == lr_scale(500, 10, 100, 0.05) == pytest.approx(0.05)


def test_a_run_without_warm_up_starts_at_the_peak():
    assert lr_scale(0, 0, 100, 0.05) == 1


@pytest.mark.parametrize("qk_norm", [True, "layer"])
def test_only_matrices_have_weight_decay(qk_norm):
    net = tiny_net(qk_norm=qk_norm).requires_grad_(True)
    decay, rest = parameter_groups(net, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    kept = {names[id(parameter)] for parameter in rest["params"]}
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert kept == {
        name for name in names.values() if "norm" in name or "embedding" in name or "bias" in name
    }


def test_frozen_weights_are_left_out():
    net = tiny_net().requires_grad_(True)
    net.transformer.requires_grad_(False)
    groups = parameter_groups(net, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(net.patch_coder.parameters()))
