"""Packing has each document once and little padding; random orders are permutations."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lightning.data.packing import best_fit, choose, fill_rows, fullest, permuted, split_rows


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=200), open_rows=st.integers(1, 20))
def test_best_fit_places_each_item_once_and_overfills_no_row(lengths, open_rows):
    rows = best_fit(lengths, 30, open_rows)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[place] for place in row) <= 30 for row in rows)


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("kind, most", [("text", 0.03), ("captions", 0.05)])
def test_padding_is_within_its_limit(kind, most):
    """Rows of 4,096; cut texts, or captions of 5-60 tokens with 256 patches."""
    random = np.random.default_rng(0)
    captions = random.integers(5, 61, 20_000) + 256 + 4
    text = random.lognormal(6.2, 1.2, 20_000).astype(int) + 1
    whole, rest = np.divmod(text, 4094)  # long texts are cut at row ends
    text = np.concatenate([np.full(whole.sum(), 4094), rest[rest > 0]]) + 2
    lengths = random.permutation(text) if kind == "text" else captions
    rows = best_fit(lengths.tolist(), 4096)
    assert 1 - lengths.sum() / (4096 * len(rows)) <= most


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=9), room=st.integers(0, 60))
def test_fullest_is_the_largest_sum_by_brute_force(lengths, room):
    chosen = fullest(lengths, room)
    sums = {sum(some) for n in range(len(lengths) + 1) for some in combinations(lengths, n)}
    assert sorted(set(chosen)) == chosen
    assert sum(lengths[place] for place in chosen) == max(s for s in sums if s <= room)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=300))
def test_fill_rows_places_each_item_once_and_the_longest_waiting_item_first(lengths):
    rows = fill_rows(lengths, 30)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= 30 for row in rows)
    placed = set()
    for row in rows:
        assert row[0] == min(set(range(len(lengths))) - placed)
        placed |= set(row)


def cut_rows(count: int, row_length: int) -> list[int]:
    """Cut full rows into seven items each, of a few lengths, and shuffle the items."""
    random = np.random.default_rng(0)
    rows = random.choice([70, 73, 76], (count, 6))
    last = row_length - rows.sum(1, keepdims=True)
    return random.permutation(np.concatenate([rows, last], 1).ravel()).tolist()


def test_fill_rows_comes_near_to_rows_that_are_known_to_be_full():
    lengths = cut_rows(300, 512)
    assert len(fill_rows(lengths, 512)) <= 303
    assert len(best_fit(lengths, 512)) > 309  # more than 3% of padding


def test_split_rows_makes_the_requested_number_of_rows_and_no_empty_one():
    rows = [[0, 1, 2], [3], [4, 5]]
    assert split_rows(rows, 5)
    assert sorted(map(sorted, rows)) == [[0, 1], [2], [3], [4], [5]]
    assert split_rows(rows, 5) and len(rows) == 5
    assert not split_rows([[0], [1]], 3)
    assert not split_rows([[0], [1]], 1)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**31))
def test_permuted_is_a_permutation_and_any_part_of_it_can_be_computed_alone(count, seed):
    order = permuted(np.arange(count), count, (seed,))
    assert sorted(order) == list(range(count))
    some = np.arange(count // 3, count, 7)
    assert (permuted(some, count, (seed,)) == order[some]).all()


def test_a_permuted_order_is_random():
    order = permuted(np.arange(100_000), 100_000, (0, 1))
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.01
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert (order != permuted(np.arange(100_000), 100_000, (0, 2))).mean() > 0.99
    parts = np.histogram(order[:10_000], bins=10)[0]  # the first tenth covers all tenths
    assert np.abs(parts - 1000).max() < 150


def test_choose_chooses_exactly_the_share():
    among = np.arange(1000) % 2 == 0
    chosen = choose(np.random.default_rng(0), among, 0.2)
    assert chosen.sum() == 100 and not (chosen & ~among).any()
    one = [choose(np.random.default_rng(n), np.array([True]), 0.3).sum() for n in range(2000)]
    assert sum(one) / 2000 == pytest.approx(0.3, abs=0.04)
