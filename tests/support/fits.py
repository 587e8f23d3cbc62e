"""Short runs from Python on the shapes world, with Lightning's trainer."""

import warnings
from pathlib import Path

import lightning as L

from support.tiny import SIZES
from tf_lightning.autoencoder.network import AutoencoderConfig
from tf_lightning.data import ImageData, Mixture
from tf_lightning.data.stream import StreamData
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def shapes_data(folder: Path | str = "data", **changed) -> Mixture:
    """Captions and texts of the shapes world as pixels."""
    sources = {kind.__name__: kind(20, num_val=4) for kind in (ShapesCaptions, ShapesTexts)}
    sizes = {"vocab_size": 300, "patch_size": 16, "row_length": 256, "batch_size": 2}
    return Mixture(sources, autoencoder="pixels", cache_dir=str(folder), **sizes | changed)


def shapes_module(sizes: dict | None = None, **changed) -> Transfusion:
    """A tiny model for `shapes_data`, the same whenever it is built."""
    L.seed_everything(0, verbose=False)
    config = TransformerConfig(vocab_size=300, **SIZES | (sizes or {}))
    return Transfusion(config, patch_size=16, latent_channels=3, **changed)


def image_data(folder: Path | str = "data", **changed) -> ImageData:
    """Images of the shapes world."""
    source = ShapesCaptions(6, num_val=2)
    return ImageData(source, cache_dir=str(folder), **{"batch_size": 2} | changed)


def autoencoder_module(**changed) -> AutoencoderModule:
    """A tiny VAE with a discriminator, the same whenever it is built."""
    L.seed_everything(0, verbose=False)
    network = AutoencoderConfig((4, 8), 1, latent_channels=4, norm_groups=2, mid_attention=False)
    options = {"lpips_weight": 0.0, "gan_start_step": 1, "latent_noise": 0.2, "warmup_steps": 1}
    return AutoencoderModule(network, **options | changed)


def fit(
    module: L.LightningModule, data: StreamData, ckpt_path: Path | None = None, **options
) -> L.Trainer:
    """Train on the CPU, by default without validation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(accelerator="cpu", **{"limit_val_batches": 0} | QUIET | options)
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class Rates(L.Callback):
    """Keeps the learning rate, the loss and the logged gradient norm of each step.

    Args:
        stop_after: steps after which the run is stopped; None: never.
    """

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.used: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        """Read the rate that this step uses."""
        self.used.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """Read what the module has logged."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
        trainer.should_stop = trainer.global_step == self.stop_after
