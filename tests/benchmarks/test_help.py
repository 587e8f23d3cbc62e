"""Every benchmark runs as a script and explains itself with --help."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
BENCHMARKS = sorted(file.stem for file in FOLDER.glob("*.py") if "__main__" in file.read_text())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_shows_the_command_and_every_option(name, monkeypatch, capsys):
    file = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.syspath_prepend(FOLDER)  # as for `python benchmarks/NAME.py`
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in shown


def test_all_benchmarks_are_found():
    assert len(BENCHMARKS) >= 8
