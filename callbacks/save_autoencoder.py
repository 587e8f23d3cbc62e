"""Writes a trained autoencoder as the folder that `data.autoencoder` of Transfusion names."""

import copy
from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from callbacks.results import is_trial, outside_fit, run_folder
from callbacks.sampling import check_module
from tf_lightning.autoencoder.network import latent_statistics, save_network
from tf_lightning.data.image_only import ImageData, ValImages
from tf_lightning.ranges import PositiveInt, check_arguments
from tf_lightning.training.autoencoder import AutoencoderModule


class SaveAutoencoder(L.Callback):
    """Writes `<run>/autoencoder` after `fit`, and `<run>/validate/autoencoder` in `validate`.

    The folder has diffusers' layout (config.json, safetensors). Its config has the mean and the
    standard deviation of each latent channel over training images, which scale the latents to unit
    variance.

    Args:
        num_images: number of training images for these statistics, without augmentation.
        half: store the weights as float16, which halves the file.
    """

    def __init__(self, num_images: PositiveInt = 2000, half: bool = False):
        check_arguments(SaveAutoencoder.__init__, locals())
        self.num_images, self.half = num_images, half

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Refuse a model that is not an autoencoder."""
        check_module(model, self, AutoencoderModule)

    def save(self, trainer: L.Trainer, pl_module: AutoencoderModule) -> None:
        """Compute the statistics of the latents and write the folder, on rank zero."""
        if is_trial(trainer):
            return
        folder = run_folder(trainer) / "autoencoder"  # on every rank
        if not trainer.is_global_zero:
            return
        network = copy.deepcopy(pl_module.autoencoder).requires_grad_(False).eval().float()
        if self.half:
            network.half().float()  # compute the statistics with the weights as they are stored
        data: ImageData = trainer.datamodule
        network.register_to_config(sample_size=max(data.image_size))
        if not pl_module.config.num_codes:
            found = latent_statistics(network, self.images(data, pl_module.device))
            network.register_to_config(**found)
        held_out = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
        report = {
            "global_step": trainer.global_step or pl_module.loaded_step,
            "num_parameters": sum(weight.numel() for weight in network.parameters()),
            "held_out": held_out,
        }
        save_network(network.half() if self.half else network, folder, report)
        usage = f"set autoencoder: {folder} in the data"
        if pl_module.config.num_codes:
            usage += f" and num_codes: {pl_module.config.num_codes} in the model"
        rank_zero_info(f"Wrote {folder}; to use it, {usage}")

    on_train_end = save
    on_validation_end = outside_fit(save)

    def images(self, data: ImageData, device: torch.device) -> Iterator[Tensor]:
        """Yield batches of training images, evenly spread over the split, without augmentation."""
        images = ValImages(data.stores["train"])
        step = max(1, len(images) // self.num_images)
        subset = Subset(images, range(0, len(images), step)[: self.num_images])
        for batch in DataLoader(subset, batch_size=data.batch_size):
            yield batch.images.to(device)
