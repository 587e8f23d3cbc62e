"""Perplexity and bits per byte of the text that is validated on, source by source."""

import lightning as L
import torch
from torch import Tensor

from callbacks.protocol import MetricRecord
from evaluation.perplexity import Perplexity
from tf_lightning.batch import Batch
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.module import Transfusion

DEFINITION = {
    "perplexity": "exp(sum nll / sum tokens)",
    "bits_per_byte": "sum nll / ln 2 / UTF-8 bytes of the text",
}
COUNTED = "text, <boi> and <eos>; no document starts, patches or padding"


class TextPerplexity(L.Callback):
    """Logs `val/<source>/perplexity` and `val/<source>/bits_per_byte` at every validation.

    Of the averaged weights, if the model keeps them. Counted is every text target but the first of
    its document, which nothing foretells: words, the <boi> that begins a picture, and <eos>. The
    bytes are those of the UTF-8 text that these targets decode to; <boi> and <eos>, whose nll
    counts, have none. A source without text has neither number.
    """

    def __init__(self):
        self.numbers: list[MetricRecord] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Start anew."""
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
        """Log."""
        self.numbers = []
        weights = "raw" if pl_module.ema is None else "ema"
        for source, metric in self.metrics.items():
            try:
                found = metric.compute()
            except ValueError:  # no text, on every rank alike
                continue
            for name, value in found.items():
                told = {"definition": DEFINITION[name], "counted": COUNTED, "weights": weights}
                number = MetricRecord(f"val/{source}/{name}", value.item(), told | metric.protocol)
                self.numbers.append(number)
                pl_module.log(number.name, value, add_dataloader_idx=False)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


class TextBytes:
    """How many bytes of text targets stand for."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device):
        self.counts = torch.tensor(tokenizer.byte_counts(), device=device)  # (2, V)
        self.begins = torch.tensor([tokenizer.bos_id, tokenizer.eoi_id], device=device)

    def __call__(self, targets: Tensor, inputs: Tensor) -> Tensor:
        """Bytes of each target (K,), given the ids (K,) before them."""
        return self.counts[torch.isin(inputs, self.begins).long(), targets]


def add_text(metric: Perplexity, nll: Tensor, batch: Batch, text_bytes: TextBytes) -> None:
    """Adds a batch's text targets, with nll (K,), but for the first of each document."""
    at = batch.target_index
    counted = batch.positions.flatten()[at] > 0
    targets, inputs = batch.labels.flatten()[at], batch.input_ids.flatten()[at]
    metric.update(nll[counted], text_bytes(targets, inputs)[counted].sum())
