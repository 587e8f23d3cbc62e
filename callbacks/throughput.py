"""Speed of a run and the composition of its data: tokens, FLOPs, padding, mixture, validations."""

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.media import log_values
from callbacks.sampling import check_module
from tf_lightning.batch import Batch
from tf_lightning.data.stream import as_batches
from tf_lightning.ranges import Positive, check_arguments
from tf_lightning.training.flops import Workload, flops_6nd, squared_lengths, training_flops
from tf_lightning.training.peak_flops import peak_flops

COMPUTE_DTYPES = {  # type in which the network multiplies, by the trainer's precision
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "64-true": torch.float64,
}


class Throughput(L.Callback):
    """Logs speed, FLOPs, padding and mixture of the training, and the time of its validations.

    Measured since the last log, over all ranks, excluding validation:

    - `train/tokens_per_sec`
    - `train/flops_per_token`: forward and backward, as `tf_lightning.training.flops` counts them
    - `train/images_per_token`: an image of codes takes more tokens than one of patches
    - `train/tflops_per_sec`
    - `train/mfu`: model FLOPs utilization, the share of the devices' peak for dense matrices; with
      `fp8`, of their peak in fp8

    Measured since the start of the run:

    - `train/padding_share`: share of positions that are padding
    - `train/mixture/<source>`: share of tokens from a source
    - `train/epochs/<source>`: how often the run has read a source

    `train/flops_per_token_6n` is the papers' constant estimate, 6 N. Each validation within `fit`
    logs `val/seconds`, with the time of sampling and metrics, and `val/time_share`, the share of
    all validations in the wall-clock time of the fit. A resumed run continues to count from its
    checkpoint.

    Counts are kept on the device and read only when the trainer logs, so that no step waits.

    Args:
        peak_flops: peak FLOPs per second of one device; null: the value of
            `tf_lightning.training.peak_flops` for this device and precision. Without a value (CPUs,
            and GPUs that it does not know) there is no `train/mfu`.
    """

    def __init__(self, peak_flops: Positive | None = None):
        check_arguments(Throughput.__init__, locals())
        self.peak_flops = peak_flops
        self.fit_before = self.validation_seconds = 0.0
        self.started: float | None = None
        self.loaded: tuple[dict[str, float], int] = {}, 0  # tokens by source, and positions
        self.finished: tuple[Tensor, int] | None = None  # both, at the end of the last step

    def before_run(
        self, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """Refuse a model whose operations are not counted."""
        check_module(model, self)

    @property
    def fit_seconds(self) -> float:
        """Wall-clock seconds of training and validation so far."""
        running = 0.0 if self.started is None else time.perf_counter() - self.started
        return self.fit_before + running

    def state_dict(self) -> dict[str, Any]:
        """Return the times and the counts, so that a resumed run reports the total."""
        state = {"fit_seconds": self.fit_seconds, "validation_seconds": self.validation_seconds}
        if self.finished is None:
            return state
        tokens, positions = self.finished
        names = self.source_names
        return state | {
            "tokens": dict(zip(names, tokens.tolist(), strict=True)),
            "positions": positions,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the times and counts of a checkpoint."""
        self.fit_before = state_dict["fit_seconds"]
        self.validation_seconds = state_dict["validation_seconds"]
        self.loaded = state_dict.get("tokens", {}), state_dict.get("positions", 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.source_names = trainer.datamodule.source_names
        tokens, self.positions = self.loaded
        before = [tokens.get(name, 0) for name in self.source_names]
        self.tokens = torch.tensor(before, dtype=torch.float64, device=pl_module.device)
        self.squares = torch.zeros((), dtype=torch.float64, device=pl_module.device)
        self.step, self.finished = trainer.global_step, (self.tokens.clone(), self.positions)
        if self.peak_flops is None:
            in_fp8 = pl_module.hparams.get("fp8") is not None
            dtype = torch.float8_e4m3fn if in_fp8 else COMPUTE_DTYPES[trainer.precision]
            self.peak_flops = peak_flops(trainer.strategy.root_device, dtype)
        self.started = time.perf_counter()
        self.window, self.image_work, self.window_start = Workload(), {}, self.started
        self.tokens_before, self.squares_before = float(sum(before)), 0.0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: Batch | list[Batch],
        batch_idx: int,
    ) -> None:
        """Count the batches of the step; log at the trainer's interval."""
        for part in as_batches(batch):
            self.count(part)
        if trainer.global_step != self.step:  # not within an accumulation
            self.step, self.finished = trainer.global_step, (self.tokens.clone(), self.positions)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.log_window(trainer, pl_module)

    def count(self, batch: Batch) -> None:
        """Count one batch."""
        self.tokens.index_add_(0, batch.source_ids, batch.row_tokens.double())
        self.squares += squared_lengths(batch)
        self.positions += batch.input_ids.numel()
        self.window.num_targets += len(batch.target_index) + len(batch.code_index)
        for images, copies, *size in batch.buckets:
            work = self.image_work.setdefault(tuple(size), Workload())
            work.num_images += images
            work.num_copies += copies

    def log_window(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read and log the counts; restart the window."""
        tokens, squares = self.tokens.cpu(), self.squares.item()
        total, now = tokens.sum().item(), time.perf_counter()
        work = self.window
        work.num_tokens, work.squared_lengths = (
            total - self.tokens_before,
            squares - self.squares_before,
        )
        seconds = max(now - self.window_start, 1e-9) / trainer.world_size
        num_images = sum(w.num_images for w in self.image_work.values())
        flops = training_flops(pl_module.net, work, None)
        flops += sum(training_flops(pl_module.net, w, size) for size, w in self.image_work.items())
        values = {
            "train/tokens_per_sec": work.num_tokens / seconds,
            "train/padding_share": 1 - total / self.positions,
            "train/flops_per_token": flops / max(work.num_tokens, 1),
            "train/flops_per_token_6n": flops_6nd(pl_module.net, 1),
            "train/images_per_token": num_images / max(work.num_tokens, 1),
            "train/tflops_per_sec": flops / seconds / 1e12,
        }
        if self.peak_flops:
            values["train/mfu"] = flops / seconds / trainer.world_size / self.peak_flops
        for name, count in zip(trainer.datamodule.source_names, tokens.tolist(), strict=True):
            values[f"train/mixture/{name}"] = count / max(total, 1)
        for name, epochs in trainer.datamodule.epochs().items():
            values[f"train/epochs/{name}"] = epochs
        pl_module.log_dict(values, batch_size=1)
        self.window, self.image_work, self.window_start = Workload(), {}, now
        self.tokens_before, self.squares_before = total, squares

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the validation."""
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the time of the validation and exclude it from the training window."""
        if self.started is None:  # outside `fit`, or in its sanity check
            return
        seconds = time.perf_counter() - self.validation_start
        self.validation_seconds += seconds
        self.window_start += seconds
        share = self.validation_seconds / self.fit_seconds
        values = {"val/seconds": seconds, "val/time_share": share}
        log_values(trainer, trainer.global_step, values)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: what other callbacks do with the trained model is not part of the fit."""
        self.fit_before, self.started = self.fit_seconds, None
