"""benchmarks/variants.py: a tiny table is written and continued."""

import json

import pytest
import torch

from benchmarks import variants
from support import runs

STEPS = 3


def save_as_recipes_do(config: dict) -> None:
    """Move ModelCheckpoint from the list of callbacks to its own key."""
    saves, *others = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"], config["checkpoint"] = others, saves["init_args"]


def make_table(folder, *names: str) -> list[list[str]]:
    """Cells of the table for variants of the tests' small run, trained for STEPS steps."""
    base = runs.write_config(folder, save_as_recipes_do)
    options = ["--variants", *names, f"--steps={STEPS}", f"--out={folder}/out", f"--base={base}"]
    variants.main(options)
    lines = (folder / "out" / "table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_the_table_has_a_row_per_variant_and_is_continued(tmp_path, monkeypatch):
    head, _, baseline = make_table(tmp_path, "baseline")
    assert head == ["variant", *variants.COLUMNS] and baseline[0] == "baseline"
    report = json.loads((tmp_path / "out" / "baseline" / "report.json").read_text())
    assert baseline[1] == f"{report['one_object']:.1%}"
    assert baseline[6] == f"{report['num_parameters']:,}"

    commands = []
    original = variants.tf_lightning
    monkeypatch.setattr(
        variants, "tf_lightning", lambda args: (commands.append(args[0]), original(args))
    )
    _, _, first, second = make_table(tmp_path, "baseline", "mot_ffn")
    assert first == baseline and commands == ["fit"]  # for mot_ffn only
    assert second[0] == "mot_ffn" and second[6] != baseline[6]
    assert second[7] == baseline[7] and float(baseline[7]) > 0  # the same FLOPs
    config = (tmp_path / "out" / "mot_ffn" / "config.yaml").read_text()
    assert "modality_weights: ffn" in config

    (tmp_path / "out" / "mot_ffn" / "report.json").unlink()  # as if killed during validation
    _, _, _, again = make_table(tmp_path, "baseline", "mot_ffn")
    assert commands == ["fit", "validate"] and again[:-1] == second[:-1]


def test_the_language_model_that_a_variant_starts_from_is_trained_first_and_once(
    tmp_path, monkeypatch
):
    commands = []

    def run(args: list[str]) -> None:
        """Write the checkpoint that a training leaves."""
        commands.append(args)
        name = "shapes_text" if "shapes_text" in " ".join(args[:3]) else "monoformer"
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        steps = {"shapes_text": 240, "monoformer": 9}[name]
        torch.save({"global_step": steps}, folder / "last.ckpt")

    monkeypatch.setattr(variants, "tf_lightning", run)
    variants.train("monoformer", tmp_path / "base.yaml", tmp_path, 9, ["--trainer.devices=1"])
    first, second = commands
    assert first[:3] == ["fit", "-c", str(variants.INITIAL_MODELS["monoformer"])]
    assert f"--trainer.logger.init_args.save_dir={tmp_path}" in first
    assert "--trainer.devices=1" in first and "--trainer.devices=1" in second
    start = tmp_path / "shapes_text" / "checkpoints" / "last.ckpt"
    assert f"--init_from.checkpoint={start}" in second and second[0] == "fit"
    variants.train("monoformer", tmp_path / "base.yaml", tmp_path, 9, [])
    assert [args[0] for args in commands] == ["fit", "fit", "validate"]


def test_a_report_of_an_earlier_step_is_ignored(tmp_path):
    assert variants.read_report(tmp_path, 9) is None and variants.steps_done(tmp_path) == 0
    (tmp_path / "report.json").write_text('{"global_step": 6}')
    assert variants.read_report(tmp_path, 9) is None
    assert variants.read_report(tmp_path, 6) == {"global_step": 6}
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": 6}, tmp_path / "checkpoints" / "last.ckpt")
    assert variants.steps_done(tmp_path) == 6


def test_the_metrics_of_the_last_validation_are_read(tmp_path):
    assert variants.last_metrics(tmp_path, 6) == {}
    (tmp_path / "metrics").mkdir()
    numbers = [{"name": "val/fid[shapes]", "value": 1.5, "protocol": {}}]
    path = tmp_path / "metrics" / "step0000006-val.json"
    path.write_text(json.dumps({"global_step": 6, "numbers": numbers}))
    assert variants.last_metrics(tmp_path, 6) == {"fid[shapes]": 1.5}
    (tmp_path / "validate").mkdir()  # by a later validate
    path.rename(tmp_path / "validate" / "metrics.json")
    assert variants.last_metrics(tmp_path, 6) == {"fid[shapes]": 1.5}
    assert variants.last_metrics(tmp_path, 9) == {}


def test_missing_values_are_dashes():
    cells = variants.table({"a": {"one_object": 0.5}}).splitlines()[2].split(" | ")
    assert cells[1] == "50.0%" and set(cells[2:]) == {"-", "- |"}


@pytest.mark.parametrize("steps", ["0", "1000"])
def test_a_number_of_steps_without_a_last_checkpoint_is_refused(steps, capsys):
    with pytest.raises(SystemExit):
        variants.main(["--steps", steps])
    assert "must be a multiple of 300" in capsys.readouterr().err
