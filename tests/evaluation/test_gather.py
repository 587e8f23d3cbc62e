"""Metrics of two processes with uneven shares equal the metrics of one process."""

import math

import pytest
import torch
from torch import multiprocessing

from evaluation.gather import canonical_order
from support.every_metric import METRICS, NUM_ITEMS, SHARES, all_values, keep_reference, run_rank
from support.extractors import tiny_clip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """The values of one process, then the values of rank 0 and rank 1."""
    alone, shared = (tmp_path_factory.mktemp(name) for name in ("alone", "shared"))
    for folder in (alone, shared):
        tiny_clip(folder / "clip")
    keep_reference(alone, range(NUM_ITEMS))
    multiprocessing.start_processes(run_rank, (shared,), nprocs=2, start_method="forkserver")
    return [all_values(alone, None), *(torch.load(shared / f"{rank}.pt") for rank in (0, 1))]


@pytest.mark.slow  # two processes import everything anew
@pytest.mark.filterwarnings("ignore:.*biased upwards", "ignore:.*without.*update")
@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("name", METRICS)
def test_two_processes_say_what_one_says(found, kind, name):
    alone, *shared = (values[kind, name] for values in found)
    assert all(math.isfinite(value) for value in alone.values())
    for values_of_rank in shared:
        assert values_of_rank == pytest.approx(alone, rel=1e-6, abs=1e-9)


def test_rows_in_canonical_order_do_not_depend_on_who_had_which():
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(canonical_order(rows[order]), canonical_order(rows))
    assert torch.equal(canonical_order(rows).sort(0).values, rows.sort(0).values)
