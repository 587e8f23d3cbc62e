"""Trains a small autoencoder, on the embedded world or on the pictures of tars.

    python -m tf_lightning.train_autoencoder --out DIR
    python -m tf_lightning.train_autoencoder --out DIR --images 'emoji/*.tar'

The result is a diffusers `AutoencoderKL` folder, with the mean and spread of each latent channel in
its config, and a `report.json` with the command and the reconstruction error on held-out pictures.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from tf_lightning.data.corpus import Skipped
from tf_lightning.data.image_caption import CaptionTars
from tf_lightning.data.shapes import IMAGE_SIZE, Split, render, scene
from tf_lightning.errors import UserError

Pictures = Callable[..., Tensor]  # (indices, *, split, seed) -> (B, 3, 64, 64) in [-1, 1]

CONFIG = {
    "sample_size": IMAGE_SIZE,
    "latent_channels": 8,
    "block_out_channels": (16, 32, 64, 64),  # few where there are many pixels: CPUs encode with it
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}


def pictures(indices: range, *, split: Split = "train", seed: int = 0) -> Tensor:
    """Pictures of the scenes with these indices, (B, 3, 64, 64) in [-1, 1]."""
    images = np.stack([render(scene(seed, index, split=split)) for index in indices])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1


class TarPictures:
    """The pictures of img2dataset tars, 64 x 64, called like `pictures`; epochs are shuffled."""

    def __init__(self, paths: list[str]):
        source = CaptionTars(paths, image_size=IMAGE_SIZE)
        self.images = {split: _load(source, split) for split in ("train", "val")}

    def __call__(self, indices: range, *, split: Split = "train", seed: int = 0) -> Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1]; indices past the last begin another epoch."""
        images = self.images[split]
        rows = [self._row(index, len(images), split, seed) for index in indices]
        return images[rows].float().contiguous(memory_format=torch.channels_last) / 127.5 - 1

    @staticmethod
    def _row(index: int, count: int, split: Split, seed: int) -> int:
        epoch, place = divmod(index, count)
        return place if split == "val" else int(_order(count, seed, epoch)[place])


@cache
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _load(source: CaptionTars, split: Split) -> Tensor:
    """All pictures of a split, uint8 (n, 3, 64, 64)."""
    found = [d[1] for d in source.documents(split) if not isinstance(d, Skipped)]
    if not found:
        raise UserError(f"--images has no usable picture in its {split} split; check the paths")
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def blur_latents(posterior, strength: Tensor) -> Tensor:
    """Samples of a posterior with noise on top, so that the decoder mends imperfect latents.

    A diffusion model's latents are never exact; a decoder that has only seen exact ones draws
    their errors (noise-augmented decoding: Diffusion Transformers with Representation Autoencoders,
    Sec. 4.3).

    Args:
        posterior: diffusers' DiagonalGaussianDistribution of (B, C, h, w).
        strength: of the noise of each picture, (B,), in standard deviations of a channel's means.
    """
    spread = posterior.mean.detach().std((0, 2, 3), keepdim=True)
    noise = torch.randn_like(posterior.mean)
    return posterior.sample() + strength.view(-1, 1, 1, 1) * spread * noise


def train(
    pictures: Pictures,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    kl_weight: float,
    latent_noise: float,
    seed: int,
) -> nn.Module:
    """Trains on pictures as they are needed: L1 + kl_weight x KL, both means over elements.

    The latents' noise is uniform up to `latent_noise`, which is reached after a third of the steps.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    progress = trange(steps, desc="autoencoder", mininterval=1.0)
    for step in progress:
        images = pictures(range(step * batch_size, (step + 1) * batch_size), seed=seed)
        posterior = model.encode(images).latent_dist
        strength = latent_noise * min(1.0, 3 * step / steps) * torch.rand(len(images))
        error = F.l1_loss(model.decode(blur_latents(posterior, strength)).sample, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (error + kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(l1=f"{error.item():.4f}", kl=f"{kl.item():.2f}")
    return model.eval()


@torch.no_grad()
def measure_latents(
    model: nn.Module, pictures: Pictures, num_images: int, *, seed: int
) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel over training pictures, as config keys."""
    modes = torch.cat(
        [
            model.encode(pictures(range(start, start + 50), seed=seed)).latent_dist.mode()
            for start in range(0, num_images, 50)
        ]
    )
    return {
        "latents_mean": modes.mean((0, 2, 3)).tolist(),
        "latents_std": modes.std((0, 2, 3)).tolist(),
    }


@torch.no_grad()
def measure_errors(
    model: nn.Module, pictures: Pictures, num_images: int, *, seed: int
) -> dict[str, float]:
    """Error of the posterior mode's reconstruction, on held-out pictures with values in [0, 1]."""
    absolute, squared, spread = [], [], []
    for start in range(0, num_images, 50):
        images = pictures(range(start, min(start + 50, num_images)), split="val", seed=seed)
        posterior = model.encode(images).latent_dist
        difference = (model.decode(posterior.mode()).sample.clamp(-1, 1) - images) / 2
        absolute.append(difference.abs().mean())
        squared.append(difference.square().mean((1, 2, 3)))
        spread.append(posterior.std.mean())
    return {
        "num_images": num_images,
        "l1": torch.stack(absolute).mean().item(),
        "psnr_db": (-10 * torch.cat(squared).log10()).mean().item(),
        "posterior_std": torch.stack(spread).mean().item(),
    }


def save(model: nn.Module, out: Path, report: dict) -> None:
    """Writes the folder beside `out`, then renames it: a killed run leaves nothing half-written."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        model.save_pretrained(folder)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        folder.rename(out)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tf_lightning.train_autoencoder",
        description="Trains a small autoencoder (f8, 8 channels) on 64 x 64 pictures.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, must not exist yet"
    )
    parser.add_argument(
        "--images", nargs="+", help="img2dataset tars (default: pictures of the embedded world)"
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (2000)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures a step (16)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (2e-3)")
    parser.add_argument(
        "--kl-weight", type=float, default=5e-4, help="weight of the KL term (5e-4)"
    )
    parser.add_argument(
        "--latent-noise",
        type=float,
        default=0.7,
        help="most noise on latents, in standard deviations of a channel (0.7; 0 = none)",
    )
    parser.add_argument(
        "--measure", type=int, default=2000, help="pictures for the final figures (2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and pictures (0)")
    options = parser.parse_args(args)
    if options.out.exists():
        raise UserError(f"{options.out} exists already; give --out a new folder or remove it first")
    options.out.parent.mkdir(parents=True, exist_ok=True)

    source, held_out = pictures, options.measure
    if options.images:
        source = TarPictures(options.images)
        held_out = min(held_out, len(source.images["val"]))
    begun = time.time()
    model = train(
        source,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        kl_weight=options.kl_weight,
        latent_noise=options.latent_noise,
        seed=options.seed,
    )
    seconds = time.time() - begun
    model.half().float()  # half the file, and what is measured is what is stored
    model.register_to_config(**measure_latents(model, source, options.measure, seed=options.seed))
    report = {
        "command": shlex.join(
            ["python", "-m", "tf_lightning.train_autoencoder", *(args or sys.argv[1:])]
        ),
        "train_seconds": round(seconds),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "held_out": measure_errors(model, source, held_out, seed=options.seed),
    }
    save(model.half(), options.out, report)
    print(json.dumps(report, indent=2))
    print(f"wrote {options.out}; give this folder as the autoencoder's name to use it")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
