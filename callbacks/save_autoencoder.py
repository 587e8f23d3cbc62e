"""What training an autoencoder is for: a folder that Transfusion's `data.autoencoder` names."""

import copy
from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from callbacks.results import outside_fit, run_folder
from tf_lightning.autoencoder.network import latent_statistics, save_network
from tf_lightning.data.image_only import ImageData, ValImages
from tf_lightning.training.autoencoder import AutoencoderModule


class SaveAutoencoder(L.Callback):
    """Writes `<run>/autoencoder` when `fit` ends, `<run>/validate/autoencoder` of a checkpoint.

    The folder is diffusers' (config.json, safetensors); the config has the mean and the standard
    deviation of each latent channel over training pictures, so that latents have unit variance.

    Args:
        num_pictures: training pictures to measure the latents on, as they are.
        half: keep the weights as float16, which halves the file.
    """

    def __init__(self, num_pictures: int = 2000, half: bool = False):
        self.num_pictures, self.half = num_pictures, half

    def save(self, trainer: L.Trainer, module: AutoencoderModule) -> None:
        """Measure, and write on rank zero."""
        folder = run_folder(trainer) / "autoencoder"  # on every rank
        if not trainer.is_global_zero:
            return
        network = copy.deepcopy(module.autoencoder).requires_grad_(False).eval().float()
        if self.half:
            network.half().float()  # what is measured is what is stored
        data: ImageData = trainer.datamodule
        network.register_to_config(sample_size=max(data.image_size))
        if not module.config.num_codes:
            found = latent_statistics(network, self.pictures(data, module.device))
            network.register_to_config(**found)
        held_out = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
        report = {
            "global_step": trainer.global_step or module.loaded_step,
            "num_parameters": count(network),
            "held_out": held_out,
        }
        save_network(network.half() if self.half else network, folder, report)
        use = f"autoencoder: {folder} in a configuration's data"
        if module.config.num_codes:
            use += f" with num_codes: {module.config.num_codes} in its model"
        rank_zero_info(f"Wrote {folder}; use it by {use}")

    on_train_end = save
    on_validation_end = outside_fit(save)

    def pictures(self, data: ImageData, device: torch.device) -> Iterator[Tensor]:
        """Training pictures in batches, evenly spread, as they are."""
        pictures = ValImages(data.stores["train"])
        step = max(1, len(pictures) // self.num_pictures)
        subset = Subset(pictures, range(0, len(pictures), step)[: self.num_pictures])
        for batch in DataLoader(subset, batch_size=data.batch_size):
            yield batch.images.to(device)


def count(network: nn.Module) -> int:
    """Weights of a network."""
    return sum(weight.numel() for weight in network.parameters())
