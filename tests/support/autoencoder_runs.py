"""A run of the command line that trains a small autoencoder: six steps, GAN loss from step 3."""

from pathlib import Path

import lightning as L
import torch

from support import runs
from tf_lightning.cli.main import main

GAN_START = 3
VQ = {
    "network": {"num_codes": 16, "code_dim": 3},
    "latent_noise": 0.0,
    "dead_after": 2,
}  # instead of a VAE


class Spoil(L.Callback):
    """Makes one gradient of the discriminator NaN in its first step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == GAN_START:
            next(pl_module.discriminator.parameters()).grad[0] = torch.nan


def config(folder: Path, **changes) -> dict:
    """The whole configuration of a run in `folder`/run; `changes` are arguments of the model."""
    callbacks = {
        "callbacks.reconstruct.Reconstruct": {"extractor": "shapes"},
        "callbacks.save_autoencoder.SaveAutoencoder": {},
    }
    network = {"channels": [4, 8, 8], "layers_per_block": 1, "latent_channels": 4}
    network |= {"norm_groups": 2, "mid_attention": False}
    model = {
        "network": network | changes.pop("network", {}),
        "lpips_weight": 0.0,
        "gan_start_step": GAN_START,
        "latent_noise": 0.2,
        "kl_weight": 1e-3,
        "lr": 1e-3,
        "betas": [0.5, 0.9],
        "warmup_steps": 2,
    }
    return {
        "seed_everything": 0,
        "trainer": runs.trainer_config(folder, callbacks),
        "model": {
            "class_path": "tf_lightning.training.autoencoder.AutoencoderModule",
            "init_args": model | changes,
        },
        "data": {
            "class_path": "tf_lightning.data.ImageData",
            "init_args": {
                "source": {
                    "class_path": "tf_lightning.shapes.sources.ShapesCaptions",
                    "init_args": {"num_documents": 9, "num_val": 5},
                },
                "batch_size": 2,
                "cache_dir": str(folder / "data"),
            },
        },
    }


def write_config(folder: Path, change=lambda config: None, **changes) -> Path:
    """Write the configuration to a file after `change` has edited it."""
    return runs.save_config(folder, config(folder, **changes), change)


def fit(folder: Path, *arguments: str, **changes) -> Path:
    """Train; return the folder of the run."""
    main(["fit", "-c", str(write_config(folder, **changes)), *arguments])
    return folder / "run"
