"""An autoencoder's run of the command line in seconds: six steps, f4, a GAN from step 3."""

import copy
from pathlib import Path

import yaml

from tf_lightning.cli.main import main

MAX_STEPS, GAN_START = 6, 3


def config(folder: Path, **changes) -> dict:
    """The whole configuration of a run in `folder`/run; `changes` are arguments of the model."""
    callbacks = {
        "lightning.pytorch.callbacks.ModelCheckpoint": {
            "every_n_train_steps": 3,
            "save_top_k": -1,
            "save_last": "link",
            "filename": "step{step:07d}",
            "auto_insert_metric_name": False,
            "save_on_train_epoch_end": False,
            "enable_version_counter": False,
        },
        "callbacks.reconstruct.Reconstruct": {"extractor": "shapes"},
        "callbacks.save_autoencoder.SaveAutoencoder": {},
    }
    logger = {"save_dir": str(folder), "name": "run", "version": "", "default_hp_metric": False}
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
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "devices": 1,
            "max_steps": MAX_STEPS,
            "gradient_clip_val": 1.0,
            "use_distributed_sampler": False,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": logger,
            },
            "callbacks": [{"class_path": k, "init_args": v} for k, v in callbacks.items()],
        },
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


VQ = {"network": {"num_codes": 16, "code_dim": 3}, "latent_noise": 0.0, "dead_after": 2}


def write_config(folder: Path, change=lambda config: None, **changes) -> Path:
    """The configuration as a file, after `change` has edited it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = copy.deepcopy(config(folder, **copy.deepcopy(changes)))
    change(values)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def fit(folder: Path, *arguments: str, **changes) -> Path:
    """Train; the run's folder."""
    main(["fit", "-c", str(write_config(folder, **changes)), *arguments])
    return folder / "run"
