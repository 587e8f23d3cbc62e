"""How fast a run is and what it is fed: tokens/s, padding, realised mixture."""

import time

import lightning as L
import torch
from torch import Tensor

from tf_lightning.batch import Batch


class Throughput(L.Callback):
    """Logs `train/tokens_per_sec`, `train/padding_share` and `train/mixture/<source>`.

    Tokens are counted on the device and read only when the trainer logs, so that no step waits.
    Speed is of this window and all ranks; shares are of all tokens since the start of this process.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        sources = len(trainer.datamodule.source_names)
        self.tokens = torch.zeros(sources, dtype=torch.float64, device=pl_module.device)
        self.positions = 0
        self.window_start, self.window_tokens = time.perf_counter(), 0.0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count; log at the trainer's interval."""
        self.tokens.index_add_(0, batch.source_ids, batch.row_tokens.double())
        self.positions += batch.input_ids.numel()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.log_window(trainer, pl_module)

    def log_window(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the counts, log them, restart the window."""
        tokens = self.tokens.cpu()
        total, now = tokens.sum().item(), time.perf_counter()
        rate = (total - self.window_tokens) / max(now - self.window_start, 1e-9)
        values = {
            "train/tokens_per_sec": rate * trainer.world_size,
            "train/padding_share": 1 - total / self.positions,
        }
        for name, count in zip(trainer.datamodule.source_names, tokens.tolist(), strict=True):
            values[f"train/mixture/{name}"] = count / max(total, 1)
        pl_module.log_dict(values, batch_size=1)
        self.window_start, self.window_tokens = now, total
