"""Windows compared with ProteinGym's own loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protea.score.expected import around, edge_weights, overlapping


def proteingym_window(place: int, tokens: int, size: int) -> tuple[int, int]:
    half = size // 2
    if tokens <= size:
        return 0, tokens
    if place < half:
        return 0, size
    if place >= tokens - half:
        return tokens - size, tokens
    return place - half, place + half


def proteingym_starts(tokens: int) -> list[int]:
    """Inclusive ends, as its loop has them."""
    left, right = (0, 1023), (tokens - 1024, tokens - 1)
    starts = []
    while True:
        starts += [left[0], right[0]]
        if left[1] > right[0]:
            break
        left = left[0] + 511, left[1] + 511
        right = right[0] - 511, right[1] - 511
    if left[1] - right[0] + 1 < 511:
        starts.append(int(tokens / 2) - 512)
    return starts


@settings(max_examples=40)
@given(st.integers(1, 5000), st.data())
def test_a_site_is_seen_through_proteingyms_window(tokens: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, tokens - 1))
    for size in (1024, 512, 6):
        start, end = around(place, tokens, size)
        assert (start, end) == proteingym_window(place, tokens, size)
        assert start <= place < end


@settings(max_examples=40)
@given(st.integers(1025, 40_000))
def test_long_proteins_are_covered_by_proteingyms_windows(tokens: int) -> None:
    starts = overlapping(tokens, 1024)
    assert starts == proteingym_starts(tokens)
    covered = np.zeros(tokens, bool)
    for start in starts:
        assert 0 <= start <= tokens - 1024
        covered[start : start + 1024] = True
    assert covered.all()


@pytest.mark.parametrize("tokens", [1, 2, 1023, 1024])
def test_short_ones_are_one_window(tokens: int) -> None:
    assert overlapping(tokens, 1024) == [0]


@pytest.mark.parametrize(("size", "step"), [(6, 1), (8, 1), (512, 97), pytest.param(512, 1, marks=pytest.mark.long)])
def test_other_sizes_cover_too(size: int, step: int) -> None:
    for tokens in range(size + 1, 6 * size, step):
        covered = np.zeros(tokens, bool)
        for start in overlapping(tokens, size):
            covered[start : start + size] = True
        assert covered.all()


def test_weights_are_proteingyms() -> None:
    weights = np.ones(1024)
    for i in range(1, 257):
        weights[i] = 1 / (1 + math.exp(-(i - 128) / 16))
    for i in range(1022 - 256, 1023):
        weights[i] = 1 / (1 + math.exp((i - 1022 + 128) / 16))
    np.testing.assert_allclose(edge_weights(1024), weights, rtol=1e-12)
    assert edge_weights(512).shape == (512,)
    assert (edge_weights(512) > 0).all()
    np.testing.assert_allclose(edge_weights(512)[64], 0.5)
