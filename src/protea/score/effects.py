"""Effects of variants: how much more or less a model expects the mutant than the wild type.

    masked-marginals    Σ over sites of log p(mutant) - log p(wild type), each site masked by itself
    wildtype-marginals  the same with nothing masked: one pass a protein
    pseudo-likelihood   the mean over all residues of log p(residue | the others), of the mutant minus that of the wild
                        type, times the length of the wild type
    pseudo-likelihood-sum  the sum over all residues instead; the two differ where the lengths do

The first two (Meier et al. 2021) score substitutions only. The others (Salazar et al. 2020) also score insertions and
deletions; they cost a pass for every residue of every mutant. A sum rises with every residue that is deleted, so
ProteinGym ranks insertions and deletions by means (Notin et al. 2022; ``get_tranception_scores_mutated_sequences`` of
its Tranception, and ProGen2, RITA and ProtGPT2). Times the length of the wild type, a mean has the scale of the sums of
substitutions, and equals them where the lengths agree.

Shapes: L residues, V tokens of the alphabet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import ArgumentError, UsageError, VariantError
from protea.infer.runner import FloatArray, Runner
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.score.expected import LongProtein, Sites, masked, runner_for, unmasked
from protea.score.proteins import choice
from protea.score.variants import Variant
from protea.text import counted, shown

METHODS: Final = ("masked-marginals", "wildtype-marginals", "pseudo-likelihood", "pseudo-likelihood-sum")
_MARGINALS: Final = METHODS[:2]
_LARGEST_OFFSET: Final = 999_999_999  # residue numbers in variants have at most nine digits


class Protein(NamedTuple):
    """A wild type, in letters of the alphabet, and variants that fit it; messages use the name."""

    name: str
    sequence: str
    variants: Sequence[Variant]

    @property
    def sites(self) -> list[int]:
        """The places, from 0, that at least one variant changes."""
        return sorted({edit.start for variant in self.variants for edit in variant.edits})


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How variants are scored: by one of ``METHODS``, with one of ``LongProtein`` for long proteins.

    ``offset`` is the number of a protein's first residue, ``token_budget`` the number of tokens computed at a time.
    """

    method: str = "masked-marginals"
    offset: int = 1
    long: str = "window"
    token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; use {', '.join(METHODS)}")
        if abs(self.offset) > _LARGEST_OFFSET:
            allowed = f"-{_LARGEST_OFFSET:,} to {_LARGEST_OFFSET:,}"
            raise ArgumentError(f"offset={shown(self.offset)}: use a number from {allowed}")
        choice("policy for long proteins", self.long, LongProtein)

    def check(self, variant: Variant) -> None:
        """Refuse a variant that the method cannot score, by a ``VariantError``."""
        if self.method in _MARGINALS and not variant.is_substitution:
            raise VariantError(
                f"{variant.name}: {self.method} scores substitutions only; use pseudo-likelihood for insertions and "
                "deletions"
            )

    def of_lengths(self, proteins: Iterable[Protein]) -> str | None:
        """How many variants change the length of a protein, and what their scores are; ``None`` without such ones."""
        number = sum(variant.lengthens_by != 0 for protein in proteins for variant in protein.variants)
        how = "scored by sums, which are higher for fewer residues; pseudo-likelihood compares means"
        if self.method == "pseudo-likelihood":
            how = "scored by means over residues, times the wild type's length; pseudo-likelihood-sum gives sums"
        return f"{counted(number, 'variant')} of another length than the wild type: {how}" if number else None

    def passes(self, proteins: Iterable[Protein]) -> int:
        """The number of passes to compute; all windows of an unmasked protein count as one."""
        if self.method == "wildtype-marginals":
            return sum(1 for _ in proteins)
        if self.method == "masked-marginals":
            return sum(len(protein.sites) for protein in proteins)
        return sum(len(sequence) for _, sequence in _sequences(proteins))

    def work(self, protein: Protein) -> NDArray[np.float64]:
        """Tokens that each variant of a protein takes, about; variants that need the same pass share its tokens."""
        length, variants = len(protein.sequence), protein.variants
        if self.method == "wildtype-marginals":
            return np.full(len(variants), length / len(variants))
        if self.method == "masked-marginals":
            named = Counter(edit.start for variant in variants for edit in variant.edits)
            return np.array([sum(length / named[edit.start] for edit in variant.edits) for variant in variants])
        return np.array([(length + variant.lengthens_by) ** 2 for variant in variants], np.float64)


def score(
    model: Encoder,
    proteins: Sequence[Protein],
    how: Scoring,
    progress: Progress = SILENT,
    *,
    runner: Runner | None = None,
) -> Iterator[NDArray[np.float64]]:
    """For each protein, log-likelihood ratios of its variants in nats; negative where the wild type is preferred.

    ``runner`` computes the passes; by default one of the model's own.
    """
    for protein in proteins:
        for variant in protein.variants:
            how.check(variant)
    runner = runner or runner_for(model, how.token_budget)
    score_all = _by_marginals if how.method in _MARGINALS else _by_pseudo_likelihood
    return score_all(runner, proteins, how, progress)


def pseudo_log_likelihoods(
    runner: Runner, sequences: Iterable[tuple[str, str]], *, long: str, progress: Progress = SILENT
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Log-probabilities of residues given all others; each residue is masked by itself.

    Takes name and letters of sequences when they are needed. Yields for each sequence ``[L]``, of its own residues, and
    ``[L, V]``, of all tokens.
    """
    choice("policy for long proteins", long, LongProtein)
    encode = runner.model.alphabet.encode
    proteins = (Sites(name, ids := encode(sequence), range(len(ids))) for name, sequence in sequences)
    for protein, values in masked(runner, proteins, long=long, progress=progress):
        yield values[np.arange(len(protein.ids)), protein.ids], values


def _by_marginals(
    runner: Runner, proteins: Sequence[Protein], how: Scoring, progress: Progress
) -> Iterator[NDArray[np.float64]]:
    alphabet = runner.model.alphabet
    sites = (Sites(protein.name, alphabet.encode(protein.sequence), protein.sites) for protein in proteins)
    expected = masked if how.method == "masked-marginals" else unmasked
    values = expected(runner, sites, long=how.long, progress=progress)
    for protein, (at, log_probabilities) in zip(proteins, values, strict=True):
        rows = dict(zip(at.sites, log_probabilities.astype(np.float64), strict=True))
        scores = np.zeros(len(protein.variants))
        for number, variant in enumerate(protein.variants):
            for edit in variant.edits:
                row = rows[edit.start]
                scores[number] += row[alphabet.encode(edit.new)[0]] - row[at.ids[edit.start]]
        yield scores


def _by_pseudo_likelihood(
    runner: Runner, proteins: Sequence[Protein], how: Scoring, progress: Progress
) -> Iterator[NDArray[np.float64]]:
    values = pseudo_log_likelihoods(runner, _sequences(proteins), long=how.long, progress=progress)
    likelihoods = (residues.sum(dtype=np.float64) for residues, _ in values)
    for protein in proteins:
        wild, length = next(likelihoods), len(protein.sequence)
        scores = np.empty(len(protein.variants))
        for number, variant in enumerate(protein.variants):
            mutant = next(likelihoods)
            if variant.lengthens_by and how.method == "pseudo-likelihood":
                mutant *= length / (length + variant.lengthens_by)
            scores[number] = mutant - wild
        yield scores


def _sequences(proteins: Iterable[Protein]) -> Iterator[tuple[str, str]]:
    """Name and letters of every wild type, each followed by its mutants."""
    for protein in proteins:
        yield protein.name, protein.sequence
        for variant in protein.variants:
            yield f"{protein.name}, {variant.name}", variant.apply(protein.sequence)
