"""Precision of contacts beside slow readings of the definition, hand cases, means and their intervals."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import LoadModel
from messages import check_message
from protea.contacts.precision import PARTS, RANGES, mean, means, measure, precision, score, usable
from protea.contacts.predict import contacts
from protea.contacts.structures import Chain
from protea.errors import CapabilityError, NonFiniteError
from protea.letters import ReportRow


def made(length: int, seed: int = 0, seen: float = 0.9) -> Chain:
    """A chain whose residues lie at random, some of them without coordinates."""
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(length) < seen)
    points = rng.uniform(0, 3.2 * length**0.5, (len(places), 3)).astype(np.float32)
    sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length))
    return Chain(f"made:{seed}", sequence, places, places, points)


def slow(chain: Chain, probabilities: np.ndarray, low: int, high: float, divisor: int) -> float:
    """Sort all pairs, count contacts among the first; no ties."""
    ranked = []
    for i in range(chain.resolved):
        for j in range(i + 1, chain.resolved):
            a, b = chain.places[i], chain.places[j]
            if low <= b - a < high:
                point, other = chain.points[i].tolist(), chain.points[j].tolist()
                distance = sum((x - y) ** 2 for x, y in zip(point, other, strict=True)) ** 0.5
                ranked.append((-probabilities[a, b], distance < 8.0))
    count = max(1, chain.resolved // divisor)
    return sum(truth for _, truth in sorted(ranked)[:count]) / count if ranked else nan


def symmetric(length: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).random((length, length))
    return (values + values.T) / 2


@pytest.mark.parametrize("length", [8, 27, 60, 121])
def test_precision_is_what_a_slow_reading_gives(length: int) -> None:
    chain = made(length, seed=length)
    probabilities = symmetric(length, 1)
    row = score(chain, probabilities)
    assert (row.residues, row.resolved) == (length, chain.resolved)
    for name, (low, high) in RANGES.items():
        for part, divisor in PARTS.items():
            expected = slow(chain, probabilities, low, high, divisor)
            np.testing.assert_allclose(row.ranges[name].precisions[part], expected, err_msg=f"{name} {part}")
    assert {"long": (24, np.inf), "medium": (12, 24), "short": (6, 12)} == RANGES


def test_metas_own_reading_agrees() -> None:
    """``compute_precisions`` of Meta's package, in a few lines: all pairs ranked, the first L of one chain."""
    chain = made(80, seed=5, seen=1.0)
    probabilities = symmetric(80, 2)
    distances = np.linalg.norm(chain.points[:, None] - chain.points[None], axis=-1)
    rows, columns = np.triu_indices(80, 24)
    order = np.argsort(-probabilities[rows, columns])[:80]
    hits = (distances[rows, columns] < 8)[order].cumsum()
    row = score(chain, probabilities).ranges["long"].precisions
    assert [row[part] for part in PARTS] == pytest.approx([hits[79] / 80, hits[39] / 40, hits[15] / 16])


def test_by_hand() -> None:
    truth = np.array([True, False, True, False, False])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    assert precision(scores, truth, 1) == 1
    assert precision(scores, truth, 2) == 0.5
    assert precision(scores, truth, 3) == pytest.approx(2 / 3)
    # Fewer pairs than L: the rest count as no contacts.
    assert precision(scores, truth, 8) == 2 / 8
    assert isnan(precision(scores[:0], truth[:0], 3))


def test_ties_give_what_drawing_from_them_would() -> None:
    truth = np.array([True, True, False, False, True])
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    assert precision(scores, truth, 2) == pytest.approx((1 + 1 / 3) / 2)
    assert precision(scores, truth, 3) == pytest.approx((1 + 2 / 3) / 3)
    assert precision(np.zeros(5), truth, 2) == pytest.approx(3 / 5)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        order = rng.permutation(5)
        drawn.append(truth[order][np.argsort(-scores[order], kind="stable")[:3]].mean())
    assert precision(scores, truth, 3) == pytest.approx(np.mean(drawn), abs=0.01)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30), st.integers(1, 40))
def test_order_means_nothing(found: list[tuple[int, bool]], count: int) -> None:
    scores, truth = np.array([one for one, _ in found], float), np.array([one for _, one in found])
    value = precision(scores, truth, count)
    assert 0 <= value <= 1
    order = np.random.default_rng(0).permutation(len(found))
    assert precision(scores[order], truth[order], count) == pytest.approx(value)
    assert precision(1 / (1 + np.exp(-scores)), truth, count) == pytest.approx(value)


def test_separation_counts_what_is_missing() -> None:
    """The model sees 40 residues, of a molecule that has 20 more between the halves."""
    whole = made(40, seen=1.0)
    positions = np.where(np.arange(40) < 20, np.arange(40), np.arange(40) + 20)
    chain = Chain("gap", whole.sequence, whole.places, positions, whole.points)
    probabilities = symmetric(40, 0)
    row = score(chain, probabilities)
    # Neighbours across the gap are 21 apart, and within a half nobody is so far.
    counted = [sum(low <= b - a < high for a in positions for b in positions) for low, high in RANGES.values()]
    assert [row.ranges[name].pairs for name in RANGES] == counted == [394, 78, 138]


def test_a_chain_too_short_for_a_range_has_no_precision_there() -> None:
    chain = made(20, seen=1.0)
    row = score(chain, symmetric(20, 0))
    assert row.ranges["long"].pairs == 0
    assert all(isnan(value) for value in row.ranges["long"].precisions.values())
    assert not isnan(row.ranges["short"].precisions["P@L"])
    found = means([row, score(made(60), symmetric(60, 0))])
    assert found["long"]["P@L"].chains == 1
    assert found["short"]["P@L"].chains == 2
    assert means([row])["long"]["P@L"].chains == 0


def test_intervals_are_of_means_over_chains() -> None:
    values = [0.1, 0.4, 0.35, 0.8, nan, 0.2]
    found = mean(values, seed=3)
    known = np.array([value for value in values if not isnan(value)])
    assert found.value == pytest.approx(known.mean())
    assert found.chains == 5
    assert known.min() < found.low < found.value < found.high < known.max()
    assert mean(values, seed=3) == found
    assert mean(values, seed=4) != found
    assert mean([0.5]) == (0.5, 0.5, 0.5, 1)
    assert isnan(mean([nan]).value)
    # As wide as the normal approximation says, where that holds.
    many = np.random.default_rng(0).random(400)
    wide = mean(many.tolist())
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * many.std() / 20, rel=0.1)


def test_chance_is_the_share_of_contacts() -> None:
    chains = [made(60, seed=seed) for seed in range(5)]
    rows = [score(chain, np.full((60, 60), 0.5)) for chain in chains]
    found = means(rows)
    for cells in found.values():
        # Constant predictions give chance, but where there are fewer pairs than L.
        assert cells["P@L/5"].value == pytest.approx(cells["chance"].value)


@pytest.mark.parametrize("name", ["esm2", "esm1b"])
def test_predictions_are_the_models_contacts(load_small: LoadModel, name: str) -> None:
    module = load_small(name).module
    chains = [made(45, 1), made(70, 2)]
    drawn: dict[str, np.ndarray] = {}
    scores = measure(module, chains, lambda chain, found: drawn.setdefault(chain.name, found))
    for chain, scored in zip(chains, scores, strict=True):
        probabilities = contacts(module, module.alphabet.encode(chain.sequence))
        np.testing.assert_array_equal(drawn[chain.name], probabilities)
        assert scored == score(chain, probabilities)


def test_intervals_are_the_same_in_any_order() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert mean(values, 3) == mean(values[::-1], 3)


def test_a_model_that_gives_nan_is_told(load_small: LoadModel) -> None:
    module = load_small("esm2").module
    module.word_embeddings.weight.data[:] = nan
    with pytest.raises(NonFiniteError, match=r"^made:1: "):
        measure(module, [made(30, 1)])


def test_what_a_model_cannot_see(load_small: LoadModel) -> None:
    long, odd = made(1030), Chain("odd", "MJK", *([np.arange(3)] * 2), np.zeros((3, 3), np.float32))
    rows: list[ReportRow] = []
    assert usable(load_small("esm1b").module, [long], rows) == []
    assert usable(load_small("esm2").module, [odd, long], rows) == [long]
    assert [(row.id, row.what) for row in rows] == [("made:0", "skipped"), ("odd", "skipped")]
    check_message("contacts.too_long", rows[0].detail)
    assert "'J' at position 2" in rows[1].detail
    with pytest.raises(CapabilityError, match="protea fit-contacts"):
        measure(load_small("esm1nv").module, [made(30)])
