"""Progress of a run: steps, time left, loss and scores, on a terminal or in a log file."""

import time
from datetime import timedelta

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from callbacks.scores import all_records, meaning
from tf_lightning.progress import LOG_SECONDS, on_terminal, progress_bar
from tf_lightning.training.horizon import timer_of

TERMINAL_SECONDS = 0.5  # between two updates of the bar on a terminal
SMOOTHING = 0.05  # weight of the newest loss in the moving average
NUM_SCORES = 4  # scores beside the loss, so that the line stays short


class TrainingProgress(TQDMProgressBar):
    """Shows optimizer steps, time left, loss, learning rate and the scores of the last validation.

    On a terminal, one line is redrawn. Elsewhere, such as in a log file, a line is written every 30
    seconds. The loss is a moving average over about 20 steps; it stays on the device until it is
    shown, so that no step waits for it.
    """

    def _bar(self, desc: str, leave: bool, position: int = 0, unit: str = "batch") -> tqdm:
        return progress_bar(
            desc=desc,
            leave=leave,
            position=2 * self.process_position + position,
            disable=self.is_disabled,
            unit=unit,
            smoothing=0,
        )

    def init_train_tqdm(self) -> tqdm:
        """Create the bar of training."""
        return self._bar("Training", leave=True, unit="step")

    def init_validation_tqdm(self) -> tqdm:
        """Create the bar of validation, below that of training in `fit`."""
        in_fit = self.trainer.state.fn == "fit"
        return self._bar(self.validation_description, leave=not in_fit, position=int(in_fit))

    def init_sanity_tqdm(self) -> tqdm:
        """Create the bar of the sanity check."""
        return self._bar(self.sanity_check_description, leave=False)

    def init_test_tqdm(self) -> tqdm:
        """Create the bar of `test`."""
        return self._bar(self.test_description, leave=True)

    def init_predict_tqdm(self) -> tqdm:
        """Create the bar of `predict`."""
        return self._bar(self.predict_description, leave=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start at the present step, which is not 0 in a resumed run."""
        self.train_progress_bar = bar = self.init_train_tqdm()
        steps = trainer.estimated_stepping_batches
        bar.total = int(steps) if 0 < steps < float("inf") else None
        bar.initial = bar.n = trainer.global_step
        self.loss: Tensor | None = None
        self.scores: list[str] = []
        self.seconds = TERMINAL_SECONDS if on_terminal() else LOG_SECONDS
        self.shown = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, *_) -> None:
        """Do nothing: the bar counts the steps of the whole run."""

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        """Add the loss to its average; show it if the last line is old enough."""
        if self.is_disabled:
            return
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            loss = loss.detach().float()
            before = loss if self.loss is None else self.loss
            average = torch.lerp(before, loss, SMOOTHING)
            self.loss = torch.where(before.isfinite(), average, loss)  # NaN would stay forever
        if time.monotonic() - self.shown >= self.seconds:
            self.show(trainer)

    def show(self, trainer: L.Trainer) -> None:
        """Show the present state."""
        self.shown = time.monotonic()
        self.train_progress_bar.n = trainer.global_step
        parts = [] if self.loss is None else [f"loss {self.loss.item():.4g}"]
        if trainer.optimizers:
            parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2e}")
        if timer := timer_of(trainer):
            parts.append(f"{timedelta(seconds=round(timer.time_remaining()))} left")
        self.train_progress_bar.set_postfix_str(", ".join([*parts, *self.scores]))

    def on_train_epoch_end(self, *_) -> None:
        """Do nothing: the bar counts the steps of the whole run."""

    def on_train_end(self, trainer: L.Trainer, *_) -> None:
        """Show the last state and close the bar."""
        if not self.is_disabled:
            self.show(trainer)
        self.train_progress_bar.close()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar of the validation and keep the main scores for that of training."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        main = [record for record in all_records(trainer) if meaning(record.name).brief]
        main.sort(key=lambda record: "[" not in record.name)  # scores of samples first
        self.scores = [f"{r.name.removeprefix('val/')} {r.value:.4g}" for r in main[:NUM_SCORES]]

    def on_exception(self, trainer: L.Trainer, *_) -> None:
        """Close all bars at the present step; the error message begins on a line of its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.n = trainer.global_step
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()
