"""Overlapping windows: their places, their weights, and how they are joined."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LoadModel
from protea.infer.windows import join, spans, weights


@given(st.integers(1, 40_000), st.integers(2, 1022))
def test_spans_cover_everything_and_overlap(length: int, limit: int) -> None:
    windows = spans(length, limit)
    assert windows[0][0] == 0
    assert windows[-1][1] == length
    if length <= limit:
        assert windows == ((0, length),)
        return
    assert all(end - start == limit for start, end in windows)
    for (start, end), (next_start, _) in pairwise(windows):
        assert start < next_start
        assert end - next_start >= limit // 2
    overlap = limit // 2
    assert len(windows) == -(-(length - overlap) // (limit - overlap))


def shares(length: int, limit: int) -> np.ndarray:
    """``[n windows, L]``: the share of each window in each residue's mean."""
    windows = spans(length, limit)
    table = np.zeros((len(windows), length))
    for row, (start, end) in zip(table, windows, strict=True):
        row[start:end] = weights(end - start, first=start == 0, last=end == length).numpy()
    assert table.sum(0).min() >= 1 - 1e-6
    return table / table.sum(0)


@given(st.integers(1, 1000), st.integers(2, 300))
@settings(max_examples=20)
def test_the_share_of_a_window_changes_slowly(length: int, limit: int) -> None:
    assert_slow_changes(length, limit)


@pytest.mark.long
@given(st.integers(1, 5000), st.integers(2, 300))
def test_the_share_of_a_window_changes_slowly_in_long_sequences(length: int, limit: int) -> None:
    assert_slow_changes(length, limit)


def assert_slow_changes(length: int, limit: int) -> None:
    table = shares(length, limit)
    np.testing.assert_allclose(table.sum(0), 1)
    if len(table) > 1:
        # One step of the ramp, at most doubled if both the weight and the sum of weights change.
        assert np.abs(np.diff(table, axis=1)).max() <= 2 / (limit // 2 + 1) + 1e-6


def test_join_is_the_weighted_mean() -> None:
    torch.manual_seed(0)
    places = spans(25, 10)
    windows = [torch.randn(10, 3) for _ in places]
    joined = join(windows, places)
    for residue in range(25):
        total, weight = torch.zeros(3), 0.0
        for window, (start, end) in zip(windows, places, strict=True):
            if start <= residue < end:
                offset = residue - start
                rising = 1 if start == 0 else min(offset + 1, 6) / 6
                w = min(rising, 1 if end == 25 else min(10 - offset, 6) / 6)
                total, weight = total + w * window[offset], weight + w
        torch.testing.assert_close(joined[residue], total / weight)


def test_a_sequence_that_fits_is_untouched(load_small: LoadModel) -> None:
    model = load_small("esm2")
    sequence = "ACDEFGHIKLMNPQRSTVWY" * 51
    for plain, windowed in zip(
        model.embed([sequence, "MK"]), model.embed([sequence, "MK"], long="window"), strict=True
    ):
        np.testing.assert_array_equal(plain, windowed)


def test_seams_do_not_show(load_small: LoadModel) -> None:
    """In a sequence of twice the limit, neighbours across a seam differ no more than neighbours elsewhere."""
    rng = np.random.default_rng(0)
    sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 1020))
    for family, limit in (("esm1nv", 510), ("esm1b", 1022)):
        model = load_small(family)
        array = model.embed([sequence * (limit * 2 // 1020)], long="window")[0]
        assert array.shape == (limit * 2 // 1020 * 1020, 40)
        steps = np.linalg.norm(np.diff(array, axis=0), axis=1)
        seams = {edge for start, end in spans(len(array), limit) for edge in (start, end)} - {0, len(array)}
        at_seams = np.array([steps[edge - 1] for edge in sorted(seams)])
        assert at_seams.max() <= np.quantile(steps, 0.999)


def test_pooling_is_over_the_joined_residues(load_small: LoadModel) -> None:
    model = load_small("esm1nv")
    sequence = "ACDEFGHIKLMNPQRSTVWY" * 40
    residues = model.embed([sequence], long="window", layers=[0, -1])[0]
    for pool, expected in (("mean", residues.mean(1)), ("max", residues.max(1)), ("std", residues.std(1))):
        pooled = model.embed([sequence], long="window", layers=[0, -1], pool=pool)[0]
        np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-5)


def test_windows_against_their_own_embeddings(load_small: LoadModel) -> None:
    """The joined embedding equals that of separate calls for each window."""
    model = load_small("esm1nv")
    sequence = "".join(np.random.default_rng(1).choice(list("ACDEFGHIKLMNPQRSTVWY"), 900))
    places = spans(900, 510)
    parts = [torch.from_numpy(model.embed([sequence[start:end]])[0]) for start, end in places]
    joined = model.embed([sequence], long="window")[0]
    np.testing.assert_allclose(joined, join(parts, places).numpy(), rtol=0, atol=1e-5)
    logits = model.logits([sequence], long="window")[0]
    parts = [torch.from_numpy(model.logits([sequence[start:end]])[0]) for start, end in places]
    np.testing.assert_allclose(logits, join(parts, places).numpy(), rtol=0, atol=1e-5)
