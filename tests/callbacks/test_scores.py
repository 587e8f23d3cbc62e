"""The table and the line of scores: whole names, units, directions and numbers of samples."""

import io
from types import SimpleNamespace

import pytest
import torch

from callbacks import scores
from callbacks.protocol import MetricRecord
from callbacks.scores import PrintScores, all_records, meaning, num_samples, print_table, score_line

LABEL = "coco30k-val2014full-lanczos256-torchfidelity"
FID = MetricRecord(f"val/fid[{LABEL}]", 12.3456789, {"num_generated": 30_000, "weights": "ema"})
TASKS = {"num_images": {"colors": 3, "position": 4}}
RECORDS = [
    FID,
    MetricRecord("val/clip_score[shapes]", 25.5, {"num_pairs": 128, "weights": "ema"}),
    MetricRecord("val/composition[shapes]/colors", 0.5, TASKS),
    MetricRecord("val/composition[shapes]/overall", 0.25, TASKS),
    MetricRecord("val/text/perplexity", 8.0, {"num_tokens": 1234}),
    MetricRecord("val/text/loss_lm", 2.0794, {}),
    MetricRecord("val/psnr", 30.0, {"num_images": 7}),
    MetricRecord("val/mine/[bold]own[/bold]", 1.0, {}),
]


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of a printed table by their first cell."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_the_table_has_whole_names_units_directions_and_samples_at_any_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    print_table(RECORDS)
    found = rows(capsys.readouterr().out)
    assert found[FID.name] == ["12.3457", "", "↓", "30,000"]
    assert found["val/clip_score[shapes]"] == ["25.5", "", "↑", "128"]
    assert found["val/composition[shapes]/colors"] == ["0.5", "share", "↑", "3"]
    assert found["val/composition[shapes]/overall"] == ["0.25", "share", "↑", "7"]
    assert found["val/text/perplexity"] == ["8", "", "↓", "1,234"]
    assert found["val/text/loss_lm"] == ["2.0794", "nats", "↓", ""]
    assert found["val/psnr"] == ["30", "dB", "↑", "7"]
    assert found["val/mine/[bold]own[/bold]"] == ["1", "", "", ""]


def test_a_sweep_has_a_row_for_each_scale():
    scale = MetricRecord("val/fid[shapes]@2.5", 1.0, {"num_generated": 4})
    assert meaning(scale.name) == meaning("val/fid[shapes]") == scores.SCORES["fid"]
    task = MetricRecord("val/composition[shapes]/position@2.5", 1.0, TASKS)
    assert num_samples(task) == 4


def test_a_terminal_without_arrows_gets_words(monkeypatch):
    ascii_stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(scores.sys, "stdout", ascii_stdout)
    assert score_line(RECORDS[:2]) == f"fid[{LABEL}] 12.35 lower, clip_score[shapes] 25.5 higher"


def test_the_line_has_the_main_scores():
    line = score_line(RECORDS)
    assert line.startswith(f"fid[{LABEL}] 12.35 ↓, clip_score[shapes] 25.5 ↑, ")
    assert "composition[shapes]/overall 0.25 ↑" in line and "text/perplexity 8 ↓" in line
    assert "colors" not in line and "loss_lm" not in line


def trainer(fn: str, records=(), **logged: float) -> SimpleNamespace:
    """A trainer after a validation."""
    return SimpleNamespace(
        callbacks=[SimpleNamespace(records=records), SimpleNamespace()],
        callback_metrics={name: torch.tensor(value) for name, value in logged.items()},
        is_global_zero=True,
        sanity_checking=False,
        global_step=1200,
        state=SimpleNamespace(fn=fn),
    )


def test_a_score_that_is_missing_is_not_taken_from_an_earlier_validation():
    logged = {"val/text/loss_lm": 2.0, "val/fid[shapes]": 3.0, "train/loss": 1.0}
    assert [r.name for r in all_records(trainer("fit", **logged))] == ["val/text/loss_lm"]
    names = [r.name for r in all_records(trainer("fit", RECORDS[:1], **logged))]
    assert names == [FID.name, "val/text/loss_lm"]


@pytest.mark.parametrize("fn", ["fit", "validate"])
def test_scores_are_printed_once_by_rank_zero(fn, capsys):
    callback, run = PrintScores(), trainer(fn, RECORDS)
    callback.on_validation_end(run, None)
    printed = capsys.readouterr().out
    assert printed.count(FID.name.removeprefix("val/")) == 1
    assert printed.startswith("Step 1,200: fid") == (fn == "fit")
    for quiet in ({"is_global_zero": False}, {"sanity_checking": True}, {"callbacks": []}):
        vars(run).update(quiet)
        callback.on_validation_end(run, None)
        assert capsys.readouterr().out == ""
