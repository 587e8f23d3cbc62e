"""The length of a run: a number of optimizer steps, of epochs, or a time.

The learning rate decays over it. To Lightning, the endless stream of rows is a single epoch, so
limits in epochs are replaced by limits in steps before training starts. Then a resumed run, the
progress bar and the schedule need no other unit.
"""

import math

import lightning as L
from lightning.pytorch.callbacks import Timer

from tf_lightning.data.stream import StreamData


def epochs_to_steps(trainer: L.Trainer) -> None:
    """Replace the limits in epochs of a fit by limits in optimizer steps.

    An epoch is what the data module says, see `StreamData.rows_per_epoch`. Where steps are limited
    too, the earlier end and the later beginning count. Without a limit in steps, validations that
    are given in epochs (`check_val_every_n_epoch`) count epochs of the data too.
    """
    loop = trainer.fit_loop
    if not isinstance(trainer.datamodule, StreamData):
        return  # of another project, whose loader ends
    # With min_steps, Lightning sets min_epochs to 1, which an endless epoch never reaches.
    min_epochs = 0 if trainer.min_steps else loop.min_epochs
    if loop.max_steps < 0 and trainer.check_val_every_n_epoch is not None:
        validate_by_steps(trainer)
    if loop.max_epochs not in (None, -1):
        steps = steps_of_epochs(trainer, loop.max_epochs)
        limits = [steps] if loop.max_steps < 0 else [steps, loop.max_steps]
        loop.epoch_loop.max_steps = min(limits)
    if min_epochs:
        loop.epoch_loop.min_steps = steps_of_epochs(trainer, min_epochs)
    loop.max_epochs, loop.min_epochs = -1, 0


def validate_by_steps(trainer: L.Trainer) -> None:
    """Replace a validation interval in epochs, or in parts of one, by optimizer steps."""
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if isinstance(interval, float):
        trainer.val_check_interval = steps_of_epochs(trainer, every * interval)
    trainer.check_val_every_n_epoch = None


def steps_of_epochs(trainer: L.Trainer, epochs: float) -> int:
    """Count the optimizer steps that read the rows of some epochs, rounded up.

    `limit_train_batches` shortens each epoch, as a number of steps or as a share.
    """
    data, limit = trainer.datamodule, trainer.limit_train_batches
    rows_per_step = data.batch_size * data.world_size * data.batches_per_step()
    steps = data.rows_per_epoch / rows_per_step
    steps = steps * limit if isinstance(limit, float) else min(steps, limit)
    return math.ceil(epochs * steps)


def expected_steps(trainer: L.Trainer, step: int) -> float:
    """Return the optimizer steps of the whole run: `max_steps`, or with `max_time` an estimate.

    The estimate continues at the average pace so far, so it is exact when the time is over. It is
    the same on all ranks. A run without limits has infinitely many steps.

    Args:
        trainer: the trainer of the fit, after `epochs_to_steps`.
        step: number of finished optimizer steps.
    """
    if trainer.max_steps >= 0:
        return trainer.max_steps
    timer = timer_of(trainer)
    if timer is None:
        return math.inf
    elapsed = timer.time_elapsed()
    duration = elapsed + timer.time_remaining()
    share = trainer.strategy.broadcast(elapsed / duration if duration > 0 else 1.0)
    return step / share if share > 0 else math.inf


def timer_of(trainer: L.Trainer) -> Timer | None:
    """Return the callback that limits the run's time, which Lightning adds for `max_time`."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    return next((timer for timer in timers if timer.time_remaining() is not None), None)


def has_end(trainer: L.Trainer) -> bool:
    """Whether a fit ends by itself; call it after `epochs_to_steps`."""
    return trainer.max_steps >= 0 or timer_of(trainer) is not None
