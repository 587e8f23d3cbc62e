"""Result files of a run: the folder they go to, and the validations that write them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from tf_lightning.errors import UserError


def run_folder(trainer: L.Trainer) -> Path:
    """Return the run's folder in `fit`, and its subfolder of the command's name otherwise.

    A second `validate` or `test` in the same folder writes to validate-2 or test-2, and so on.

    Call it on every rank: `log_dir` broadcasts rank zero's folder to the others. That of loggers
    such as W&B is shared by all runs; the command line sets the root directory to the run's folder.
    """
    is_own = isinstance(trainer.logger, TensorBoardLogger | CSVLogger)
    folder = Path(trainer.log_dir if is_own else trainer.default_root_dir)
    verb = trainer.state.fn
    if verb in ("validate", "test"):
        if not hasattr(trainer, "results_folder"):  # the same for all callbacks and ranks
            free = (path for path in numbered(folder / verb.value) if is_empty(path))
            trainer.results_folder = trainer.strategy.broadcast(next(free))
        folder = trainer.results_folder
    elif verb != "fit":
        folder = folder / verb.value
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def numbered(folder: Path) -> Iterator[Path]:
    """Yield a folder, and then folder-2, folder-3 and so on beside it, without end."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in count(2))


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing or is not there."""
    return not folder.is_dir() or not any(folder.iterdir())


def weights_step(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Return the optimizer steps of the weights; outside `fit` the trainer's own count is 0."""
    return trainer.global_step or module.loaded_step


def is_trial(trainer: L.Trainer) -> bool:
    """Return whether this is only a trial: the sanity check, or one batch (fast_dev_run)."""
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


@contextmanager
def warn_in_fit(trainer: L.Trainer, what: str) -> Iterator[None]:
    """Turn a ValueError into a warning in `fit`, where a failed evaluation must not end the run.

    Args:
        trainer: trainer of the run.
        what: the evaluation, for the message.

    Raises:
        UserError: the evaluation failed in another command, such as `validate`.
    """
    try:
        yield
    except ValueError as error:
        if trainer.state.fn != "fit":
            raise UserError(str(error)) from error
        rank_zero_warn(f"{what} at step {trainer.global_step} failed: {error}")
