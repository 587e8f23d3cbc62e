"""Result files of a run: the folder they go to, and the validations that write them."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: L.Trainer) -> Path:
    """Return the run's folder in `fit`, and its subfolder of the command's name otherwise.

    Call it on every rank: `log_dir` broadcasts rank zero's folder to the others. That of loggers
    such as W&B is shared by all runs; the command line sets the root directory to the run's folder.
    """
    is_own = isinstance(trainer.logger, TensorBoardLogger | CSVLogger)
    folder = Path(trainer.log_dir if is_own else trainer.default_root_dir)
    folder = folder if trainer.state.fn == "fit" else folder / str(trainer.state.fn.value)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weights_step(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Return the optimizer steps of the weights; outside `fit` the trainer's own count is 0."""
    return trainer.global_step or module.loaded_step


def is_trial(trainer: L.Trainer) -> bool:
    """Whether the model is not worth examining: the sanity check, or one batch (fast_dev_run)."""
    return trainer.sanity_checking or bool(trainer.fast_dev_run)


def outside_fit(hook: Callable) -> Callable:
    """Wrap a callback's hook so that it is skipped in the validations within `fit`.

    A callback that examines the finished model once uses it for `on_validation_end`, beside
    `on_train_end` and `on_test_end`.
    """

    @wraps(hook)
    def hook_outside_fit(
        self: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        if trainer.state.fn != "fit":
            hook(self, trainer, pl_module)

    return hook_outside_fit
