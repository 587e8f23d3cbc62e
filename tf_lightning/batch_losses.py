"""What a batch costs a network: the losses of all its targets, before any mean.

Shapes: K targets of text, K' of images' codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tf_lightning.attention import build_attention
from tf_lightning.batch import Batch
from tf_lightning.losses import lm_loss, z_loss
from tf_lightning.net import Net
from tf_lightning.objective import Objective
from tf_lightning.sizes import by_size, split


class LossSums(NamedTuple):
    """The terms; what a network does not learn is zero or empty."""

    nll: Tensor  # (K,) cross-entropy in nats
    code_nll: Tensor  # (K',)
    diffusion: Tensor  # (), the denoiser's, over latent elements
    z: Tensor  # (), log^2 Z over all K + K' targets


def loss_sums(
    net: Net, batch: Batch, objective: Objective, causal_images: bool, with_z: bool
) -> LossSums:
    """One forward and its losses.

    Args:
        net: the network, whose images are the batch's kind.
        batch: packed rows.
        objective: of the denoiser.
        causal_images: patches see only earlier patches, as codes always do.
        with_z: whether z is asked for.
    """
    attend = build_attention(batch, causal_images or net.num_codes > 0)
    if net.num_codes:
        logits, _ = net(batch, batch.latents, batch.t, attend)
        diffusion = logits.new_zeros(())
    else:
        noised = objective.add_noise(batch.latents, batch.noise, batch.t)
        logits, output = net(batch, noised, objective.network_times(batch.t), attend)
        images = (by_size(x, batch.sizes) for x in (output, batch.latents, batch.noise))
        parts = zip(*images, split(batch.t, batch.sizes), strict=True)
        diffusion = torch.stack([objective.loss_sum(*part) for part in parts]).sum()
    targets = batch.labels.flatten()[torch.cat([batch.target_index, batch.code_index])]
    counts = [len(batch.target_index), len(batch.code_index)]
    nll, code_nll = lm_loss(logits, targets).split(counts)
    return LossSums(nll, code_nll, diffusion, z_loss(logits).sum() if with_z else nll.new_zeros(()))
