"""The losses of a packed row, as sums: whoever averages knows the counts of every rank.

Shapes: K text targets, V vocabulary, M images.
"""

import torch.nn.functional as F
from torch import Tensor


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target, (K,); logits (K, V), targets (K,); fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def z_loss(logits: Tensor) -> Tensor:
    """log^2 Z of each target, (K,): logits (K, V), Z = sum of exp (Chameleon Sec. 2.3; PaLM); fp32.

    A softmax is blind to a shift of its logits; this holds them where exp is exact.
    """
    return logits.float().logsumexp(-1).square()


def diffusion_loss_sum(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error summed over latent elements, both (M, C, h, w) (Transfusion Eq. 3); fp32.

    `weight` (M, 1, 1, 1) is that of each image's error; None: 1.
    """
    if weight is None:
        return F.mse_loss(output.float(), target.float(), reduction="sum")
    return (weight * (output.float() - target.float()).square()).sum()


def total_loss(loss_lm: Tensor, loss_diffusion: Tensor, diffusion_weight: float) -> Tensor:
    """L = L_LM + lambda * L_DDPM (Transfusion Eq. 4), of the two means."""
    return loss_lm + diffusion_weight * loss_diffusion
