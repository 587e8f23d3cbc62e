"""benchmarks/pair.py: budgets and values of two runs, computed by hand."""

import json
import math

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from benchmarks import pair


def make_run(folder, images_per_token: float, flops_6n: float, fids: dict[int, float]):
    """Write the logs of a run with two rows of 100 positions per step, half of them padding."""
    with SummaryWriter(str(folder)) as writer:
        for name, value in {
            "padding_share": 0.5, "flops_per_token": 2e6, "flops_per_token_6n": flops_6n,
            "images_per_token": images_per_token,
        }.items():  # fmt: skip
            writer.add_scalar(f"train/{name}", value, 0)
    data = {"data": {"init_args": {"batch_size": 2, "row_length": 100}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    (folder / "metrics").mkdir()
    for step, fid in fids.items():
        numbers = [{"name": "val/fid", "value": fid}, {"name": "val/x/loss_codes", "value": 1.0}]
        content = {"global_step": step, "numbers": [*numbers, {"name": "val/bad", "value": None}]}
        (folder / "metrics" / f"step{step:07d}-val.json").write_text(json.dumps(content))
    return folder


def test_budgets_are_equal_for_both_runs_and_values_are_interpolated(tmp_path, capsys):
    folders = [tmp_path / "patches", tmp_path / "codes"]
    make_run(folders[0], 0.04, 3e6, {100: 9.0, 200: 5.0})
    make_run(folders[1], 0.01, 6e6, {100: 20.0, 200: 10.0})
    runs = [pair.read_run(folder) for folder in folders]
    assert [run.tokens_per_step for run in runs] == pytest.approx([100, 100])
    steps = pair.budgets(runs)
    assert steps["equal tokens"] == pytest.approx([200, 200])
    assert steps["equal 6ND"] == pytest.approx([200, 100])
    assert steps["equal images"] == pytest.approx([50, 200])
    assert pair.shared(runs) == ["fid"]
    assert runs[1].at("fid", 150) == 15 and math.isclose(runs[0].against_flops("fid")[1][0], 4e-5)
    pair.main([*map(str, folders), "--out", str(tmp_path / "page")])
    told = (tmp_path / "page.md").read_text()
    cells = {
        line.split(" | ")[0]: line.strip(" |\n").split(" | ")[1:] for line in told.splitlines()
    }
    assert cells["| fid"] == ["5", "10", "5", "20", "9", "10"]
    assert cells["| images"] == ["800", "200", "800", "100", "200", "200"]
    assert (tmp_path / "page.png").is_file() and told in capsys.readouterr().out


def test_a_run_without_validation_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no metrics/step"):
        pair.read_run(tmp_path)
