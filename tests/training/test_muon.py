"""Muon against PyTorch's class and against the definition of orthogonality."""

import copy

import pytest
import torch

from support.tiny import tiny_net
from tf_lightning.training import optim as muon
from tf_lightning.training.optim import (
    RMS,
    MuonAdamW,
    build_optimizer,
    orthogonalize,
    parameter_groups,
)

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95)}


def test_an_orthogonalized_matrix_has_singular_values_near_one_and_the_same_vectors():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    coefficients = u.mT @ orthogonalize(matrices) @ vh.mT  # diagonal: the new singular values
    values = coefficients.diagonal(dim1=-2, dim2=-1)
    assert 0.7 < values.min() and values.max() < 1.3
    torch.testing.assert_close(coefficients, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_singular_values_that_differ_a_hundredfold_become_one_within_a_quarter():
    values = torch.logspace(0, -2, 8)
    made = orthogonalize(torch.diag(values)[None])[0].diagonal()
    assert (made - 1).abs().max() < 0.27


def test_matrices_of_rank_one_stay_bounded_in_bf16():
    generator = torch.Generator().manual_seed(0)
    columns, rows = (torch.randn(100, *shape, generator=generator) for shape in ((16, 1), (1, 40)))
    made = orthogonalize(
        (columns @ rows).bfloat16()
    ).float()  # the largest singular value is the norm
    assert 0.7 < torch.linalg.matrix_norm(made, 2).min()
    assert torch.linalg.matrix_norm(made, 2).max() < 1.3


def gradients(step: int, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_updates_equal_those_of_pytorchs_muon_with_its_coefficients(monkeypatch):
    monkeypatch.setattr(muon, "COEFFICIENTS", [(3.4445, -4.7750, 2.0315)] * 5)
    shapes = [(16, 24), (24, 16), (16, 16), (24, 16)]
    ours, theirs = ([torch.nn.Parameter(x) for x in gradients(99, *shapes)] for _ in range(2))
    group = {"params": ours, "muon": True, "weight_decay": 0.1}
    optimizer = MuonAdamW([group], **OPTIONS, bf16=True)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for a, b, gradient in zip(ours, theirs, gradients(step, *shapes), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    for a, b, start in zip(ours, theirs, gradients(99, *shapes), strict=True):
        moved = (b - start).abs().max()
        assert moved > 0.02
        torch.testing.assert_close(a, b, atol=0.03 * moved.item(), rtol=0)  # both compute in bf16


def test_an_update_is_as_large_as_adamws_in_both_precisions():
    for bf16 in (False, True):
        (start,) = gradients(0, (32, 48))
        parameter = torch.nn.Parameter(start.clone())
        group = {"params": [parameter], "muon": True, "weight_decay": 0.0}
        optimizer = MuonAdamW([group], **OPTIONS, bf16=bf16)
        parameter.grad = gradients(1, (32, 48))[0]
        optimizer.step()
        size = (parameter - start).square().mean().sqrt().item()
        assert size == pytest.approx(0.02 * RMS, rel=0.2)


def stepped(muon: bool):
    """A network and its optimizer after three steps, and the weights before."""
    net = tiny_net().requires_grad_(True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    facts = {"weight_decay": 0.1, "text_lr_ratio": 1.0, "muon": muon, "bf16": False}
    optimizer = build_optimizer(net, **OPTIONS, **facts)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return net, optimizer, before


def test_other_parameters_move_exactly_as_with_adamw():
    (ours, optimizer, before), (plain, _, _) = stepped(muon=True), stepped(muon=False)
    matrices = {id(p) for p in ours.transformer.block_matrices()}
    assert len(matrices) == 2 * 7
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) == (id(a) not in matrices), name
        assert not torch.equal(a, before[name])
        keys = {"momentum"} if id(a) in matrices else {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[a].keys() == keys


def test_an_optimizer_continues_from_its_state():
    net, optimizer, _ = stepped(muon=True)
    other, resumed, _ = stepped(muon=True)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(net.state_dict())
    resumed.state.clear()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        a.grad = b.grad = torch.ones_like(a)
    optimizer.step()
    resumed.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_parameter_is_in_one_group():
    net = tiny_net(qk_norm=True, modality_weights="all").requires_grad_(True)
    groups = parameter_groups(net, 0.1, muon=True)
    assert [group["name"] for group in groups] == ["decay", "no_decay", "muon"]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, net.parameters()))
    assert len(groups[2]["params"]) == 2 * 2 * 7
