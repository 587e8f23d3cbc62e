"""Learning-rate schedule and parameter groups."""

import math

import torch
from torch import nn

from tf_lightning.muon import MuonAdamW
from tf_lightning.net import Net

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


def parameter_groups(net: Net, weight_decay: float, muon: bool = False) -> list[dict]:
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
    net: Net,
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
