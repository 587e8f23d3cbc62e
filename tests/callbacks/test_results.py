"""The folder of a run's results, and the validations that are skipped in `fit`."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.results import outside_fit, run_folder

ONE_RANK = SimpleNamespace(broadcast=lambda value: value)


@pytest.mark.parametrize(
    ("fn", "place"),
    [
        (TrainerFn.FITTING, "run"),
        (TrainerFn.VALIDATING, "run/validate"),
        (TrainerFn.TESTING, "run/test"),
    ],
)
def test_an_evaluation_writes_into_a_folder_of_its_own(fn, place, tmp_path):
    state, run = SimpleNamespace(fn=fn), str(tmp_path / "run")
    for logger, log_dir, root in (
        (CSVLogger(str(tmp_path), name="run", version=""), run, "no"),
        (DummyLogger(), "the folder of all runs", run),  # as Weights & Biases has it
        (None, None, run),
    ):
        trainer = SimpleNamespace(
            logger=logger, log_dir=log_dir, state=state, default_root_dir=root, strategy=ONE_RANK
        )
        assert run_folder(trainer) == tmp_path / place and (tmp_path / place).is_dir()


def test_a_second_evaluation_keeps_the_results_of_the_first(tmp_path):
    def evaluate(fn: TrainerFn) -> Path:
        state = SimpleNamespace(fn=fn)
        trainer = SimpleNamespace(
            logger=None, state=state, default_root_dir=str(tmp_path), strategy=ONE_RANK
        )
        folder = run_folder(trainer)
        (folder / "metrics.json").write_text("{}")
        assert run_folder(trainer) == folder  # also for the callbacks that come later
        return folder

    folders = [evaluate(TrainerFn.VALIDATING) for _ in range(3)]
    assert folders == [tmp_path / name for name in ("validate", "validate-2", "validate-3")]
    assert evaluate(TrainerFn.TESTING) == tmp_path / "test"
    assert evaluate(TrainerFn.FITTING) == evaluate(TrainerFn.FITTING) == tmp_path


def test_a_hook_outside_fit_is_skipped_in_the_validations_of_fit():
    class Examination:
        calls: list[str] = []

        def examine(self, trainer, pl_module) -> None:
            """Examine."""
            self.calls.append(trainer.state.fn.value)

        on_train_end = examine
        on_validation_end = outside_fit(examine)

    examination = Examination()
    for fn in (TrainerFn.FITTING, TrainerFn.VALIDATING):
        examination.on_validation_end(SimpleNamespace(state=SimpleNamespace(fn=fn)), None)
    assert examination.calls == ["validate"]
    assert Examination.on_validation_end.__doc__ == "Examine."
