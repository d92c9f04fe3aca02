from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sources import FRAMES, build, make_sources

from protea.data.sampler import CROPS, Sampler
from protea.data.training_store import StoreSplit
from protea.errors import DataError, UsageError

slow_setup = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


@pytest.fixture
def split(tmp_path: Path) -> StoreSplit:
    return build(make_sources(tmp_path, 40, most=6), tmp_path / "store").split("train")


def cluster_of(split: StoreSplit) -> np.ndarray:
    return np.repeat(np.arange(split.clusters), split.counts(np.arange(split.clusters)))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_visits_every_cluster_once(split: StoreSplit, shuffle: bool) -> None:
    owner = cluster_of(split)
    orders = []
    for epoch in range(5):
        draws = Sampler(split, seed=3, shuffle=shuffle).draw(epoch, np.arange(split.clusters))
        clusters = owner[draws.sequence]
        assert sorted(clusters.tolist()) == list(range(split.clusters))
        orders.append(clusters.tolist())
    assert (len({tuple(order) for order in orders}) == 5) == shuffle


def test_members_are_drawn_uniformly(split: StoreSplit) -> None:
    """Over epochs and seeds each member of a cluster comes up as often as the others."""
    counts = np.zeros(split.sequences)
    for seed in (0, 1):
        for epoch in range(100):
            draws = Sampler(split, seed=seed).draw(epoch, np.arange(split.clusters))
            counts += np.bincount(draws.sequence, minlength=split.sequences)
    sizes = split.counts(np.arange(split.clusters))
    expected = np.repeat(200 / sizes, sizes)
    assert chisquare(counts, expected, ddof=split.clusters - 1).pvalue > 1e-4


@pytest.mark.parametrize("frame", ["both", *(pytest.param(f, marks=pytest.mark.long) for f in FRAMES if f != "both")])
@pytest.mark.parametrize("crop", ["random", "random-tokens"])
def test_every_window_is_drawn_as_often(split: StoreSplit, crop: str, frame: str) -> None:
    """The last included, which is the one that BioNeMo 2 never draws."""
    split.alphabet = FRAMES[frame]
    around = split.alphabet.frame
    sampler = Sampler(split, max_tokens=18, crop=crop, shuffle=False)  # type: ignore[arg-type]
    counts = np.split(np.arange(split.sequences), np.cumsum(split.counts(np.arange(split.clusters)))[:-1])
    cluster = next(n for n, rows in enumerate(counts) if len(rows) == 1)
    length = int(split.spans(counts[cluster])[1][0])
    assert around.tokens(length) - 18 == length - around.residues(18)
    windows = around.tokens(length) - 18 + 1
    starts = []
    for epoch in range(30 * windows):
        draws = sampler.draw(epoch, np.array([cluster]))
        starts.append(int(draws.offset[0]) + (crop == "random-tokens" and around.bos is not None and not draws.bos[0]))
    drawn = np.bincount(starts, minlength=windows)
    assert len(drawn) == windows
    assert chisquare(drawn).pvalue > 1e-4


@settings(slow_setup, max_examples=50)
@given(
    st.sampled_from(sorted(FRAMES)),
    st.sampled_from(CROPS),
    st.integers(1, 90),
    st.integers(0, 100),
    st.integers(0, 2**63),
)
def test_windows_are_of_their_sequence(
    split: StoreSplit, frame: str, crop: str, most: int, epoch: int, seed: int
) -> None:
    split.alphabet = FRAMES[frame]
    around = split.alphabet.frame
    has_bos, has_eos = around.bos is not None, around.eos is not None
    most = max(most, 1 + has_bos + has_eos)
    draws = Sampler(split, seed=seed, max_tokens=most, crop=crop).draw(epoch, np.arange(split.clusters))  # type: ignore[arg-type]
    begin, length = split.spans(draws.sequence)
    assert draws.bos.dtype == draws.eos.dtype == np.bool_
    assert (draws.start == begin + draws.offset).all()
    assert (draws.offset >= 0).all()
    assert (draws.residues >= 1).all()
    assert (draws.offset + draws.residues <= length).all()
    assert (draws.tokens == np.minimum(length + has_bos + has_eos, most)).all()
    fits = length + has_bos + has_eos <= most
    assert (draws.residues[fits] == length[fits]).all()
    assert (draws.bos[fits] == has_bos).all()
    assert (draws.eos[fits] == has_eos).all()
    if crop in {"random", "head"}:
        assert (draws.bos == has_bos).all()
        assert (draws.eos == has_eos).all()
    else:
        assert (draws.bos == (has_bos & (draws.offset == 0) & (draws.residues + draws.eos < most))).all()
        assert (draws.eos <= (has_eos & (draws.offset + draws.residues == length))).all()
    if crop.startswith("head"):
        assert (draws.offset == 0).all()
        assert (draws.bos == has_bos).all()
        assert crop == "head" or not draws.eos[~fits].any()


@slow_setup
@given(st.sampled_from(CROPS), st.integers(3, 90), st.integers(0, 100), st.integers(0, 2**63))
def test_alphabets_without_frames_see_the_same_windows(
    split: StoreSplit, crop: str, most: int, epoch: int, seed: int
) -> None:
    """Of as many residues, where the tokens of the frame do not count."""
    places = np.arange(split.clusters)
    by_frame = {}
    for frame, alphabet in FRAMES.items():
        split.alphabet = alphabet
        tokens = alphabet.frame.tokens(most)
        draws = Sampler(split, seed=seed, max_tokens=tokens, crop=crop).draw(epoch, places)  # type: ignore[arg-type]
        fits = split.spans(draws.sequence)[1] <= most
        by_frame[frame] = draws, fits
    for draws, fits in by_frame.values():
        first, _ = by_frame["both"]
        assert (draws.sequence == first.sequence).all()
        kept = fits if crop.endswith("tokens") else slice(None)
        for name in ("start", "residues", "offset"):
            assert (getattr(draws, name)[kept] == getattr(first, name)[kept]).all()


@slow_setup
@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.data())
def test_draws_do_not_depend_on_other_places(split: StoreSplit, seed: int, epoch: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, split.clusters - 1), min_size=1, max_size=10)))
    sampler = Sampler(split, seed=seed, max_tokens=20)
    epoch_draws = sampler.draw(epoch, np.arange(split.clusters))
    place_draws = sampler.draw(epoch, places)
    for name in ("sequence", "start", "residues", "offset", "bos", "eos"):
        assert (getattr(place_draws, name) == getattr(epoch_draws, name)[places]).all()


def test_long_members_and_clusters_are_left_out(split: StoreSplit) -> None:
    lengths = split.spans(np.arange(split.sequences))[1]
    owner = cluster_of(split)
    limit = 35
    left = sorted(set(owner[lengths <= limit].tolist()))
    assert 0 < len(left) < split.clusters
    sampler = Sampler(split, max_length=limit)
    assert len(sampler) == len(left)
    counts = np.zeros(split.sequences)
    for epoch in range(400):
        draws = sampler.draw(epoch, np.arange(len(sampler)))
        assert sorted(owner[draws.sequence].tolist()) == left
        counts += np.bincount(draws.sequence, minlength=split.sequences)
    short = lengths <= limit
    assert not counts[~short].any()
    sizes = np.bincount(owner[short], minlength=split.clusters)
    assert chisquare(counts[short], 400 / sizes[owner[short]], ddof=len(left) - 1).pvalue > 1e-4


def test_invalid_values(split: StoreSplit) -> None:
    with pytest.raises(UsageError, match="unknown crop 'tail'; use random, head"):
        Sampler(split, crop="tail")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"max_tokens must be at least 3 \(BOS, a residue, EOS\), got 2"):
        Sampler(split, max_tokens=2)
    split.alphabet = replace(split.alphabet, eos=None)
    with pytest.raises(UsageError, match=r"max_tokens must be at least 2 \(BOS, a residue\), got 1"):
        Sampler(split, max_tokens=1)
    split.alphabet = replace(split.alphabet, bos=None)
    with pytest.raises(UsageError, match=r"max_tokens must be at least 1 \(a residue\), got 0"):
        Sampler(split, max_tokens=0)
    with pytest.raises(DataError, match="no cluster has a sequence of at most 3 residues"):
        Sampler(split, max_length=3)
    with pytest.raises(IndexError):
        Sampler(split).draw(0, np.array([split.clusters]))
