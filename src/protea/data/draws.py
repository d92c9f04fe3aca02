"""Random numbers without state: each is a hash of its purpose.

Every draw of training data is ``fold(seed, epoch, purpose, index)``, so that any process can compute any draw. The
arithmetic is exact, on unsigned 64-bit integers, and gives the same on every machine.

    mix(x)             the step and finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection on 64-bit words
    fold(a, b, ...)    mix(... mix(mix(a) ^ b) ...)
    stream(key, j)     mix(key + j * 0x9E3779B97F4A7C15), output j of SplitMix64 started at ``key``
    below(h, n)        floor(h * n / 2**64), in 0 .. n-1, biased by less than n / 2**64
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
"""Unsigned 64-bit integers of any shape."""

EPOCH_ORDER: Final = 1
MEMBER: Final = 2
CROP: Final = 3
MASK: Final = 4
SPLIT: Final = 5
"""Purposes: the third word of ``fold``."""

_GOLDEN: Final = 0x9E3779B97F4A7C15
_M1: Final = np.uint64(0xBF58476D1CE4E5B9)
_M2: Final = np.uint64(0x94D049BB133111EB)
_WORD: Final = (1 << 64) - 1
_LOW: Final = np.uint64(0xFFFFFFFF)
_S27, _S30, _S31, _S32 = (np.uint64(shift) for shift in (27, 30, 31, 32))
_ROUNDS: Final = 8


def mix(words: Words) -> Words:
    """Scramble each word."""
    z = words + np.uint64(_GOLDEN)
    z ^= z >> _S30
    z *= _M1
    z ^= z >> _S27
    z *= _M2
    z ^= z >> _S31
    return z


def fold(*parts: int | Words) -> Words:
    """One word for each combination of the parts, which are broadcast. Integers count modulo 2**64."""
    result: Words = np.zeros(1, np.uint64)
    for part in parts:
        word = np.uint64(part & _WORD) if isinstance(part, int) else part
        result = mix(result ^ word)
    return result


def key(*parts: int) -> int:
    """``fold`` of integers, as an integer."""
    return int(fold(*parts)[0])


def stream(keys: Words, positions: Words) -> Words:
    """The words at some positions of the streams that the keys start."""
    return mix(keys + positions * np.uint64(_GOLDEN))


def later(keys: Words, positions: int) -> Words:
    """Keys whose streams are those of ``keys`` from a position on."""
    return keys + np.uint64(positions * _GOLDEN & _WORD)


def below(words: Words, sizes: NDArray[np.integer] | int) -> NDArray[np.int64]:
    """Scale each word into ``0 .. size-1``; sizes are below 2**32."""
    size = np.asarray(sizes, dtype=np.uint64)
    high, low = words >> _S32, words & _LOW
    return ((high * size + ((low * size) >> _S32)) >> _S32).astype(np.int64)


def threshold(probability: float) -> np.uint64:
    """The bound that a word does not exceed with a given probability, exact to 2**-53."""
    return np.uint64(max(0, min(_WORD, round(probability * 2**64) - 1)))


class Permutation:
    """A seeded order of ``0 .. size-1`` that is computed, not stored: a Feistel network with cycle walking.

    It scrambles the smallest power of two that holds ``size``, in eight rounds. A result outside the range is scrambled
    again until it is inside, on average twice at most.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        bits = max(0, size - 1).bit_length()
        self._low_bits = np.uint64((bits + 1) // 2)
        self._low = np.uint64((1 << ((bits + 1) // 2)) - 1)
        self._high = np.uint64((1 << (bits // 2)) - 1)
        self._keys = [np.uint64(key(seed, number)) for number in range(_ROUNDS)]

    def __getitem__(self, places: NDArray[np.integer]) -> NDArray[np.int64]:
        """The numbers at some places of the order; an ``IndexError`` if a place is outside it."""
        if places.size and (places.min() < 0 or places.max() >= self.size):
            raise IndexError(f"places must be in [0, {self.size}), got {places.min()} to {places.max()}")
        values = self._scramble(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = again = self._scramble(values[outside])
            outside = outside[again >= self.size]
        return values.astype(np.int64)

    def _scramble(self, values: Words) -> Words:
        high, low = values >> self._low_bits, values & self._low
        for number, round_key in enumerate(self._keys):
            if number % 2 == 0:
                high = high ^ (mix(low ^ round_key) & self._high)
            else:
                low = low ^ (mix(high ^ round_key) & self._low)
        return (high << self._low_bits) | low
