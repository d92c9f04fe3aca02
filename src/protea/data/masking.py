"""Masked language modelling: which tokens are hidden, and what replaces them.

Token ``j`` of a window at place ``index`` has the word ``stream(fold(seed, epoch, MASK, index), j)``, which decides
whether it is selected. ``mix`` of that word decides whether it is masked, replaced or kept. Masks therefore do not
depend on the pack, the worker or the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.arguments import check_fields
from protea.data.draws import Words, below, mix, stream, threshold
from protea.errors import UsageError
from protea.text import shown

Pool = Literal["canonical", "other-residues", "all"]
"""Where random replacements come from.

``canonical``: the 20 amino acids. ``other-residues``: all one-letter tokens except the one that is replaced.
``all``: all tokens, special ones included.
"""

_CANONICAL: Final = "ACDEFGHIKLMNPQRSTVWY"
_NONE: Final = 255


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are hidden.

    Attributes:
        select: probability that a token is selected.
        mask: share of selected tokens that become ``<mask>``.
        random: share of selected tokens that are replaced from the pool; the rest stay as they are.
        pool: where replacements come from.
        specials: whether BOS and EOS can be selected.
        at_least_one: whether one token is selected in sequences where the draws select none.
    """

    select: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    pool: Pool = "canonical"
    specials: bool = False
    at_least_one: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("select", "mask", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"masking: {name} must be from 0 to 1, got {shown(getattr(self, name))}")
        if self.mask + self.random > 1 + 1e-9:
            raise UsageError(f"masking: mask {self.mask} and random {self.random} add up to more than 1")


VARIANTS: Final = {
    "standard": Masking(),
    "bionemo2": Masking(pool="all"),
    "huggingface": Masking(pool="all"),
    "bionemo1": Masking(pool="other-residues", specials=True, at_least_one=True),
    "bionemo1-esm1nv": Masking(mask=0.5, random=0.5, pool="other-residues", specials=True, at_least_one=True),
    "bionemo1-esm2nv": Masking(
        select=0.1, mask=0.5, random=0.5, pool="other-residues", specials=True, at_least_one=True
    ),
    "bionemo1-80-2-18": Masking(random=0.02, pool="other-residues", specials=True, at_least_one=True),
}
"""Masking by name; ``docs/data.md`` says who used which.

BioNeMo 1 masked as ``bionemo1-esm1nv`` and ``bionemo1-esm2nv`` until May 2024; by their dates, the published models
were trained with these. ``bionemo1-80-2-18`` is a mistake that its notes describe.
"""


def masking_named(name: str) -> Masking:
    """The variant with a name."""
    if name not in VARIANTS:
        raise UsageError(f"unknown masking {name!r}; use {', '.join(VARIANTS)}")
    return VARIANTS[name]


class Masker:
    """Masks one pack at a time."""

    def __init__(self, masking: Masking, alphabet: Alphabet) -> None:
        self.masking, self.alphabet = masking, alphabet
        letters = {
            "canonical": [token for token in alphabet.tokens if token in _CANONICAL],
            "other-residues": list(alphabet.residues),
            "all": list(alphabet.tokens),
        }[masking.pool]
        self.pool = np.array(sorted(alphabet.tokens.index(token) for token in letters), np.uint8)
        self._rank = np.full(256, _NONE, np.uint8)
        self._rank[self.pool] = np.arange(len(self.pool))
        self._select = threshold(masking.select)
        self._mask = threshold(masking.mask)
        self._random = threshold(masking.mask + masking.random)

    def __call__(
        self, tokens: NDArray[np.uint8], keys: Words, starts: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The tokens after masking, and which of them the model is to predict.

        Args:
            tokens: ``[T]``, sequences end to end, with BOS and EOS; not changed.
            keys: ``[B]``, a word for each sequence.
            starts: ``[B+1]``, where each sequence begins, and the end of the last one.
        """
        lengths = np.diff(starts)
        positions = (np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)).astype(np.uint64)
        words = stream(np.repeat(keys, lengths), positions)
        hidden = words <= self._select if self.masking.select else np.zeros(len(tokens), np.bool_)
        if not self.masking.specials:
            allowed = ~np.isin(tokens, self.alphabet.frame.specials)
            hidden &= allowed
        if self.masking.at_least_one:
            if not self.masking.specials:
                words = np.where(allowed, words, ~np.uint64(0))
            for number in np.flatnonzero(~np.logical_or.reduceat(hidden, starts[:-1])):
                # The draws select no token of this sequence, so select the token with the smallest word.
                hidden[starts[number] + np.argmin(words[starts[number] : starts[number + 1]])] = True
        places = np.flatnonzero(hidden)
        action = mix(words[places])
        original = tokens[places]
        changed = np.where(action <= self._random, self._replacement(original, mix(action)), original)
        if self.masking.mask:
            changed = np.where(action <= self._mask, np.uint8(self.alphabet.mask), changed)
        result = tokens.copy()
        result[places] = changed
        return result, hidden

    def _replacement(self, original: NDArray[np.uint8], words: Words) -> NDArray[np.uint8]:
        if self.masking.pool != "other-residues":
            return self.pool[below(words, len(self.pool))]
        rank = self._rank[original].astype(np.int64)
        drawn = below(words, len(self.pool) - (rank != _NONE))
        return self.pool[drawn + (drawn >= rank)]
