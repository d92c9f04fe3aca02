from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from protea.data.draws import Permutation, below, fold, key, mix, stream, threshold

WORDS = st.integers(0, 2**64 - 1)


def plain_mix(x: int) -> int:
    """SplitMix64's step and finaliser, in Python integers."""
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(st.lists(WORDS, min_size=1, max_size=20))
def test_mix_is_splitmix64(words: list[int]) -> None:
    assert mix(np.array(words, np.uint64)).tolist() == [plain_mix(word) for word in words]


def test_stream_is_splitmix64_from_its_reference() -> None:
    """The first outputs for seed 1234567, as published with the algorithm."""
    words = stream(np.array([1234567], np.uint64), np.arange(5, dtype=np.uint64))
    assert words.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32), st.lists(WORDS, min_size=1, max_size=5))
def test_fold_by_parts(seed: int, epoch: int, words: list[int]) -> None:
    expected = [plain_mix(plain_mix(plain_mix(seed % 2**64) ^ epoch) ^ word) for word in words]
    assert fold(seed, epoch, np.array(words, np.uint64)).tolist() == expected
    assert [key(seed, epoch, word) for word in words] == expected


@given(st.lists(WORDS, min_size=1, max_size=20), st.integers(1, 2**32 - 1))
def test_below_is_exact(words: list[int], size: int) -> None:
    assert below(np.array(words, np.uint64), size).tolist() == [word * size >> 64 for word in words]


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.15, 0.8, 1.0])
def test_threshold(probability: float) -> None:
    words = mix(np.arange(1_000_000, dtype=np.uint64))
    share = float((words <= threshold(probability)).mean())
    assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / 1e6) + 1e-12


@given(st.integers(0, 3000), WORDS)
def test_permutations_hold_every_number_once(size: int, seed: int) -> None:
    order = Permutation(size, seed)
    assert sorted(order[np.arange(size)].tolist()) == list(range(size))


@given(st.integers(1, 2**40), WORDS, st.data())
def test_permutations_of_any_size_are_entered_anywhere(size: int, seed: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    order = Permutation(size, seed)
    numbers = order[np.array(places)].tolist()
    assert numbers == [int(order[np.array([place])][0]) for place in places]
    assert len(set(numbers)) == len(places)
    assert all(0 <= number < size for number in numbers)


def test_places_outside_a_permutation() -> None:
    with pytest.raises(IndexError, match=r"in \[0, 5\), got 2 to 5"):
        Permutation(5, 0)[np.array([2, 5])]


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13, pytest.param(40, marks=pytest.mark.long)])
def test_every_number_comes_to_every_place_as_often(size: int) -> None:
    counts = np.zeros((size, size))
    trials = 40 * size
    for seed in range(trials):
        counts[np.arange(size), Permutation(size, key(seed))[np.arange(size)]] += 1
    assert chisquare(counts.ravel()).pvalue > 1e-4


def test_permutations_separate_neighbours() -> None:
    order = Permutation(100_000, 7)[np.arange(100_000)]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    second = Permutation(100_000, 8)[np.arange(100_000)]
    assert (order == second).sum() < 15


def test_the_same_on_every_machine() -> None:
    """Written down once; what a store and a run depend on must not change between versions either."""
    assert Permutation(1000, key(0, 0, 1))[np.arange(8)].tolist() == PERMUTED
    assert [key(1, 2, 3), key(0)] == KEYS


PERMUTED = [960, 307, 665, 534, 671, 782, 607, 166]
KEYS = [15020427595393229491, 16294208416658607535]
