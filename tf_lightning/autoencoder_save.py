"""An autoencoder made into a folder that diffusers and `data.autoencoder` load."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from tf_lightning.autoencoder_network import encode_posterior


@torch.no_grad()
def measure_latents(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel of a VAE, as keys of its config.

    Args:
        network: a diffusers AutoencoderKL.
        batches: pictures (B, 3, H, W) in [-1, 1].
    """
    sums = torch.zeros(3, network.config.latent_channels, dtype=torch.float64)
    for images in batches:
        modes = encode_posterior(network, images).mean.double().cpu()
        count = torch.full_like(sums[0], modes[:, 0].numel())
        sums += torch.stack([modes.sum((0, 2, 3)), modes.square().sum((0, 2, 3)), count])
    mean, square = sums[0] / sums[2], sums[1] / sums[2]
    std = ((square - mean.square()) * sums[2] / (sums[2] - 1)).sqrt()
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def save_network(network: nn.Module, folder: Path, report: dict) -> None:
    """Write diffusers' files and report.json, whole or not at all; what is there is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        network.save_pretrained(new)
        (new / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if folder.exists():
            os.rename(folder, Path(scratch) / "old")
        os.rename(new, folder)
        shutil.rmtree(Path(scratch) / "old", ignore_errors=True)
