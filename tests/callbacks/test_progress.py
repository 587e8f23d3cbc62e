"""The progress of a run: steps, time left, smoothed loss and scores; the loss is read rarely."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from callbacks import progress
from callbacks.progress import SMOOTHING, TrainingProgress
from callbacks.protocol import MetricRecord
from support import runs
from tf_lightning.cli.main import main
from tf_lightning.progress import write_line


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set, in seconds, for the callback and the bar."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def started(total: float = 40, **attributes) -> tuple[TrainingProgress, SimpleNamespace]:
    """The callback at the start of a fit, and its trainer."""
    trainer = SimpleNamespace(
        **{"is_global_zero": True, "global_step": 0, "estimated_stepping_batches": total},
        callbacks=[],
        callback_metrics={},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 3e-4}])],
        state=SimpleNamespace(fn="fit"),
    )
    vars(trainer).update(attributes)
    callback = TrainingProgress()
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)
    return callback, trainer


def step(callback, trainer, loss) -> None:
    trainer.global_step += 1
    trainer.callback_metrics["train/loss"] = torch.as_tensor(loss)
    callback.on_train_batch_end(trainer, None, None, None, 0)


def test_a_log_gets_a_line_every_30_seconds_with_the_smoothed_loss_and_the_rate(clock, capsys):
    callback, trainer = started()
    average = 8.0
    for number in range(1, 41):
        clock[0] = 2.0 * number
        loss = 8.0 - number / 10
        step(callback, trainer, loss)
        average = loss if number == 1 else average + SMOOTHING * (loss - average)
        if number == 15:
            expected = average
    callback.on_train_end(trainer, None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["15/40", "30/40", "40/40"]
    assert f"loss {expected:.4g}, lr 3.00e-04" in lines[0]
    assert f"loss {average:.4g}" in lines[-1] and "step/s" in lines[-1]


def test_no_step_reads_the_loss_between_two_lines(clock, monkeypatch, capsys):
    callback, trainer = started()
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the device was read"))
    for _ in range(20):
        clock[0] += 1.0
        step(callback, trainer, 1.0)
    assert capsys.readouterr().err == ""


def test_one_loss_that_is_not_finite_does_not_stay(clock):
    callback, trainer = started()
    for loss in (1.0, float("nan"), 2.0, 2.0):
        step(callback, trainer, loss)
    assert callback.loss == 2.0


def test_a_resumed_run_begins_at_its_step_and_a_run_by_time_shows_the_time_left(clock, capsys):
    timer = Timer("00:02:00:00")
    timer.time_remaining = lambda: 3661.4
    callback, trainer = started(float("inf"), global_step=7, callbacks=[timer])
    clock[0] = 31.0
    step(callback, trainer, 1.0)
    line = capsys.readouterr().err
    assert line.startswith("Training: 8step ") and f"{timedelta(seconds=3661)} left" in line
    assert callback.train_progress_bar.initial == 7


def test_the_scores_of_the_last_validation_are_beside_the_loss(clock, capsys):
    records = [
        MetricRecord("val/text/perplexity", 8.0, {}),
        MetricRecord("val/fid[shapes]", 12.5, {}),
        MetricRecord("val/text/bits_per_byte", 1.0, {}),
    ]
    callback, trainer = started(callbacks=[SimpleNamespace(records=records)])
    callback.on_validation_start(SimpleNamespace(sanity_checking=False), None)
    callback.on_validation_end(trainer, None)
    step(callback, trainer, 1.0)
    callback.on_train_end(trainer, None)
    line = capsys.readouterr().err
    assert "loss 1, lr 3.00e-04, fid[shapes] 12.5, text/perplexity 8]" in line


def test_another_line_does_not_repeat_an_old_state_of_the_bar_in_a_log(clock, capsys):
    callback, trainer = started()
    callback.train_progress_bar.refresh()
    clock[0] = 31.0
    write_line("Step 20: text/perplexity 8")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("Step 20: text/perplexity 8\n", "")


def test_an_interrupted_run_ends_its_bar_at_its_step(clock, capsys):
    callback, trainer = started()
    for _ in range(3):
        step(callback, trainer, 1.0)
    callback.on_exception(trainer, None, KeyboardInterrupt())
    assert " 3/40 " in capsys.readouterr().err


def test_other_ranks_show_nothing(clock, capsys):
    callback, trainer = started(is_global_zero=False)
    clock[0] = 99.0
    step(callback, trainer, 1.0)
    callback.on_train_end(trainer, None)
    assert capsys.readouterr().err == ""


def test_the_log_of_a_short_run_is_a_few_lines(tmp_path, capsys):
    def change(config: dict) -> None:
        config["trainer"]["enable_progress_bar"] = True
        config["trainer"]["callbacks"] = []

    main(["fit", "-c", str(runs.write_config(tmp_path, change))])
    said = capsys.readouterr()
    bars = [line for line in said.err.splitlines() if line.startswith(("Training", "Validation"))]
    assert len(bars) == 1 and f"{runs.MAX_STEPS}/{runs.MAX_STEPS}" in bars[0]
    assert "loss " in bars[0] and "text/perplexity " in bars[0]
    assert "\r" not in said.err + said.out
    scores = [line for line in said.out.splitlines() if line.startswith("Step ")]
    assert [line[:7] for line in scores] == ["Step 3:", "Step 6:"]
    assert all("captions/loss_diffusion" in line for line in scores)
