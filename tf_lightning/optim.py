"""Learning-rate schedule and parameter groups."""

import math

from torch import nn


def lr_scale(step: int, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up, then a cosine from 1 to min_lr_ratio at max_steps; a factor of the peak lr.

    Transfusion: 4,000 warm-up steps, 250,000 steps, 1.5e-5 / 3e-4 = 0.05.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; vectors (norms, biases) and embeddings do not."""
    embeddings = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    decays = lambda p: p.ndim >= 2 and id(p) not in embeddings  # noqa: E731
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [
        {
            "name": "decay",
            "params": [p for p in parameters if decays(p)],
            "weight_decay": weight_decay,
        },
        {
            "name": "no_decay",
            "params": [p for p in parameters if not decays(p)],
            "weight_decay": 0.0,
        },
    ]


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
