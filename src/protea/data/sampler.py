"""Which sequence, and which part of it, an epoch shows at each of its places.

An epoch has as many places as there are clusters and visits each once. Place ``i`` of epoch ``e`` shows

    cluster  = Permutation(clusters, fold(seed, e, EPOCH_ORDER))[i]
    member   = starts[cluster] + below(fold(seed, e, MEMBER, i), counts[cluster])
    window   = below(fold(seed, e, CROP, i), windows)         of all possible windows, the last included

Nothing is stored and nothing depends on what was drawn before, so that any process can compute any place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from protea.data.draws import CROP, EPOCH_ORDER, MEMBER, Permutation, below, fold, key
from protea.data.training_store import StoreSplit
from protea.errors import DataError, UsageError

Crop = Literal["random", "head", "random-tokens", "head-tokens"]
"""How a sequence that is too long is cropped.

``random``: a random window of residues, between BOS and EOS. ``head``: the first residues, between BOS and EOS
(fair-esm, Hugging Face). ``random-tokens``: a random window of the sequence with its BOS and EOS, which are there only
if the window reaches them (BioNeMo 2; the last window, which it never draws, is drawn here). ``head-tokens``: the first
tokens: BOS, and no EOS (BioNeMo 1). All have ``max_tokens`` tokens, whether or not the alphabet has BOS and EOS.
"""

CROPS: Final = get_args(Crop)

_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class Draws:
    """What some places of an epoch show; arrays with one value for each place.

    Attributes:
        index: the places.
        sequence: the member's row in the split.
        start: where its window begins in the split's ``tokens``.
        residues: residues in the window.
        offset: residues of the sequence before the window.
        bos: whether BOS precedes the window.
        eos: whether EOS follows it.
    """

    index: NDArray[np.int64]
    sequence: NDArray[np.int64]
    start: NDArray[np.int64]
    residues: NDArray[np.int64]
    offset: NDArray[np.int64]
    bos: NDArray[np.bool_]
    eos: NDArray[np.bool_]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens of each window, with BOS and EOS."""
        return self.residues + self.bos + self.eos

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: slice | NDArray[np.integer]) -> Draws:
        return Draws(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


class Sampler:
    """Computes what the places of an epoch show.

    Args:
        split: of a store.
        seed: of all draws.
        max_tokens: most tokens of a sequence, with BOS and EOS.
        crop: how longer sequences are cropped.
        max_length: if given, longer sequences are never shown; costs 8 bytes of memory for each cluster.
        shuffle: whether the order of the clusters is drawn; else it is that of the store.
    """

    def __init__(
        self,
        split: StoreSplit,
        *,
        seed: int = 0,
        max_tokens: int = 1024,
        crop: Crop = "random",
        max_length: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if crop not in CROPS:
            raise UsageError(f"unknown crop {crop!r}; use {', '.join(CROPS)}")
        frame = split.alphabet.frame
        if max_tokens < frame.tokens(1):
            names = ["BOS"] * (frame.bos is not None) + ["a residue"] + ["EOS"] * (frame.eos is not None)
            raise UsageError(f"max_tokens must be at least {len(names)} ({', '.join(names)}), got {max_tokens}")
        self.split, self.seed, self.max_tokens, self.crop, self.shuffle = split, seed, max_tokens, crop, shuffle
        self.max_length = max_length
        self._clusters = None if max_length is None else self._with_short_members(max_length)
        self._size = split.clusters if self._clusters is None else len(self._clusters)
        if not self._size:
            raise DataError(f"split {split.name}: no cluster has a sequence of at most {max_length} residues")

    def __len__(self) -> int:
        """Places of an epoch."""
        return self._size

    def draw(self, epoch: int, index: NDArray[np.integer]) -> Draws:
        """What some places of an epoch show; an ``IndexError`` if a place is outside it."""
        places = np.asarray(index, np.int64)
        words = places.astype(np.uint64)
        clusters = Permutation(self._size, key(self.seed, epoch, EPOCH_ORDER))[places] if self.shuffle else places
        member_words = fold(self.seed, epoch, MEMBER, words)
        if self._clusters is None or self.max_length is None:
            sequences = self.split.starts(clusters) + below(member_words, self.split.counts(clusters))
        else:
            rows, counts = self._short_members(self._clusters[clusters], self.max_length)
            sequences = rows[np.cumsum(counts) - counts + below(member_words, counts)]
        start, length = self.split.spans(sequences)

        # "random" and "head" take a window of the residues, the others one of the tokens, with BOS and EOS.
        frame, of_residues = self.split.alphabet.frame, self.crop in {"random", "head"}
        available = length if of_residues else frame.tokens(length)
        size = np.minimum(available, frame.residues(self.max_tokens) if of_residues else self.max_tokens)
        first = np.zeros_like(length)
        if self.crop.startswith("random"):
            first = below(fold(self.seed, epoch, CROP, words), available - size + 1)
        if of_residues:
            bos, eos = (np.full(len(places), special is not None) for special in frame)
            return Draws(places, sequences, start + first, size, first, bos, eos)
        bos, eos = (first == 0) & (frame.bos is not None), (first + size == available) & (frame.eos is not None)
        offset = first - frame.before + bos
        return Draws(places, sequences, start + offset, size - bos - eos, offset, bos, eos)

    def _short_members(
        self, clusters: NDArray[np.int64], max_length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The members of some clusters that are short enough, and how many each cluster has."""
        starts, counts = self.split.starts(clusters), self.split.counts(clusters)
        begins = np.cumsum(counts) - counts
        rows = np.arange(counts.sum()) + np.repeat(starts - begins, counts)
        fits = self.split.spans(rows)[1] <= max_length
        return rows[fits], np.add.reduceat(fits, begins, dtype=np.int64)

    def _with_short_members(self, max_length: int) -> NDArray[np.int64]:
        """The clusters that have a member that is short enough."""
        clusters = [np.zeros(0, np.int64)]
        for first in range(0, self.split.clusters, _CHUNK):
            chunk = np.arange(first, min(first + _CHUNK, self.split.clusters))
            clusters.append(chunk[self._short_members(chunk, max_length)[1] > 0])
        return np.concatenate(clusters)
