"""Optimizers: parameter groups, learning-rate schedule, AdamW and Muon.

A checkpoint holds the state of an optimizer. Rates, decays and schedule come from the run's
configuration, also when it resumes.

Shapes: n matrices of one shape (a, b), a <= b.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.lr_scheduler import LambdaLR

from tf_lightning.model.transfusion import TransfusionModel


def build_optimizer(
    net: TransfusionModel,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    text_lr_ratio: float,
    muon: bool,
    bf16: bool,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

    Args:
        net: the network.
        lr: peak learning rate.
        betas: decay rates of AdamW.
        weight_decay: weight decay of matrices.
        text_lr_ratio: learning rate of the text parameters as a share of `lr`, in [0, 1].
        muon: use Muon.
        bf16: let Muon compute in bf16; for runs in that precision.
        fused: use PyTorch's fused AdamW. Under a GradScaler it would divide the gradients by the
            scale only in its step, after they are clipped.
    """
    groups = parameter_groups(net, weight_decay, muon)
    if 0 < text_lr_ratio < 1:
        groups = split_text_groups(groups, net.transformer.text_parameters(), text_lr_ratio * lr)
    if muon:
        return MuonAdamW(groups, lr, betas, bf16)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def parameter_groups(net: nn.Module, weight_decay: float, muon: bool = False) -> list[dict]:
    """Group the trainable parameters: matrices have weight decay, vectors and embeddings do not.

    Args:
        net: any network; a TransfusionModel for Muon.
        weight_decay: weight decay of matrices and convolution kernels.
        muon: put the matrices of the blocks into a separate group, for `MuonAdamW`.
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


def split_text_groups(groups: list[dict], text: list[nn.Parameter], lr: float) -> list[dict]:
    """Split each group into image and text parameters; the text parameters use `lr`."""
    text_ids = {id(parameter) for parameter in text}
    image_groups = [
        group | {"params": [p for p in group["params"] if id(p) not in text_ids]}
        for group in groups
    ]
    text_groups = [
        group
        | {"name": f"text_{group['name']}", "lr": lr}
        | {"params": [p for p in group["params"] if id(p) in text_ids]}
        for group in groups
    ]
    return image_groups + text_groups


# ---------------------------------------------------------------- learning-rate schedule

DECAYS = {  # from 1 to 0, as a function of progress from 0 to 1
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
}


def lr_scale(
    step: int, warmup_steps: int, max_steps: float, min_lr_ratio: float, decay: str = "cosine"
) -> float:
    """Factor of the peak learning rate at an optimizer step, in (0, 1].

    It rises linearly during warm-up, then decays to `min_lr_ratio` at `max_steps`. Transfusion
    uses 4,000 warm-up steps, 250,000 steps and a cosine to 1.5e-5 / 3e-4 = 0.05. A linear decay to
    zero is better for short runs (Bergsma et al. 2025, arXiv 2502.15938).

    Args:
        step: number of finished optimizer steps.
        warmup_steps: optimizer steps of warm-up.
        max_steps: optimizer steps of the run; infinity: no decay.
        min_lr_ratio: last learning rate as a share of the peak.
        decay: "cosine" or "linear".
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * DECAYS[decay](progress)


class Schedule(LambdaLR):
    """A LambdaLR that keeps its own peak rates when it resumes."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step of a checkpoint."""
        super().load_state_dict(state_dict | {"base_lrs": self.base_lrs})
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


def keep_options(optimizer: torch.optim.Optimizer) -> None:
    """Let a checkpoint restore the optimizer's state, but not the options of its groups."""

    def keep(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved, groups = state_dict["param_groups"], optimizer.param_groups
        if len(saved) != len(groups):
            return state_dict  # torch refuses it
        kept = [
            old | {name: value for name, value in group.items() if name != "params"}
            for old, group in zip(saved, groups, strict=True)
        ]
        return state_dict | {"param_groups": kept}

    optimizer.register_load_state_dict_pre_hook(keep)


def with_schedule(optimizer: torch.optim.Optimizer, scale: Callable[[int], float]) -> dict:
    """Return the optimizer and its learning-rate schedule in the form of `configure_optimizers`.

    Args:
        optimizer: its rates are the peak rates.
        scale: factor of the peak rates after a number of finished optimizer steps.
    """
    keep_options(optimizer)
    schedule = Schedule(optimizer, scale)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ---------------------------------------------------------------- Muon

# Polar Express (Amsel et al. 2025, arXiv 2505.16932) for singular values from 0.0025 to 1. Each is
# the odd polynomial of degree 5 that brings the values left by the previous ones closest to 1.
COEFFICIENTS = (
    (8.4052, -24.8508, 18.4246),
    (4.0772, -3.0350, 0.5722),
    (3.6058, -2.6996, 0.5340),
    (2.6177, -1.9413, 0.4486),
)
RMS = 0.2  # typical root mean square of an AdamW update


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix U S V^T: singular values become 0.75 to 1.25.

    Singular values below 1 / 400 of the matrix norm stay smaller.

    Args:
        matrices: (n, a, b) with a <= b, in the precision to compute in.
    """
    # Divide by 2 % more than the norm: the polynomials grow above 1, and bf16 rounds.
    x = matrices / (1.02 * matrices.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7)
    for first, third, fifth in COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first
        )
    return x


def orthogonalize_all(matrices: list[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Orthogonalize matrices of one shape, or of it and its transpose.

    Sharded matrices must all have one shape. Each rank then computes its share of them: it receives
    the other rows of its matrices, and sends back the rows of the results.

    Args:
        matrices: (a, b) or (b, a) each.
        precision: to compute in.

    Returns:
        A matrix for each one given, in `precision`, and sharded alike.
    """
    if not isinstance(matrices[0], DTensor):
        wide = orthogonalize(torch.stack([as_wide(m) for m in matrices]).to(precision))
        pairs = zip(wide, matrices, strict=True)
        return [(w.mT if is_tall(m) else w).contiguous() for w, m in pairs]
    rows = torch.stack(matrices).to(precision)  # (n, a, b), of which a rank has rows of each matrix
    by_matrix = [Shard(0) if p.is_shard() else p for p in rows.placements]
    whole = rows.redistribute(placements=by_matrix)
    mine = orthogonalize(as_wide(whole.to_local()))
    mine = mine.mT if is_tall(whole) else mine
    layout = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
    made = DTensor.from_local(mine.contiguous(), whole.device_mesh, by_matrix, **layout)
    return list(made.redistribute(placements=rows.placements).unbind())


def is_tall(matrices: Tensor) -> bool:
    """Return whether matrices (..., a, b) have more rows than columns."""
    return matrices.shape[-2] > matrices.shape[-1]


def as_wide(matrices: Tensor) -> Tensor:
    """Transpose matrices (..., a, b) that have more rows than columns."""
    return matrices.mT if is_tall(matrices) else matrices


class MuonAdamW(torch.optim.Optimizer):
    """Muon for parameter groups with `muon: True`, AdamW for the others.

    Muon moves a matrix by its orthogonalized momentum (Jordan et al. 2024; Nesterov, momentum
    0.95). Its updates are scaled to the root mean square of AdamW's, so that both share one
    learning rate and one weight decay (Liu et al. 2025, arXiv 2502.16982, Eq. 4).

    Args:
        groups: parameter groups; those with `muon` contain matrices only.
        lr: learning rate of all groups.
        betas: decay rates of AdamW.
        bf16: orthogonalize in bf16, which is accurate enough and faster on a GPU.
    """

    momentum = 0.95

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], bf16: bool):
        groups = [{"muon": False} | group for group in groups]
        self.adamw = torch.optim.AdamW(groups, lr, betas, fused=True)
        super().__init__(self.adamw.param_groups, self.adamw.defaults)
        self.precision = torch.bfloat16 if bf16 else torch.float32
        self.found_inf: Tensor | None = None  # as for fused AdamW: above 0, a step changes nothing

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Update all parameters once; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        # Loading a checkpoint replaces our state and groups by new objects, so share them again.
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        return loss

    def _step_matrices(self, group: dict) -> None:
        """Update the matrices of a group; matrices of the same or transposed shape are batched."""
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                is_sharded, sizes = isinstance(parameter, DTensor), tuple(parameter.shape)
                shape = sizes if is_sharded else tuple(sorted(sizes))
                shapes.setdefault(shape, []).append(parameter)
        for shape, parameters in shapes.items():
            gradients = [self._nesterov_gradient(parameter) for parameter in parameters]
            updates = orthogonalize_all(gradients, self.precision)
            kept, step_size = 1 - group["lr"] * group["weight_decay"], group["lr"] * RMS
            step_size *= max(shape) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                update = update.to(parameter.dtype)
                self._replace(parameter, parameter.mul(kept).add_(update, alpha=-step_size))

    def _nesterov_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Update the momentum; return the Nesterov gradient."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp(parameter.grad, 1 - self.momentum)
        self._replace(state["momentum"], momentum)
        return parameter.grad.lerp(momentum, self.momentum)

    def _replace(self, tensor: Tensor, new: Tensor) -> None:
        """Give a tensor new values, unless `found_inf` says that the step is left out."""
        tensor, new = (x.to_local() if isinstance(x, DTensor) else x for x in (tensor, new))
        tensor.copy_(
            new if self.found_inf is None else torch.where(self.found_inf > 0, tensor, new)
        )
