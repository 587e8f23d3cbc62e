"""Muon: a matrix moves by its momentum made orthogonal (Jordan et al. 2024); AdamW for the rest.

Each update has the root mean square of AdamW's, so that both share one learning rate and one weight
decay (Liu et al. 2025, arXiv 2502.16982, Eq. 4).

Shapes: n matrices of one shape (a, b), a <= b.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Polar Express (Amsel et al. 2025, arXiv 2505.16932) for singular values from 0.0025 to 1: each
# the odd polynomial of degree 5 that is nearest to 1 on what those before it have made of them.
COEFFICIENTS = (
    (8.4052, -24.8508, 18.4246),
    (4.0772, -3.0350, 0.5722),
    (3.6058, -2.6996, 0.5340),
    (2.6177, -1.9413, 0.4486),
)
RMS = 0.2  # of AdamW's updates, as a rule


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T: its singular values become 0.75 to 1.25.

    Of the norm, which is at least the largest of them, those under 1 / 400 stay smaller.

    Args:
        matrices: (n, a, b) with a <= b, in the precision to compute in.
    """
    # 2 % more than the norm: above 1 the polynomials grow, and bf16 rounds.
    x = matrices / (1.02 * matrices.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7)
    for first, third, fifth in COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first
        )
    return x


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Nesterov, momentum 0.95) for groups with `muon: True`, AdamW for the others.

    Args:
        groups: parameter groups; those of Muon hold matrices alone.
        lr: learning rate of all.
        betas: AdamW's.
        bf16: orthogonalise in bf16, which is exact enough, where that is fast.
    """

    momentum = 0.95

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], bf16: bool):
        groups = [{"muon": False} | group for group in groups]
        self.adamw = torch.optim.AdamW(groups, lr, betas, fused=True)
        super().__init__(self.adamw.param_groups, self.adamw.defaults)
        self.precision = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self.step_matrices(group)
        # Its state and groups are ours, which are other objects once a checkpoint was loaded.
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.step()
        return loss

    def step_matrices(self, group: dict) -> None:
        """Those of one shape, or of its transpose, together."""
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        for shape, parameters in shapes.items():
            wide = [self.update(parameter) for parameter in parameters]
            moves = orthogonal(torch.stack(wide).to(self.precision))  # (n, a, b)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            size = group["lr"] * RMS * max(shape) ** 0.5
            for parameter, move in zip(parameters, moves, strict=True):
                move = (move.mT if parameter.shape[0] > parameter.shape[1] else move).contiguous()
                if isinstance(parameter, DTensor):
                    move = distribute_tensor(move, parameter.device_mesh, parameter.placements)
                parameter.add_(move.to(parameter.dtype), alpha=-size)

    def update(self, parameter: nn.Parameter) -> Tensor:
        """What is to be made orthogonal: the gradient ahead of its momentum; whole, and wide."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        ahead = parameter.grad.lerp(state["momentum"], self.momentum)
        ahead = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        return ahead.mT if ahead.shape[0] > ahead.shape[1] else ahead
