"""How alike sequences are, estimated from the words of four letters that they share; MMseqs2 is not needed.

Of two relatives with identity p, independent substitutions would leave a share p^4 of the words of the shorter one.
Conserved residues stand together, so that more is left: identity is about share^0.31, fitted to MMseqs2's identities of
DeepLoc-2 proteins. As many words as chance may share count as none, so distant relatives get 0 rather than a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from protea.finetune.tasks import Floats, Ints

_K: Final = 4
_LETTERS: Final = 26
_BY_CHANCE: Final = 0.06**_K  # that two words are equal; the squares of the shares of amino acids add up to 0.06
_DISTINCT: Final = 3
_EXPONENT: Final = 0.31
_DEVIATIONS, _LEAST = 4.5, 1.5  # what is shared beyond chance: so many standard deviations, and words


class Words:
    """The words of many sequences, for comparing one sequence with all of them."""

    def __init__(self, sequences: Sequence[str]) -> None:
        words = [_words(text) for text in sequences]
        self._sizes = np.array([len(found) for found in words], np.int64)
        codes = np.concatenate([np.empty(0, np.int64), *words])
        owners = np.repeat(np.arange(len(words), dtype=np.int32), self._sizes)
        order = np.argsort(codes, kind="stable")
        self._owners = owners[order]
        self._starts = np.searchsorted(codes[order], np.arange(_LETTERS**_K + 1))

    def identity(self, text: str) -> Floats:
        """``[N]``: the estimated identity of a sequence to each of the sequences; 0 if chance explains it."""
        words = _words(text)
        starts = self._starts[words]
        counts = self._starts[words + 1] - starts
        ends = np.cumsum(counts)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
        shared = np.bincount(self._owners[places], minlength=len(self._sizes))
        chance = self._sizes * (len(words) * _BY_CHANCE)
        shorter = np.maximum(np.minimum(self._sizes, len(words)), 1)
        share = np.minimum((shared - chance) / np.maximum(shorter - chance, 1), 1)
        surprising = shared >= chance + _DEVIATIONS * np.sqrt(chance) + _LEAST
        found: Floats = np.where(surprising, np.maximum(share, 0) ** _EXPONENT, 0.0)
        return found


def _words(text: str) -> Ints:
    """The different words of a sequence, as sorted numbers; letters that are none count as X.

    Words of one or two letters are left out: unrelated proteins share them in regions of low complexity.
    """
    letters = np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int64) - ord("A")
    letters = np.where((letters < 0) | (letters >= _LETTERS), ord("X") - ord("A"), letters)
    if len(letters) < _K:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, _K)
    ranked = np.sort(windows, axis=1)
    varied = (np.diff(ranked, axis=1) > 0).sum(1) >= _DISTINCT - 1
    return np.unique(windows[varied] @ (_LETTERS ** np.arange(_K)))
