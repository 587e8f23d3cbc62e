"""Hand-written derivatives against autograd."""

import pytest
import torch
from torch import nn

from tf_lightning.model.layers import RMSNorm, apply_rotary_emb
from tf_lightning.model.transformer import rope_angles

PRECISIONS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
PRECISIONS += [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)]


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(function, x: torch.Tensor, *weights: nn.Parameter) -> list[torch.Tensor]:
    """The value of a function, and the gradients of x and the weights for a random direction."""
    x = x.clone().requires_grad_()
    y = function(x)
    gradients = torch.autograd.grad(y, [x, *weights], normal(*y.shape, seed=1).to(y.dtype))
    return [y.detach(), *gradients]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("dtype", "weight_dtype"), PRECISIONS)
@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 4, 8)])
def test_rms_norm_and_its_gradients_equal_pytorch(shape, dtype, weight_dtype):
    ours, theirs = RMSNorm(shape[-1], 1e-5), nn.RMSNorm(shape[-1], 1e-5)
    x = 3 * normal(*shape)
    for norm in (ours, theirs):
        norm.weight.data = 1 + normal(shape[-1], seed=2) / 4
    exact = outcome(theirs, x, theirs.weight)
    ours.weight.data, x = ours.weight.data.to(weight_dtype), x.to(dtype)
    found = outcome(ours, x, ours.weight)
    assert [y.dtype for y in found] == [dtype, dtype, weight_dtype]
    close = {torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.float(), b, atol=close * b.abs().max().item(), rtol=0)


def test_rms_norm_of_zeros_has_finite_gradients():
    norm = RMSNorm(8, 1e-5)
    assert all(y.isfinite().all() for y in outcome(norm, torch.zeros(3, 8), norm.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_and_its_gradient_equal_complex_multiplication(dtype):
    """RoFormer Eq. 34 in half-split order, on complex numbers."""
    x = normal(2, 5, 3, 8, dtype=dtype)
    angles = torch.arange(5).unsqueeze(-1) * 10_000.0 ** (-torch.arange(4) / 4)  # (T, K / 2)

    def by_formula(x):
        turned = torch.complex(*x.float().chunk(2, dim=-1)) * torch.exp(1j * angles).unsqueeze(-2)
        return torch.cat([turned.real, turned.imag], -1)

    rope = rope_angles(torch.arange(5), 8, 10_000.0)
    found, expected = outcome(lambda x: apply_rotary_emb(x, *rope), x), outcome(by_formula, x)
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b.float(), atol=close, rtol=close)


def test_second_derivatives_of_the_rotary_embedding_are_right_and_those_of_rms_norm_refused():
    x = normal(2, 3, 1, 8, dtype=torch.float64).requires_grad_()
    rope = rope_angles(torch.arange(3), 8, 10_000.0)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary_emb(x, *rope) ** 2, x)
    norm = RMSNorm(8, 1e-5).double()
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
