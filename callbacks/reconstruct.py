"""Metrics of an autoencoder on validation images: PSNR, SSIM, rFID and the use of its codes."""

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from callbacks.media import log_image
from callbacks.metrics import load_extractor
from callbacks.protocol import MetricRecord, save_records
from callbacks.results import is_trial, run_folder, weights_step
from callbacks.sampling import check_module
from evaluation.fid import FID
from evaluation.image_scores import ImageScores
from tf_lightning.autoencoder.losses import code_perplexity
from tf_lightning.data.image_only import ImageBatch
from tf_lightning.errors import UserError
from tf_lightning.ranges import NonNegativeInt, check_arguments
from tf_lightning.training.autoencoder import AutoencoderModule, Reconstruction

DEFINITIONS = {
    "psnr": "dB, mean over images, values clipped to [-1, 1]",
    "ssim": "Gaussian window of 11, values clipped to [-1, 1]",
    "code_use": "share of all codes that occur in the images",
    "code_perplexity": "exp(entropy) of the code frequencies in the images",
    "dead_codes": "number of codes that do not occur in the images",
}


class Reconstruct(L.Callback):
    """Logs `val/psnr`, `val/ssim` and `val/rfid[<extractor>]`.

    For a VQ autoencoder it also logs `val/code_use`, `val/code_perplexity` and `val/dead_codes`.
    The run's loggers show images above their reconstructions. `validate` and `test` write
    `metrics.json`; `fit` writes `metrics/step<N>-val.json`.

    Args:
        extractor: network of the rFID: "shapes" for the CLIP of the shapes world, "inception", or
            an open_clip model; null: no rFID.
        weights: file of Inception's weights, or tag or file of the open_clip model's; null: the
            default weights.
        num_shown: images in the grid, at most a batch; 0: no grid.
    """

    def __init__(
        self,
        extractor: str | None = "shapes",
        weights: str | None = None,
        num_shown: NonNegativeInt = 16,
    ):
        check_arguments(Reconstruct.__init__, locals())
        self.extractor, self.weights, self.num_shown = extractor, weights, num_shown
        self.scores: ImageScores | None = None
        self.records: list[MetricRecord] = []
        self.checked = False

    def score_names(self, data: L.LightningDataModule) -> list[str]:
        """Return the names of the values that this callback logs."""
        rfid = [] if self.extractor is None else [f"rfid[{self.extractor}]"]
        return [f"val/{name}" for name in (*DEFINITIONS, *rfid)]

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Load the extractor before data is prepared.

        Raises:
            UserError: the model is not an autoencoder, or weights are missing.
        """
        check_module(model, self, AutoencoderModule)
        self.checked = True
        self.psnr = PeakSignalNoiseRatio((-1.0, 1.0), reduction="elementwise_mean", dim=(1, 2, 3))
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        if self.extractor is None:
            return
        try:
            extractor = load_extractor(self.extractor, self.weights)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.scores = ImageScores(extractor, [FID(extractor, f"rfid[{self.extractor}]")])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_run`."""
        if not self.checked:
            self.before_run(trainer, pl_module, trainer.datamodule)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: AutoencoderModule) -> None:
        """Reset all metrics."""
        self.folder = run_folder(trainer)  # on every rank
        for metric in (self.psnr, self.ssim, self.scores):
            if metric is not None:
                metric.to(pl_module.device)
                metric.reset()
        num_codes = pl_module.config.num_codes
        self.counts = num_codes and torch.zeros(num_codes, device=pl_module.device)
        self.num_images = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: AutoencoderModule,
        outputs: Reconstruction,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the images of a batch that are not padding; show the first batch."""
        counted = batch.rows >= 0
        images = batch.images[counted]
        reconstructed = outputs.images[counted].float()
        self.num_images += len(images)
        if not len(images):
            return
        self.psnr.update(reconstructed, images)
        self.ssim.update(reconstructed, images)
        if self.scores is not None:
            self.scores.update(images, real=True)
            self.scores.update(reconstructed, real=False)
        if self.counts is not None:
            ids = outputs.ids[counted].flatten()
            self.counts += torch.bincount(ids, minlength=len(self.counts))
        if batch_idx == 0 and not trainer.sanity_checking:
            self.step = weights_step(trainer, pl_module)
            self.show(trainer, images[: self.num_shown], reconstructed[: self.num_shown])

    def show(self, trainer: L.Trainer, images: Tensor, reconstructed: Tensor) -> None:
        """Log a grid: rows of images, each above the row of their reconstructions."""
        if not self.num_shown or not trainer.is_global_zero:
            return
        pairs = zip(images.split(8), reconstructed.split(8), strict=True)
        rows = [part for pair in pairs for part in pair]
        grid = make_grid(torch.cat(rows) / 2 + 0.5, nrow=min(8, len(images)))
        log_image(
            trainer,
            self.folder,
            self.step,
            "reconstructions/val",
            to_pil_image(grid.cpu().clamp(0, 1)),
        )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: AutoencoderModule) -> None:
        """Log the values."""
        values = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        if self.scores is not None:
            found, reasons = self.scores.compute()
            values |= found
            for reason in reasons:  # the same on all ranks
                rank_zero_warn(f"a score is missing: {reason}")
        if self.counts is not None:
            counts = pl_module.all_gather(self.counts).view(-1, len(self.counts)).sum(0)
            values |= code_use(counts)
        protocol = {} if self.scores is None else self.scores.protocol
        num_images = torch.tensor(self.num_images, device=pl_module.device)
        facts = {"num_images": int(pl_module.all_gather(num_images).sum())}
        self.records = [
            MetricRecord(
                f"val/{name}",
                float(value),
                facts | protocol.get(name, {"definition": DEFINITIONS.get(name)}),
            )
            for name, value in values.items()
        ]
        for record in self.records:
            pl_module.log(record.name, torch.tensor(record.value, dtype=torch.float64))

    def on_validation_end(self, trainer: L.Trainer, pl_module: AutoencoderModule) -> None:
        """Write the values with their protocols."""
        if not is_trial(trainer):
            save_records(trainer, pl_module, self.records)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end


def code_use(counts: Tensor) -> dict[str, float]:
    """Measure the use of a codebook from the counts (num_codes,) of its codes."""
    return {
        "code_use": float((counts > 0).double().mean()),
        "code_perplexity": float(code_perplexity(counts)),
        "dead_codes": float((counts == 0).sum()),
    }
