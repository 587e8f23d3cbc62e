"""The mutants of benchmarks/mutate.py: each changes the source, and its tests exist."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MUTATE = runpy.run_path(str(ROOT / "benchmarks" / "mutate.py"))
MUTANTS = MUTATE["MUTANTS"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_of_the_source(mutant):
    changed = mutant.text(ROOT)
    assert changed != (ROOT / mutant.file).read_text()
    compile(changed, mutant.file, "exec")
    assert (ROOT / mutant.tests).is_file()


def test_names_are_unique_and_a_missing_text_is_refused():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    absent = MUTATE["Mutant"]("lost", MUTANTS[0].file, "no such text", "", MUTANTS[0].tests)
    with pytest.raises(SystemExit, match="lost: 'no such text' is 0 times in"):
        absent.text(ROOT)
