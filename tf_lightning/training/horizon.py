"""The length of a run: a number of optimizer steps, of epochs, or a time.

The learning rate decays over it. To Lightning, the endless stream of rows is a single epoch, so
limits in epochs are replaced by limits in steps before training starts. Then a resumed run, the
progress bar and the schedule need no other unit.
"""

import math

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_warn

from tf_lightning.data.stream import StreamData


def epochs_to_steps(trainer: L.Trainer) -> None:
    """Replace the limits in epochs of a fit by limits in optimizer steps.

    The data module defines an epoch, see `StreamData.rows_per_epoch`; it is a whole number of
    steps. Where steps are limited too, the earlier end and the later beginning count. Without a
    limit in steps, validations that are given in epochs (`check_val_every_n_epoch`) count epochs of
    the data too.
    """
    loop = trainer.fit_loop
    if not isinstance(trainer.datamodule, StreamData):
        return  # of another project, whose loader ends
    # With min_steps, Lightning sets min_epochs to 1, which an endless epoch never reaches.
    min_epochs = 0 if trainer.min_steps else loop.min_epochs
    if loop.max_steps < 0 and trainer.check_val_every_n_epoch is not None:
        validate_by_steps(trainer)
    if loop.max_epochs not in (None, -1):
        steps = loop.max_epochs * steps_per_epoch(trainer)
        limits = [steps] if loop.max_steps < 0 else [steps, loop.max_steps]
        loop.epoch_loop.max_steps = min(limits)
    if min_epochs:
        loop.epoch_loop.min_steps = min_epochs * steps_per_epoch(trainer)
    loop.max_epochs, loop.min_epochs = -1, 0
    validate_within(trainer)
    check_logging(trainer)


def validate_by_steps(trainer: L.Trainer) -> None:
    """Replace a validation interval in epochs, or in parts of one, by optimizer steps.

    A part is rounded down, so that the last validation of an epoch is within it.
    """
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if isinstance(interval, float):
        trainer.val_check_interval = max(1, int(every * interval * steps_per_epoch(trainer)))
    trainer.check_val_every_n_epoch = None


def validate_within(trainer: L.Trainer) -> None:
    """Validate at the last step of a run that ends before its first validation, with a message."""
    interval, last = trainer.val_check_interval, trainer.max_steps
    if isinstance(interval, int) and 0 < last < interval and trainer.limit_val_batches:
        rank_zero_warn(
            f"trainer.val_check_interval={interval} is after the last step ({last}), so this run "
            "validates once, at its last step; set trainer.limit_val_batches to 0 for no validation"
        )
        trainer.val_check_interval = last


def check_logging(trainer: L.Trainer) -> None:
    """Warn of a run that ends before its training losses are logged for the first time."""
    interval, last = trainer.log_every_n_steps, trainer.max_steps
    if trainer.loggers and 0 < last < interval:
        rank_zero_warn(
            f"trainer.log_every_n_steps={interval} is after the last step ({last}), so this run "
            "logs no training loss; give a smaller number"
        )


def steps_per_epoch(trainer: L.Trainer) -> int:
    """Count the optimizer steps that read the rows of an epoch, rounded up.

    `limit_train_batches` shortens each epoch, as a number of steps or as a share.
    """
    data, limit = trainer.datamodule, trainer.limit_train_batches
    rows_per_step = data.batch_size * data.world_size * data.batches_per_step()
    steps = data.rows_per_epoch / rows_per_step
    return math.ceil(steps * limit if isinstance(limit, float) else min(steps, limit))


class Horizon:
    """Number of optimizer steps of a whole run, for a schedule over the run.

    They are computed once for each step, because with `max_time` the ranks have to agree: callers
    within a forward pass find the value that the learning rate of their step was computed with.
    """

    def __init__(self):
        self.step = self.num_steps = math.nan

    def steps(self, trainer: L.Trainer, step: int) -> float:
        """Return `expected_steps`, the same value whenever it is called for one step."""
        if step != self.step:
            self.step, self.num_steps = step, expected_steps(trainer, step)
        return self.num_steps


def expected_steps(trainer: L.Trainer, step: int) -> float:
    """Return the optimizer steps of the whole run, which ends at `max_steps` or at `max_time`.

    With `max_time` it is the earlier of both ends. The end by time is an estimate that continues at
    the average pace so far, so it is exact when the time is over. A run without limits has
    infinitely many steps. All ranks have to call this, and get the same value.

    Args:
        trainer: the trainer of the fit, after `epochs_to_steps`.
        step: number of finished optimizer steps.
    """
    max_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    timer = timer_of(trainer)
    if timer is None:
        return max_steps
    share = trainer.strategy.broadcast(timer.time_elapsed() / duration_of(timer))
    by_time = step / share if step and share > 0 else math.inf
    return min(max_steps, max(by_time, trainer.min_steps or 0))


def timer_of(trainer: L.Trainer) -> Timer | None:
    """Return the callback that limits the run's time, which Lightning adds for `max_time`."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    timers = [timer for timer in timers if timer.time_remaining() is not None]
    return min(timers, key=Timer.time_remaining, default=None)


def duration_of(timer: Timer) -> float:
    """Return the time that a timer allows, in seconds."""
    return timer.time_elapsed() + timer.time_remaining()


def check_warmup(trainer: L.Trainer, warmup_steps: int) -> None:
    """Warn of a warm-up that the run does not finish; call it after `epochs_to_steps`."""
    if 0 < trainer.max_steps <= warmup_steps:
        rank_zero_warn(
            f"model.warmup_steps={warmup_steps} does not end before the last step "
            f"({trainer.max_steps}), so the learning rate never reaches model.lr; give fewer"
        )


def has_end(trainer: L.Trainer) -> bool:
    """Return whether a fit ends by itself; call it after `epochs_to_steps`."""
    return trainer.max_steps >= 0 or timer_of(trainer) is not None
