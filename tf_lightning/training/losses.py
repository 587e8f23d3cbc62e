"""What a batch costs a network: the losses of all its targets, before any mean.

Shapes: K targets of text, K' of images' codes.

The losses of a packed row, as sums: whoever averages knows the counts of every rank.

Shapes: K text targets, V vocabulary, M images.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tf_lightning.batch import Batch, crop_by_bucket, split_by_bucket
from tf_lightning.diffusion.process import DiffusionProcess
from tf_lightning.model.attention import build_attention
from tf_lightning.model.transfusion import TransfusionModel


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target, (K,); logits (K, V), targets (K,); fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def z_loss(logits: Tensor) -> Tensor:
    """log^2 Z of each target, (K,): logits (K, V), Z = sum of exp (Chameleon Sec. 2.3; PaLM); fp32.

    A softmax is blind to a shift of its logits; this holds them where exp is exact.
    """
    return logits.float().logsumexp(-1).square()


def total_loss(loss_lm: Tensor, loss_diffusion: Tensor, diffusion_weight: float) -> Tensor:
    """L = L_LM + lambda * L_DDPM (Transfusion Eq. 4), of the two means."""
    return loss_lm + diffusion_weight * loss_diffusion


class LossSums(NamedTuple):
    """The terms; what a network does not learn is zero or empty."""

    nll: Tensor  # (K,) cross-entropy in nats
    code_nll: Tensor  # (K',)
    diffusion: Tensor  # (), the denoiser's, over latent elements
    z: Tensor  # (), log^2 Z over all K + K' targets


def loss_sums(
    net: TransfusionModel,
    batch: Batch,
    process: DiffusionProcess,
    causal_images: bool,
    with_z: bool,
) -> LossSums:
    """One forward and its losses.

    Args:
        net: the network, whose images are the batch's kind.
        batch: packed rows.
        process: the diffusion process of the denoiser.
        causal_images: patches see only earlier patches, as codes always do.
        with_z: whether z is asked for.
    """
    attend = build_attention(batch, causal_images or net.num_codes > 0)
    if net.num_codes:
        logits, _ = net(batch, batch.latents, batch.t, attend)
        diffusion = logits.new_zeros(())
    else:
        noised = process.add_noise(batch.latents, batch.noise, batch.t)
        logits, output = net(batch, noised, process.model_timesteps(batch.t), attend)
        images = (crop_by_bucket(x, batch.buckets) for x in (output, batch.latents, batch.noise))
        parts = zip(*images, split_by_bucket(batch.t, batch.buckets), strict=True)
        diffusion = torch.stack([process.loss_sum(*part) for part in parts]).sum()
    targets = batch.labels.flatten()[torch.cat([batch.target_index, batch.code_index])]
    counts = [len(batch.target_index), len(batch.code_index)]
    nll, code_nll = lm_loss(logits, targets).split(counts)
    return LossSums(nll, code_nll, diffusion, z_loss(logits).sum() if with_z else nll.new_zeros(()))
