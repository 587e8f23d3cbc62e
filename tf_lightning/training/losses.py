"""The losses of a packed batch as sums, so that the caller can average over ranks.

Shapes: K text targets, K' code targets, V vocabulary, M images.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tf_lightning.batch import Batch, crop_by_bucket, split_by_bucket
from tf_lightning.diffusion.process import DiffusionProcess
from tf_lightning.model.attention import Attention, build_attention
from tf_lightning.model.transfusion import TransfusionModel


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, (K,) fp32; logits (K, V), targets (K,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def z_loss(logits: Tensor) -> Tensor:
    """log^2 Z of each target with Z = sum exp(logits), (K,) fp32 (Chameleon Sec. 2.3; PaLM).

    Softmax does not change when all logits shift; this loss keeps them in the range where exp is
    accurate.
    """
    return logits.float().logsumexp(-1).square()


def target_losses(logits: Tensor, targets: Tensor, with_z: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy and z-loss of each target, (k,) each; without `with_z`, the z-loss is zero."""
    nll = lm_loss(logits, targets)
    return nll, z_loss(logits) if with_z else torch.zeros_like(nll)


def total_loss(loss_lm: Tensor, loss_diffusion: Tensor, diffusion_weight: float) -> Tensor:
    """L = L_LM + lambda * L_DDPM of the two means (Transfusion Eq. 4)."""
    return loss_lm + diffusion_weight * loss_diffusion


class LossSums(NamedTuple):
    """The losses of one batch. Losses that do not apply are zero or empty."""

    nll: Tensor  # (K,) cross-entropy of each text target, in nats
    code_nll: Tensor  # (K',) cross-entropy of each code target, in nats
    diffusion: Tensor  # () diffusion loss, summed over latent elements
    z: Tensor  # () z-loss, summed over all K + K' targets
    by_image: Tensor  # (M,) diffusion loss of each image, detached; empty unless asked for


def loss_sums(
    net: TransfusionModel,
    batch: Batch,
    process: DiffusionProcess | None,
    causal_images: bool,
    with_z: bool,
    by_image: bool = False,
    attend: Attention | None = None,
) -> LossSums:
    """Run the network on a batch and return its summed losses.

    Args:
        net: the network.
        batch: packed rows, whose images are latents or codes as the network requires.
        process: the diffusion process of the latents; not used for images of discrete codes.
        causal_images: patches attend to earlier patches only; codes always do.
        with_z: compute the z-loss.
        by_image: also return the diffusion loss of each image.
        attend: attention of this batch; None: the fast implementation for its device.
    """
    attend = attend or build_attention(batch, causal_images or net.num_codes > 0)
    score = partial(target_losses, with_z=with_z)
    if net.num_codes:
        (nll, z), _ = net(batch, batch.latents, batch.t, attend, score)
        diffusion, images = nll.new_zeros(()), []
    else:
        noised = process.add_noise(batch.latents, batch.noise, batch.t)
        (nll, z), output = net(batch, noised, process.model_timesteps(batch.t), attend, score)
        cropped = (crop_by_bucket(x, batch.buckets) for x in (output, batch.latents, batch.noise))
        parts = list(zip(*cropped, split_by_bucket(batch.t, batch.buckets), strict=True))
        diffusion = torch.stack([process.loss_sum(*part) for part in parts]).sum()
        images = [losses_by_image(process, *part) for part in parts] if by_image else []
    nll, code_nll = nll.split([len(batch.target_index), len(batch.code_index)])
    images = torch.cat(images) if images else nll.new_zeros(0)
    return LossSums(nll, code_nll, diffusion, z.sum(), images)


@torch.no_grad()
def losses_by_image(process: DiffusionProcess, *images: Tensor) -> Tensor:
    """Return the diffusion loss of each image, summed over its elements, (M,).

    Args:
        process: the diffusion process.
        images: the arguments of its `loss_sum`, for M images of one resolution.
    """
    if not len(images[0]):
        return images[0].new_zeros(0, dtype=torch.float32)
    one_each = (x.detach().unsqueeze(1) for x in images)  # (M, 1, ...)
    return torch.vmap(process.loss_sum)(*one_each)
