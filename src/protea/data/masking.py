"""Masked language modelling: which tokens are hidden, and what stands in their place.

Every token of every place of an epoch has a word of its own, ``stream(fold(seed, epoch, MASK, index), j)`` with ``j``
its position in the window; a second word, ``mix`` of the first, says what happens to a selected one. Masks are
therefore the same whatever pack, worker or rank a sequence comes to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.draws import Words, below, mix, stream, threshold
from protea.errors import UsageError

Pool = Literal["canonical", "other-residues", "all"]
"""Where random replacements come from.

``canonical``: the 20 amino acids. ``other-residues``: every one-letter token of the alphabet but the one replaced.
``all``: every token of the alphabet, special ones included.
"""

_CANONICAL: Final = "ACDEFGHIKLMNPQRSTVWY"
_NONE: Final = 255


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are hidden.

    Attributes:
        select: the probability that a token is selected, each by itself.
        mask: the share of selected tokens that become ``<mask>``.
        random: the share that become a token drawn from the pool; the rest stay as they are.
        pool: what is drawn from.
        specials: BOS and EOS, where there are any, can be selected.
        at_least_one: where nothing was selected in a sequence, one token is, each as likely.
    """

    select: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    pool: Pool = "canonical"
    specials: bool = False
    at_least_one: bool = False

    def __post_init__(self) -> None:
        for name in ("select", "mask", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"masking: {name} must be from 0 to 1, got {getattr(self, name)}")
        if self.mask + self.random > 1 + 1e-9:
            raise UsageError(f"masking: mask {self.mask} and random {self.random} are together over 1")
        if self.pool not in {"canonical", "other-residues", "all"}:
            raise UsageError(f"masking: unknown pool {self.pool!r}; use canonical, other-residues or all")


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

``bionemo1-esm1nv`` and ``bionemo1-esm2nv`` are what BioNeMo 1 did before May 2024, with which the published models
were trained as far as dates tell; ``bionemo1-80-2-18`` is the common mistake that its notes describe.
"""


def masking_named(name: str) -> Masking:
    """A variant by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in VARIANTS:
        raise UsageError(f"unknown masking {name!r}; use {', '.join(VARIANTS)}")
    return VARIANTS[name]


class Masker:
    """Masks whole packs at a time.

    Args:
        masking: how.
        alphabet: of the tokens.
    """

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
        """The tokens after masking, and which of them are to be predicted.

        Args:
            tokens: ``[T]``, sequences end to end in their frames; not changed.
            keys: ``[B]``, a word for each sequence.
            starts: ``[B+1]``, where each begins, and the end of the last.
        """
        lengths = np.diff(starts)
        positions = (np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)).astype(np.uint64)
        words = stream(np.repeat(keys, lengths), positions)
        hidden = words <= self._select if self.masking.select else np.zeros(len(tokens), np.bool_)
        if not self.masking.specials:
            allowed = np.ones(len(tokens), np.bool_)
            for special in self.alphabet.frame.specials:
                allowed &= tokens != special
            hidden &= allowed
        if self.masking.at_least_one:
            if not self.masking.specials:
                words = np.where(allowed, words, ~np.uint64(0))
            self._force(hidden, words, starts[:-1])
        places = np.flatnonzero(hidden)
        action = mix(words[places])
        original = tokens[places]
        changed = np.where(action <= self._random, self._replacement(original, mix(action)), original)
        changed = (
            np.where(action <= self._mask, np.uint8(self.alphabet.mask), changed) if self.masking.mask else changed
        )
        result = tokens.copy()
        result[places] = changed
        return result, hidden

    def _replacement(self, original: NDArray[np.uint8], words: Words) -> NDArray[np.uint8]:
        if self.masking.pool != "other-residues":
            return self.pool[below(words, len(self.pool)).astype(np.int64)]
        rank = self._rank[original].astype(np.int64)
        drawn = below(words, (len(self.pool) - (rank != _NONE)).astype(np.uint64)).astype(np.int64)
        return self.pool[drawn + (drawn >= rank)]

    @staticmethod
    def _force(hidden: NDArray[np.bool_], words: Words, starts: NDArray[np.int64]) -> None:
        """Select the token of the smallest word where none is; each has it as often."""
        bare = ~np.logical_or.reduceat(hidden, starts)
        if not bare.any():
            return
        least = np.minimum.reduceat(words, starts)
        ends = np.append(starts[1:], len(words))
        for number in np.flatnonzero(bare):
            part = words[starts[number] : ends[number]]
            hidden[starts[number] + int(np.flatnonzero(part == least[number])[0])] = True
