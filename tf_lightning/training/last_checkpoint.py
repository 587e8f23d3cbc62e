"""The newest state of a run is saved whenever the run ends, so that it can be resumed exactly."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from tf_lightning.errors import Interrupted
from tf_lightning.files import partial_path
from tf_lightning.training.fsdp import reshard
from tf_lightning.training.interrupts import has_sharded_weights, requeue, requeue_signal
from tf_lightning.training.sharded_saves import call_when_saved, wait_for_saves


class LastCheckpoint(Checkpoint):
    """Saves after the last step, before its validation, and when training fails or is stopped.

    It uses the names of the run's ModelCheckpoint. An interrupted run is saved as it was at the end
    of the last finished step: validation does not change the state, and the gradients of an
    unfinished step are dropped. `MissedWork` is the only callback after it.

    Args:
        saver: the run's ModelCheckpoint.
    """

    def __init__(self, saver: ModelCheckpoint):
        self.saver = saver
        saver._link_checkpoint = replace_link  # Lightning's leaves a moment without last.ckpt
        self.step = self.saved_step = 0
        self.loops: dict[str, Any] = {}
        self.saved_loops: dict[str, Any] | None = None
        self.updating: int | None = None

    @property
    def began(self) -> bool:
        """Whether training has started."""
        return bool(self.loops)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Do not save the state of a checkpoint again, if the run ends before its first step."""
        self.saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from a state that needs no saving: the initial one, or a checkpoint's."""
        self.step = self.saved_step = trainer.global_step
        resumed = trainer.ckpt_path and Path(trainer.ckpt_path).resolve()
        if resumed and resumed.parent == Path(self.saver.dirpath).resolve():
            # Otherwise ModelCheckpoint writes it again at the end of a run without further steps.
            self.saver._last_checkpoint_saved = str(resumed)
        self.loops = trainer.fit_loop.state_dict()

    def on_before_optimizer_step(self, trainer: L.Trainer, *args) -> None:
        """Weights, optimizer and moving average change until the step is counted."""
        self.updating = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:
        """Keep the state of the loops at the end of a step; save after the last step."""
        if trainer.global_step == self.step:  # within an accumulation
            return
        self.step, self.loops = trainer.global_step, trainer.fit_loop.state_dict()
        if is_last_step(trainer):
            self.save(trainer)
            wait_for_saves(trainer)  # the callbacks at the end of training may read it

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save where a validation ended the training, as EarlyStopping does."""
        if trainer.should_stop:
            self.save(trainer)
        wait_for_saves(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait until the ModelCheckpoint's saves are written."""
        wait_for_saves(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last consistent state, if it is newer than the newest checkpoint."""
        together = trainer.world_size == 1 or getattr(exception, "on_all_ranks", False)
        signum = exception.signum if isinstance(exception, Interrupted) else 0
        asks_to_requeue = signum != 0 and signum == requeue_signal(trainer)
        loops = self.consistent_loops(trainer)
        if loops is not None and (together or not has_sharded_weights(pl_module)):
            self.saved_loops = loops
            path = None
            if asks_to_requeue:
                root = trainer.default_root_dir
                path = trainer._checkpoint_connector.hpc_save_path(root)
            try:
                reshard(pl_module)  # an error may have left the parts of a layer gathered
                self.save(trainer, path, together)
                wait_for_saves(trainer)
            except Exception as error:  # the first error is the one to report
                rank_zero_warn(f"the state of step {trainer.global_step} was not saved: {error}")
        if asks_to_requeue and trainer.is_global_zero:
            requeue()

    def consistent_loops(self, trainer: L.Trainer) -> dict[str, Any] | None:
        """Return the loops' state that belongs to the weights; None in the middle of a step."""
        if trainer.state.fn != "fit" or trainer.fast_dev_run or trainer.global_step == 0:
            return None
        # A step that is left out changes nothing, also the one after which the guard ends the run.
        guard = getattr(trainer.lightning_module, "guard", None)  # a module of a user has none
        is_left_out = guard is not None and guard.leaves_out
        if self.updating == trainer.global_step and not is_left_out:
            return None
        if self.step == trainer.global_step:
            return self.loops
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        return trainer.fit_loop.state_dict() if batches.processed == batches.ready else None

    def save(self, trainer: L.Trainer, path: str | None = None, together: bool = True) -> None:
        """Save the state unless it is in the newest checkpoint already.

        Args:
            trainer: trainer of the run.
            path: the file; None: the name that the ModelCheckpoint gives, with `last.ckpt` as a
                link to it.
            together: all ranks call this; otherwise rank zero saves without the others.
        """
        step, saver = trainer.global_step, self.saver
        if trainer.fast_dev_run or step in (self.saved_step, saver._last_global_step_saved):
            return
        metrics = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(step)}
        last = Path(saver.dirpath) / f"{saver.CHECKPOINT_NAME_LAST}{saver.FILE_EXTENSION}"
        if path is None:
            logged = trainer.callback_metrics if together else {}  # reduces them over ranks
            path = saver.format_checkpoint_name({**logged, **metrics})
            saver.last_model_path, saver._last_checkpoint_saved = str(last), path
        if saver.monitor is None:
            saver._last_global_step_saved = step
        if together:
            trainer.save_checkpoint(path, weights_only=False)
        elif trainer.is_global_zero:
            trainer.lightning_module.saves_alone = True  # other ranks do not join its checks
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
        if saver._last_checkpoint_saved == path and trainer.is_global_zero:
            call_when_saved(trainer, link_to, Path(path), last)
        self.saved_step = step

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the state of the loops at the end of the last step into an interrupted run's file."""
        if self.saved_loops is not None:
            checkpoint["loops"]["fit_loop"] = self.saved_loops


def is_last_step(trainer: L.Trainer) -> bool:
    """Return whether the training ends with the present batch."""
    last_epoch = trainer.max_epochs not in (None, -1) and (
        trainer.current_epoch + 1 >= trainer.max_epochs
    )
    return (
        trainer.should_stop
        or 0 <= trainer.max_steps <= trainer.global_step
        or (trainer.is_last_batch and last_epoch)
    )


def replace_link(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
    """Make `linkpath` a link to the checkpoint `filepath`, on rank zero."""
    if trainer.is_global_zero:
        call_when_saved(trainer, link_to, Path(filepath), Path(linkpath))
    trainer.strategy.barrier()


def link_to(file: Path, link: Path) -> None:
    """Make `link` a relative symbolic link to `file`; an older link is replaced in one step."""
    if os.path.abspath(file) == os.path.abspath(link):
        return
    if link.is_dir() and not link.is_symlink():  # of a sharded run with save_last: true
        os.rename(link, link.with_name(f"previous-{link.name}"))
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(link)
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(os.path.relpath(file, link.parent))
    except OSError:  # Windows allows links to administrators only, some file systems none
        shutil.copyfile(file, partial)
    os.replace(partial, link)
