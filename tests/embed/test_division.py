"""Shares of the work, by residues."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protea.shards import Shard


@given(sizes=st.lists(st.integers(0, 40_000), max_size=60), count=st.integers(1, 70))
def test_shards_hold_every_group_once_and_equal_residues(sizes: list[int], count: int) -> None:
    residues = np.array(sizes, np.uint32)
    shares = [Shard(number=number, of=count).part(residues) for number in range(1, count + 1)]
    assert [group for share in shares for group in share] == list(range(len(sizes)))
    fair, largest = sum(sizes) / count, max(sizes, default=0)
    assert all(abs(sum(sizes[group] for group in share) - fair) <= largest + 1 for share in shares)


def test_one_long_sequence_does_not_make_a_shard_late() -> None:
    """By numbers of groups, the first of two shards would hold three quarters of the residues."""
    residues = np.array([4000, 36_000, 4000, 4000, 4000, 4000], np.uint32)
    assert [Shard(number=number, of=2).part(residues) for number in (1, 2)] == [range(2), range(2, 6)]
