"""Checks that the scores which other callbacks monitor exist, before a run begins."""

from difflib import get_close_matches

import lightning as L

from tf_lightning.errors import UserError
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.breakdown import LOSSES
from tf_lightning.training.module import Transfusion

OURS = ("callbacks", "lightning", "tf_lightning")  # packages whose scores are all known


def check_monitors(
    trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule
) -> None:
    """Refuse a `monitor`, such as ModelCheckpoint's, that names no score of this run.

    Names that begin with train/ are checked by `check_train_monitors`. Callbacks and modules of a
    user may log more scores than are known here; with one of these, no name is refused.

    Raises:
        UserError: no callback and no module logs the score.
    """
    parts = [*trainer.callbacks, model]
    if not all(type(part).__module__.split(".")[0] in OURS for part in parts):
        return
    known = [*module_scores(model, data), "step", "epoch"]
    for callback in trainer.callbacks:
        if hasattr(callback, "score_names"):
            known += callback.score_names(data)
    for name in monitored(trainer):
        if name not in known and not name.startswith("train/"):
            raise unknown(name, known)


def check_train_monitors(trainer: L.Trainer) -> None:
    """Refuse a monitored name that begins with train/ and is missing after a log.

    Raises:
        UserError: nothing has logged the value.
    """
    logged = trainer.callback_metrics
    for name in monitored(trainer):
        if name.startswith("train/") and name not in logged:
            raise unknown(name, [key for key in logged if key.startswith("train/")])


def monitored(trainer: L.Trainer) -> list[str]:
    """Return the names that the callbacks monitor."""
    names = [getattr(callback, "monitor", None) for callback in trainer.callbacks]
    return [name for name in names if isinstance(name, str)]


def unknown(name: str, known: list[str]) -> UserError:
    """Return the error for a score that does not exist."""
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(sorted(known))}"
    return UserError(f"monitor={name!r} is not a score of this run; {advice}")


def module_scores(model: L.LightningModule, data: L.LightningDataModule) -> list[str]:
    """Return the names of the losses that a module logs at validation."""
    if isinstance(model, AutoencoderModule):
        return ["val/loss_l1"]
    if isinstance(model, Transfusion):
        losses = [name for name in LOSSES if name in model.loss_names]
        return [f"val/{source}/{loss}" for source in data.source_names for loss in losses]
    return []
