"""Learning-rate schedule and parameter groups.

Muon: a matrix moves by its momentum made orthogonal (Jordan et al. 2024); AdamW for the rest.

Each update has the root mean square of AdamW's, so that both share one learning rate and one weight
decay (Liu et al. 2025, arXiv 2502.16982, Eq. 4).

Shapes: n matrices of one shape (a, b), a <= b.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tf_lightning.model.transfusion import TransfusionModel

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


DECAYS = {  # from 1 to 0, by progress from 0 to 1
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
}


def lr_scale(
    step: int, warmup_steps: int, max_steps: int, min_lr_ratio: float, decay: str = "cosine"
) -> float:
    """Linear warm-up, then from 1 to min_lr_ratio at max_steps; a factor of the peak lr.

    The decay is a "cosine", or "linear", which made the better of short runs that end at zero
    (Bergsma et al. 2025, arXiv 2502.15938). Transfusion: 4,000 warm-up steps, 250,000 steps, a
    cosine to 1.5e-5 / 3e-4 = 0.05.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * DECAYS[decay](progress)


def parameter_groups(net: TransfusionModel, weight_decay: float, muon: bool = False) -> list[dict]:
    """Matrices decay; vectors (norms, biases) and embeddings do not.

    With `muon` the blocks' matrices are a group of their own, for `MuonAdamW`.
    """
    embeddings = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    decays = lambda p: p.ndim >= 2 and id(p) not in embeddings  # noqa: E731
    parameters = [p for p in net.parameters() if p.requires_grad]
    inner = {id(p) for p in net.transformer.block_matrices()} if muon else set()
    groups = [
        {
            "name": "decay",
            "params": [p for p in parameters if decays(p) and id(p) not in inner],
            "weight_decay": weight_decay,
        },
        {
            "name": "no_decay",
            "params": [p for p in parameters if not decays(p)],
            "weight_decay": 0.0,
        },
    ]
    if muon:
        matrices = [p for p in parameters if id(p) in inner]
        groups.append(
            {"name": "muon", "params": matrices, "weight_decay": weight_decay, "muon": True}
        )
    return groups


def with_text_lr(groups: list[dict], text: list[nn.Parameter], lr: float) -> list[dict]:
    """Each group in two: what is not of the text side as it was, and what is, learning at `lr`."""
    names = {id(parameter) for parameter in text}
    image = [
        group | {"params": [p for p in group["params"] if id(p) not in names]} for group in groups
    ]
    own = [
        group
        | {"name": f"text_{group['name']}", "lr": lr}
        | {"params": [p for p in group["params"] if id(p) in names]}
        for group in groups
    ]
    return image + own


def build_optimizer(
    net: TransfusionModel,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    text_lr_ratio: float,
    muon: bool,
    bf16: bool,
) -> torch.optim.Optimizer:
    """AdamW, or Muon for the blocks' matrices with AdamW for the rest.

    Args:
        net: what learns.
        lr: peak learning rate.
        betas: AdamW's.
        weight_decay: on matrices.
        text_lr_ratio: learning rate of the text side as a share of `lr`.
        muon: whether it is used.
        bf16: whether that is the precision of this run, so that Muon may compute in it.
    """
    groups = parameter_groups(net, weight_decay, muon)
    if 0 < text_lr_ratio < 1:
        groups = with_text_lr(groups, net.transformer.text_parameters(), text_lr_ratio * lr)
    if muon:
        return MuonAdamW(groups, lr, betas, bf16)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
