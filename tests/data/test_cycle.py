"""The cycle of sources has exact shares in any window, also across its end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lightning.data.stream import even_cycle
from tf_lightning.errors import UserError


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=9))
def test_any_1000_consecutive_rows_have_each_share_to_within_one_row(weights):
    shares = np.array(weights) / sum(weights)
    cycle = even_cycle(shares)
    repeated = np.concatenate([cycle, cycle[:1000]])[:, None] == np.arange(len(shares))
    before = np.concatenate([np.zeros((1, len(shares))), repeated.cumsum(0)])
    windows = before[1000:] - before[:-1000]
    assert np.abs(windows - 1000 * shares).max() <= 1
    assert np.abs(before[10_000] - 10_000 * shares).max() < 1


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_every_prefix_of_a_cycle_has_its_shares(weights):
    shares = np.array(weights) / sum(weights)
    cycle = even_cycle(shares, 500)
    counts = (cycle[:, None] == np.arange(len(shares))).cumsum(0)
    assert np.abs(counts - shares * np.arange(1, 501)[:, None]).max() < len(shares)


def test_a_share_too_small_to_occur_is_refused_and_a_share_of_0_is_not():
    with pytest.raises(
        UserError, match="weight of a source is less than 1/1,000 of all rows; raise"
    ):
        even_cycle(np.array([0.9999, 0.0001]), 1000)
    assert set(even_cycle(np.array([0.9999, 0.0001]))) == {0, 1}
    assert set(even_cycle(np.array([1.0, 0.0]), 100)) == {0}
