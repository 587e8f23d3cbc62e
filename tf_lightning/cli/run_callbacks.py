"""The callbacks of a run: those of every run, and those with a key of their own."""

from collections.abc import Iterable
from pathlib import Path

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from tf_lightning.cli.named_callbacks import NAMED
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file

# Callbacks of every run, each configured under its own key: path of the class, and defaults.
ALWAYS: dict[str, tuple[str, dict]] = {
    "progress_bar": ("callbacks.progress.TrainingProgress", {}),
    "scores": ("callbacks.scores.PrintScores", {}),
    "checkpoint": (
        "lightning.pytorch.callbacks.ModelCheckpoint",
        {
            "save_top_k": -1,
            "save_last": "link",
            "filename": "step{step:07d}",
            "auto_insert_metric_name": False,
            "save_on_train_epoch_end": False,
            # A resumed run would otherwise write last-v1.ckpt beside an outdated last.ckpt.
            "enable_version_counter": False,
        },
    ),
    "learning_rate_monitor": (
        "lightning.pytorch.callbacks.LearningRateMonitor",
        {"logging_interval": "step"},
    ),
}


class SaveFitConfig(SaveConfigCallback):
    """Writes config.yaml and hparams.yaml when training starts, and says how large the model is.

    Refused runs and evaluations do not overwrite the earlier files.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing yet, because data and checkpoint may not fit the model."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files into the run's folder."""
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir, self.config_filename)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as partial:
                self.parser.save(self.config, partial, skip_none=False, multifile=False)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # keeps a file that it finds
                    Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
                    logger.save()
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        rank_zero_info(f"Training {trained:,} parameters")


def always_callbacks(built: Namespace, listed: list[Callback]) -> list[Callback]:
    """Return the callbacks of every run.

    One is left out where `trainer.callbacks` lists one of its class, or where
    `enable_progress_bar`, `enable_checkpointing` or `logger` is false.
    """
    switches = {
        "progress_bar": built.trainer.enable_progress_bar,
        "checkpoint": built.trainer.enable_checkpointing,
        "learning_rate_monitor": built.trainer.logger,
    }
    return [
        built[key]
        for key in ALWAYS
        if switches.get(key) is not False and not any(same_role(own, built[key]) for own in listed)
    ]


def same_role(one: Callback, other: Callback) -> bool:
    """Return whether a run needs only one of two callbacks, such as two progress bars."""
    return any(
        isinstance(one, kind) and isinstance(other, kind) for kind in (type(other), ProgressBar)
    )


def refuse_unused(typed_keys: Iterable[str], built: Namespace, listed: list[Callback]) -> None:
    """Refuse a typed option of a callback that one of `trainer.callbacks` replaces.

    Args:
        typed_keys: the keys that the command line gives.
        built: the configuration with its objects.
        listed: `trainer.callbacks`.
    """
    for key in ALWAYS:
        typed = [name for name in typed_keys if name.startswith(f"{key}.")]
        if typed and any(same_role(own, built[key]) for own in listed):
            raise UserError(
                f"--{typed[0]} has no effect, because trainer.callbacks has a "
                f"{type(built[key]).__name__} of its own; set it there, or remove that one"
            )


def named_callbacks(
    built: Namespace, listed: list[Callback], with_defaults: bool
) -> list[Callback]:
    """Return the callbacks of NAMED that a run has.

    One that is also in `trainer.callbacks` is taken from there, so that configurations that list
    every callback keep their meaning.

    Args:
        built: the configuration with its objects.
        listed: `trainer.callbacks`.
        with_defaults: include the defaults of NAMED, which only Transfusion can have.
    """
    keys = [key for key in NAMED if built[key] is not None]
    if not with_defaults:
        keys = [key for key in keys if not NAMED[key].default]
    taken = {callback.state_key for callback in listed}
    for key in keys:
        if built[key].state_key in taken and not NAMED[key].default:
            name = type(built[key]).__name__
            rank_zero_warn(f"trainer.callbacks has a {name} too, so `{key}` is not used")
    return [built[key] for key in keys if built[key].state_key not in taken]
