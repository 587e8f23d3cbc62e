"""Perplexity and bits per byte of the validation text, for each source."""

import lightning as L
import torch
from torch import Tensor

from callbacks.protocol import MetricRecord
from callbacks.sampling import check_module
from evaluation.perplexity import Perplexity
from tf_lightning.batch import Batch
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.module import Transfusion

DEFINITION = {
    "perplexity": "exp(sum nll / sum tokens)",
    "bits_per_byte": "sum nll / ln 2 / UTF-8 bytes of the text",
}
COUNTED = "text, <boi>, <eos>; excluded: first token, patches, padding"


class TextPerplexity(L.Callback):
    """Logs `val/<source>/perplexity` and `val/<source>/bits_per_byte` at every validation.

    The EMA weights are evaluated if the model keeps them. Counts all text targets: words, <boi>,
    <eos>. The first target of a document is excluded. Bytes are counted in the UTF-8 text that the
    targets decode to. <boi> and <eos> have no bytes, but their nll counts. A source without text
    has no values.
    """

    def __init__(self):
        self.records: list[MetricRecord] = []

    def score_names(self, data: L.LightningDataModule) -> list[str]:
        """Return the names of the values that this callback logs."""
        return [f"val/{source}/{name}" for source in data.source_names for name in DEFINITION]

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Refuse a model without text."""
        check_module(model, self)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Create an empty metric for each source."""
        names = trainer.datamodule.source_names
        self.metrics = {name: Perplexity(name).to(pl_module.device) for name in names}
        self.text_bytes = TextBytes(trainer.datamodule.tokenizer, pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Transfusion,
        outputs: dict[str, Tensor],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch of one source."""
        metric = self.metrics[trainer.datamodule.source_names[dataloader_idx]]
        add_text(metric, outputs["nll"], batch, self.text_bytes)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Log the values of each source."""
        self.records = []
        weights = pl_module.inference_weights
        for source, metric in self.metrics.items():
            try:
                found = metric.compute()
            except ValueError:  # the source has no text; all ranks raise this
                continue
            for name, value in found.items():
                facts = {"definition": DEFINITION[name], "counted": COUNTED, "weights": weights}
                protocol = facts | metric.protocol
                record = MetricRecord(f"val/{source}/{name}", value.item(), protocol)
                self.records.append(record)
                pl_module.log(record.name, value, add_dataloader_idx=False)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


class TextBytes:
    """Counts the bytes that text targets decode to."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device):
        self.counts = torch.tensor(tokenizer.byte_counts(), device=device)  # (2, V)
        self.begins = torch.tensor([tokenizer.bos_id, tokenizer.eoi_id], device=device)

    def __call__(self, targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the bytes of each target (K,), given the input ids (K,) before them."""
        return self.counts[torch.isin(inputs, self.begins).long(), targets]


def add_text(metric: Perplexity, nll: Tensor, batch: Batch, text_bytes: TextBytes) -> None:
    """Add a batch's text targets with their nll (K,), except the first target of each document."""
    at = batch.target_index
    counted = batch.positions.flatten()[at] > 0
    targets, inputs = batch.labels.flatten()[at], batch.input_ids.flatten()[at]
    metric.update(nll[counted], text_bytes(targets, inputs)[counted].sum())
