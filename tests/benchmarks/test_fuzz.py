"""A small round of benchmarks/fuzz.py: every hostile input is read, counted or refused."""

import ctypes
import time
from itertools import repeat

import pytest

from benchmarks import fuzz
from support import hostile_pairs

TRIES = {"readers": 100, "pairs": 200, "images": 200, "corpora": 20, "autoencoders": 20}
TRIES |= {"flipped bits": 60, "checkpoints": 30, "sharded checkpoints": 30, "tokenizers": 40}
TRIES |= {"language models": 60, "exports": 40, "configs": 60, "prompts": 40}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", TRIES)
def test_hostile_inputs_are_read_or_refused(section):
    assert TRIES.keys() == fuzz.SECTIONS.keys() - {"bombs"}  # which take some seconds
    fuzz.warm_up(section)
    assert [trace for seed in range(TRIES[section]) if (trace := fuzz.run_try(section, seed))] == []


@pytest.mark.parametrize("kind", hostile_pairs.FORMATS)
def test_a_wrong_pair_is_noticed_in_every_format(kind, tmp_path, monkeypatch):
    hostile_pairs.written.cache_clear()
    given, files = hostile_pairs.written(kind)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    clean = hostile_pairs.read(kind, tmp_path / given)
    assert len(clean) == hostile_pairs.RECORDS
    for document in clean:
        found = [code for part in document for code in hostile_pairs.codes_in(part)]
        assert len(found) >= 2 and not hostile_pairs.is_wrong(document)
    first, second = ([p for p in d if hostile_pairs.codes_in(p)] for d in clean[:2])
    assert hostile_pairs.is_wrong([first[0], second[-1]])


# Failures that are planted


def fail_with(monkeypatch, action):
    """Let the tries of a section do something."""
    monkeypatch.setitem(fuzz.SECTIONS, "readers", lambda folder, rng: action())


def failures(count: int = 1) -> list[str]:
    """Run tries of the section in a process of their own; return what failed."""
    found = fuzz.results("readers", range(count), time.monotonic() + 60, None)
    return [failure for _, failure in found]


@pytest.mark.parametrize("failure", [TypeError("a"), AssertionError("a"), RecursionError()])
def test_an_error_is_a_failure(failure, monkeypatch):
    def fail():
        raise failure

    fail_with(monkeypatch, fail)
    assert type(failure).__name__ in fuzz.run_try("readers", 0)


def test_a_message_of_two_lines_is_a_failure(monkeypatch):
    def fail():
        raise fuzz.UserError("one\ntwo")

    fail_with(monkeypatch, fail)
    assert "not one sentence" in fuzz.run_try("readers", 0)


def test_a_hang_is_a_failure_even_if_its_error_is_caught(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)

    def hang():
        try:
            while True:
                pass
        except Exception:
            pass

    fail_with(monkeypatch, hang)
    assert "TooSlow" in fuzz.run_try("readers", 0)


@pytest.mark.filterwarnings("ignore")
def test_a_hang_in_c_code_ends_its_process_and_the_next_try_follows(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "WATCHDOG", 0.2)
    monkeypatch.setattr(fuzz, "warm_up", lambda section: None)
    fail_with(monkeypatch, lambda: sum(repeat(0)))  # no signal is handled in it
    (found,) = failures()
    assert "the process ended with 1" in found and "Timeout" in found


@pytest.mark.filterwarnings("ignore")
def test_a_crash_ends_its_process_and_the_next_try_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "warm_up", lambda section: None)
    began = []

    def crash(folder, rng):
        (folder / "input").write_text("hostile")
        began.append(1)
        if len(began) == 2:
            ctypes.string_at(0)

    monkeypatch.setitem(fuzz.SECTIONS, "readers", crash)
    count, failed = fuzz.run_tries("readers", range(3), time.monotonic() + 60, tmp_path)
    assert (count, failed) == (3, 1)
    assert [path.parent.name for path in tmp_path.rglob("input")] == ["readers-1"]
    assert "Segmentation fault" in (tmp_path / "readers-1" / "failure.txt").read_text()


@pytest.mark.parametrize("caught", [False, True])
def test_a_peak_over_the_budget_is_a_failure(caught, monkeypatch):
    monkeypatch.setattr(fuzz, "MEGABYTES", 40)

    def fill(size: int):
        held = bytearray(size)
        held[::4096] = b"\1" * len(held[::4096])
        if caught:
            raise fuzz.UserError("refused, but too late")

    fail_with(monkeypatch, lambda: fill(20 * 2**20))
    assert fuzz.run_try("readers", 0) is None
    fail_with(monkeypatch, lambda: fill(60 * 2**20))
    for seed in range(2):  # also where an earlier try had as high a peak
        assert "MB over the base" in fuzz.run_try("readers", seed)


def test_the_input_of_a_failure_is_kept_and_made_again_by_its_seed(tmp_path, monkeypatch):
    def write(folder, rng):
        (folder / "input").write_bytes(rng.randbytes(9))
        raise TypeError

    monkeypatch.setitem(fuzz.SECTIONS, "readers", write)
    fuzz.run_try("readers", 7, tmp_path / "a")
    fuzz.run_try("readers", 7, tmp_path / "b")
    fuzz.run_try("readers", 8, tmp_path / "b")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("input")}
    assert len(kept) == 3 and len(set(kept.values())) == 2
    assert "TypeError" in (tmp_path / "a" / "readers-7" / "failure.txt").read_text()
