"""Profiles: the numbers beside scipy's, and that any length can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import AMINO_ACIDS, array, png_size, read_page, read_svg
from scipy.special import log_softmax
from scipy.stats import entropy

from protea.errors import UsageError
from protea.plot import profile
from protea.plot.profiles import _running_mean


def some(length: int, seed: int = 0) -> tuple[str, NDArray[np.float32]]:
    """Of a model with more tokens than the letters, so that these do not sum to 1."""
    generator = np.random.default_rng(seed)
    sequence = "".join(generator.choice(list(AMINO_ACIDS), length))
    logs = log_softmax(generator.normal(0, 2, (length, 33)), axis=1)[:, 4:24].astype(np.float32)
    return sequence, logs


@pytest.mark.parametrize("length", [1, 10, 100, 301])
def test_numbers(length: int, tmp_path: Path) -> None:
    sequence, logs = some(length)
    profile(tmp_path / "p.html", sequence=sequence, log_probabilities=logs, letters=AMINO_ACIDS, title="", offset=5)
    page = read_page(tmp_path / "p.html")
    upper, lower = (trace for trace in page.traces if trace.get("text"))
    np.testing.assert_array_equal(array(upper["x"]), np.arange(5, 5 + length))
    np.testing.assert_allclose(array(upper["y"]), entropy(np.exp(logs), base=2, axis=1), rtol=1e-5)
    truth = logs[np.arange(length), [AMINO_ACIDS.index(letter) for letter in sequence]].astype(float)
    np.testing.assert_allclose(array(lower["y"]), np.exp(-truth), rtol=1e-5)
    best = int(logs[0].argmax())
    likeliest = f"{AMINO_ACIDS[best]} ({np.exp(logs[0, best]):.2f})"
    assert upper["text"][0] == lower["text"][0] == f"{sequence[0]}5<br>likeliest {likeliest}"
    names = [trace["name"] for trace in page.traces if "name" in trace]
    assert "all letters alike: 4.32" in names
    assert "all letters alike: 20.00" in names
    # The sequence's pseudo-perplexity, by its definition.
    assert f"whole protein: {np.exp(-truth.mean()):.2f}" in names
    assert ("mean of 11 residues" in names) == (length > 300)


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("length", [1, 100, 2000, pytest.param(34350, marks=pytest.mark.long)])
def test_any_length(length: int, kind: str, tmp_path: Path) -> None:
    sequence, logs = some(length)
    path = tmp_path / f"p.{kind}"
    profile(path, sequence=sequence, log_probabilities=logs, letters=AMINO_ACIDS, title="titin")
    assert path.stat().st_size < 2e6
    if kind == "png":
        assert png_size(path)[0] == 2000
        return
    texts = read_svg(path).texts
    assert {"titin", "entropy (bits)", "perplexity of the residue", "residue", "all letters alike: 20.00", "1"} <= set(
        texts
    )
    letters = "".join(text for text in texts if len(text) == 1 and text.isalpha())
    assert letters == (sequence if length <= 100 else "")


@pytest.mark.long
def test_titin_as_a_page(tmp_path: Path) -> None:
    sequence, logs = some(34350)
    profile(tmp_path / "p.html", sequence=sequence, log_probabilities=logs, letters=AMINO_ACIDS, title="titin")
    assert (tmp_path / "p.html").stat().st_size < 15e6
    assert all(trace["mode"] == "lines" for trace in read_page(tmp_path / "p.html").traces)


def test_gaps(tmp_path: Path) -> None:
    sequence, logs = some(6)
    sequence = "X" + sequence[1:]
    logs[3, 2] = np.nan
    for kind in ("svg", "html"):
        profile(tmp_path / f"p.{kind}", sequence=sequence, log_probabilities=logs, letters=AMINO_ACIDS, title="")
    upper, lower = (trace for trace in read_page(tmp_path / "p.html").traces if trace.get("text"))
    assert np.flatnonzero(np.isnan(array(upper["y"]))).tolist() == [3]
    assert np.flatnonzero(np.isnan(array(lower["y"]))).tolist() == [0, 3]
    assert upper["text"][3] == f"{sequence[3]}4"


def test_nothing_known(tmp_path: Path) -> None:
    for kind in ("svg", "html"):
        nothing = np.full((400, 20), np.nan, np.float32)
        profile(tmp_path / f"p.{kind}", sequence="A" * 400, log_probabilities=nothing, letters=AMINO_ACIDS, title="")
    assert not any("whole" in text for text in read_svg(tmp_path / "p.svg").texts)


def test_one_letter(tmp_path: Path) -> None:
    for kind in ("svg", "html"):
        profile(tmp_path / f"p.{kind}", sequence="AA", log_probabilities=np.zeros((2, 1)), letters="A", title="")


def test_certainty_and_surprise(tmp_path: Path) -> None:
    """A distribution of one letter has no entropy; a letter it excludes has a perplexity beyond all ticks but shown."""
    logs = np.full((2, 20), -80, np.float32)
    logs[:, 0] = 1e-6
    for kind in ("svg", "html"):
        profile(tmp_path / f"p.{kind}", sequence="LA", log_probabilities=logs, letters=AMINO_ACIDS, title="")
    upper, lower = (trace for trace in read_page(tmp_path / "p.html").traces if trace.get("text"))
    np.testing.assert_allclose(array(upper["y"]), 0, atol=1e-9)
    np.testing.assert_allclose(array(lower["y"]), [1, np.exp(80)], rtol=1e-6)


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 1000))
def test_running_mean(length: int, half: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=length)
    values[generator.random(length) < 0.4] = np.nan
    found = _running_mean(values, 2 * half + 1)
    for place in range(length):
        window = values[max(0, place - half) : place + half + 1]
        known = window[~np.isnan(window)]
        expected = known.mean() if 2 * len(known) > len(window) else np.nan
        np.testing.assert_allclose(found[place], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("logs", "sequence", "message"),
    [
        (np.zeros((2, 20)), "MKT", r"log_probabilities: shape \[2, 20\], expected \[3, 20\]"),
        (np.zeros((0, 20)), "", "log_probabilities: nothing to draw"),
        (np.full((3, 20), 0.5), "MKT", "log_probabilities: 0.5 for L at residue 1;"),
        (np.full((3, 20), -np.inf), "MKT", "log_probabilities: -inf for L at residue 1"),
    ],
)
def test_refusals(logs: NDArray[np.float64], sequence: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        profile(tmp_path / "p.png", sequence=sequence, log_probabilities=logs, letters=AMINO_ACIDS, title="")
    assert not list(tmp_path.iterdir())
