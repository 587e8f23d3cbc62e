"""How well an autoencoder reconstructs held-out pictures: PSNR, SSIM, rFID, a grid, codes used."""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchvision.utils import make_grid

from callbacks.metrics import load_extractor
from callbacks.protocol import MetricRecord, save_numbers
from evaluation.fid import FID
from evaluation.image_scores import ImageScores
from tf_lightning.autoencoder.losses import code_perplexity
from tf_lightning.data.image_only import ImageBatch
from tf_lightning.errors import UserError
from tf_lightning.training.autoencoder import AutoencoderModule, Reconstruction

DEFINITIONS = {
    "psnr": "dB, mean over pictures, values in [-1, 1] clipped",
    "ssim": "Gaussian window of 11, values in [-1, 1] clipped",
    "code_use": "share of all codes that occur in the pictures",
    "code_perplexity": "exp(entropy) of the codes' frequencies in the pictures",
    "dead_codes": "codes that do not occur in the pictures",
}


class Reconstruct(L.Callback):
    """Logs `val/psnr`, `val/ssim`, `val/rfid[<extractor>]`, and a VQ's `val/code_use` and so on.

    TensorBoard shows pictures over their reconstructions. `validate` and `test` print a table and
    write `metrics.json`; `fit` writes `metrics/step<N>-val.json`.

    Args:
        extractor: network of the rFID: "shapes" for the embedded world's own, "inception", or an
            open_clip model; null measures none.
        weights: file of Inception's weights, or tag or file of open_clip's; null: as they come.
        num_shown: pictures in the grid, at most a batch.
    """

    def __init__(
        self, extractor: str | None = "shapes", weights: str | None = None, num_shown: int = 16
    ):
        self.extractor, self.weights, self.num_shown = extractor, weights, num_shown
        self.scores: ImageScores | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the extractor now: what is absent is told before hours of training."""
        self.psnr = PeakSignalNoiseRatio((-1.0, 1.0), reduction="elementwise_mean", dim=(1, 2, 3))
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        if self.extractor is None:
            return
        try:
            extractor = load_extractor(self.extractor, self.weights)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.scores = ImageScores(extractor, [FID(extractor, f"rfid[{self.extractor}]")])

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: AutoencoderModule) -> None:
        """Forget the last validation."""
        for metric in (self.psnr, self.ssim, self.scores):
            if metric is not None:
                metric.to(pl_module.device)
                metric.reset()
        num_codes = pl_module.config.num_codes
        self.counts = num_codes and torch.zeros(num_codes, device=pl_module.device)
        self.num_pictures = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: AutoencoderModule,
        outputs: Reconstruction,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take what counts of a batch; show the first."""
        counted = batch.rows >= 0
        images, made = batch.images[counted], outputs.images[counted].float()
        self.num_pictures += len(images)
        if not len(images):
            return
        self.psnr.update(made, images)
        self.ssim.update(made, images)
        if self.scores is not None:
            self.scores.update(images, real=True)
            self.scores.update(made, real=False)
        if self.counts is not None:
            ids = outputs.ids[counted].flatten()
            self.counts += torch.bincount(ids, minlength=len(self.counts))
        if batch_idx == 0 and not trainer.sanity_checking:
            self.show(trainer, images[: self.num_shown], made[: self.num_shown])

    def show(self, trainer: L.Trainer, images: Tensor, made: Tensor) -> None:
        """A row of pictures over a row of reconstructions, and so on."""
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        rows = [part for pair in zip(images.split(8), made.split(8), strict=True) for part in pair]
        grid = make_grid(torch.cat(rows) / 2 + 0.5, nrow=min(8, len(images)))
        writer = trainer.logger.experiment
        writer.add_image("reconstructions/val", grid.cpu(), trainer.global_step)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: AutoencoderModule) -> None:
        """Log the numbers."""
        values = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        if self.scores is not None:
            values |= self.scores.compute()
        if self.counts is not None:
            counts = pl_module.all_gather(self.counts).view(-1, len(self.counts)).sum(0)
            values |= code_use(counts)
        protocol = {} if self.scores is None else self.scores.protocol
        pictures = torch.tensor(self.num_pictures, device=pl_module.device)
        facts = {"num_pictures": int(pl_module.all_gather(pictures).sum())}
        self.numbers = [
            MetricRecord(f"val/{name}", float(value), facts | said(name, protocol))
            for name, value in values.items()
        ]
        for number in self.numbers:
            pl_module.log(number.name, torch.tensor(number.value, dtype=torch.float64))

    def on_validation_end(self, trainer: L.Trainer, pl_module: AutoencoderModule) -> None:
        """Write the numbers with what they depend on."""
        if not trainer.sanity_checking:
            save_numbers(trainer, pl_module, self.numbers)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end


def said(name: str, protocol: dict[str, dict]) -> dict:
    """What a number depends on."""
    return protocol[name] if name in protocol else {"definition": DEFINITIONS[name]}


def code_use(counts: Tensor) -> dict[str, float]:
    """How much of a codebook occurs, of counts (num_codes,)."""
    return {
        "code_use": float((counts > 0).double().mean()),
        "code_perplexity": float(code_perplexity(counts)),
        "dead_codes": float((counts == 0).sum()),
    }
