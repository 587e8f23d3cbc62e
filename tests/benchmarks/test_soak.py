"""A small round of benchmarks/soak.py, and what it takes for growth."""

import random

import pytest

from benchmarks import soak


def test_a_run_is_measured(tmp_path):
    rows = soak.train(tmp_path, minutes=0.03, every=0.3, quiet=True)
    assert len(rows) >= 3 and (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and rows[-1]["minutes"] < 1
    for row in rows:
        assert row.keys() >= soak.LIMITS.keys()
        assert row["processes"] == 3 and row["threads"] >= 3 and row["files"] > 3
        assert row["workers MB"] > 50 and row["main MB"] > 50
        assert 0 < row["CPU ms"] and 0 < row["ms"]


def test_the_slope_is_that_of_a_line():
    steps = range(0, 50_000, 100)
    found, width = soak.slope(steps, [7 + 0.003 * step for step in steps])
    assert found == pytest.approx(3.0) and width == pytest.approx(0.0, abs=1e-6)


def test_the_interval_covers_the_slope_of_noisy_rows_that_resemble_their_neighbors():
    covered = 0
    for seed in range(100):
        rng, noise, values = random.Random(seed), 0.0, []
        for step in range(400):
            noise = 0.8 * noise + rng.gauss(0, 1)
            values.append(0.002 * step + noise)
        found, width = soak.slope(range(400), values)
        covered += abs(found - 2.0) < width
    assert 85 <= covered <= 100  # 95 are expected


@pytest.mark.parametrize("leak", [0.0, 0.002])
@pytest.mark.parametrize("name", soak.LIMITS)
def test_a_leak_is_found_in_noise(name, leak):
    rng, scale = random.Random(name), soak.LIMITS[name]
    rows = []
    for step in range(0, 30_000, 60):
        row = dict.fromkeys(soak.LIMITS, 100.0) | {"step": step}
        row[name] += scale * (rng.gauss(0, 1) + leak * step + 300 * (step < 300))  # a warm-up
        rows.append(row)
    assert soak.growing(rows) == ([name] if leak else [])
