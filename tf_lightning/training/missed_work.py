"""A resumed run makes up the validation and the work at the end of training that it missed."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from tf_lightning.files import atomic_file

PROGRESS_FILE = "progress.json"


class MissedWork(Checkpoint):
    """Records which validation was completed and whether the run was; makes up what is missing.

    Lightning skips the validation after the step of a checkpoint when it resumes, and does nothing
    at all if no step remains. A run that was killed in a validation, or in the work of callbacks at
    the end of training, would stay without their results. It is the last callback, so that
    it records that all others are done.
    """

    def __init__(self):
        self.resumed_step: int | None = None
        self.progress: dict[str, int | None] | None = None
        self.limits: tuple[int, bool] | None = None

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the step of the checkpoint."""
        self.resumed_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the loop begin although no step remains, if the end of the run was not completed."""
        if self.resumed_step is None:
            return
        # Rank zero decides before any rank replaces the record.
        self.progress = trainer.strategy.broadcast(read_progress(Path(trainer.default_root_dir)))
        if self.progress and self.progress["finished_step"] != self.resumed_step:
            loop = trainer.fit_loop.epoch_loop
            self.limits = loop.max_steps, trainer.should_stop
            trainer.should_stop = False
            if 0 <= loop.max_steps <= self.resumed_step:
                loop.max_steps = self.resumed_step + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make up the validation at the step of the checkpoint, if it is due and not recorded."""
        loop = trainer.fit_loop.epoch_loop
        if self.limits:
            loop.max_steps, trainer.should_stop = self.limits
            self.limits = None
        # Without a record: a new run, or one of a version that did not record this.
        validated = self.progress and self.progress["validated_step"] == self.resumed_step
        kept = self.resumed_step if validated else None
        write_progress(trainer, validated_step=kept, finished_step=None)
        if self.progress and not validated:
            if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
                validate(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the completed validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            write_progress(trainer, validated_step=trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the run is complete, when all ranks have done their work at its end."""
        write_progress(trainer, finished_step=trainer.global_step)


def validate(trainer: L.Trainer) -> None:
    """Validate before the next training step, as Lightning's training loop does."""
    first_iteration = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_iteration


def read_progress(folder: Path) -> dict[str, int | None] | None:
    """Read the record of a run; None if there is none."""
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text())
        return {name: progress[name] for name in ("validated_step", "finished_step")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_progress(trainer: L.Trainer, **changed: int | None) -> None:
    """Change entries of the run's record, on rank zero."""
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return
    folder = Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    progress = read_progress(folder) or {"validated_step": None, "finished_step": None}
    with atomic_file(folder / PROGRESS_FILE) as file:
        file.write_text(json.dumps(progress | changed) + "\n")
