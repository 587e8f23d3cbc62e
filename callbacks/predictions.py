"""What `tf-lightning predict` writes."""

import json
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from callbacks.sheet import run_folder


class CaptionWriter(BasePredictionWriter):
    """Appends each batch's captions to `predict/captions-<rank>.jsonl` in the run's folder.

    A line has the document's own caption and the one written for its picture.
    """

    def __init__(self):
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new file."""
        self.path = run_folder(trainer) / f"captions-{trainer.global_rank}.jsonl"
        self.path.write_text("")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[dict[str, str]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """One line for each captioned picture of the batch."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where it is."""
        rank_zero_info(f"Wrote {self.path}")
