"""A small round of benchmarks/fuzz.py: every hostile input is read, counted or refused."""

import pytest

from benchmarks import fuzz

TRIES = {"readers": 300, "corpora": 40, "autoencoders": 30, "exports": 60}
TRIES |= {"configs": 80, "prompts": 60}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", TRIES)
def test_hostile_inputs_are_read_or_refused(section):
    assert [trace for seed in range(TRIES[section]) if (trace := fuzz.run_try(section, seed))] == []


@pytest.mark.parametrize("failure", [TypeError("a"), AssertionError("a"), RecursionError()])
def test_a_failure_is_reported(failure, monkeypatch):
    def fail(folder, rng):
        raise failure

    monkeypatch.setitem(fuzz.SECTIONS, "readers", fail)
    assert type(failure).__name__ in fuzz.run_try("readers", 0)


def test_a_hang_is_reported(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    monkeypatch.setitem(fuzz.SECTIONS, "readers", lambda folder, rng: [None for _ in iter(int, 1)])
    assert "TooSlow" in fuzz.run_try("readers", 0)
