"""Effects of variants: how much more or less a model expects the mutant than the wild type.

    masked-marginals    Σ over sites of log p(mutant) - log p(wild type), each with its site masked
    wildtype-marginals  the same with nothing masked: one pass a protein
    pseudo-likelihood   Σ over all residues of log p(residue | the others), of the mutant less of the wild type

The first two are Meier et al. 2021 and know substitutions alone; the third (Salazar et al. 2020) knows insertions and
deletions too, and costs a pass for every residue of every mutant.

Shapes: L residues, S sites, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.errors import UsageError, VariantError
from protea.infer.budget import default_budget
from protea.infer.runner import FloatArray, Runner
from protea.models.encoder import Encoder
from protea.score.expected import Advance, Sites, check_policy, masked, unmasked
from protea.score.variants import Variant

_LARGEST: Final = 999_999_999
"""No residue has a number of more digits, as variants are read."""

METHODS: Final = ("masked-marginals", "wildtype-marginals", "pseudo-likelihood")


class Protein(NamedTuple):
    """A wild type and its variants.

    Attributes:
        name: what messages call it.
        sequence: of the wild type, letters of the alphabet.
        variants: that fit it.
    """

    name: str
    sequence: str
    variants: Sequence[Variant]

    @property
    def sites(self) -> list[int]:
        """Residues that any variant changes, from 0."""
        return sorted({edit.start for variant in self.variants for edit in variant.edits})


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How variants are scored.

    Attributes:
        method: one of ``METHODS``.
        offset: the number of a protein's first residue.
        long: what to do with a protein longer than the model was trained on: ``window``, ``full`` or ``error``.
        token_budget: tokens computed at a time; by default what the memory allows.

    Raises:
        UsageError: a method or policy is unknown, or the offset no residue's number.
    """

    method: str = "masked-marginals"
    offset: int = 1
    long: str = "window"
    token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; use {', '.join(METHODS)}")
        if abs(self.offset) > _LARGEST:
            raise UsageError(f"offset must be from -{_LARGEST:,} to {_LARGEST:,}, got {self.offset}")
        check_policy(self.long)

    def shown(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def check(self, variant: Variant) -> None:
        """See that the method can score a variant.

        Raises:
            VariantError: it is no substitution, and the method knows nothing else.
        """
        if self.method != "pseudo-likelihood" and not variant.is_substitution:
            raise VariantError(
                f"{variant.name}: {self.method} knows substitutions alone; insertions and deletions are scored by "
                "pseudo-likelihood"
            )

    def passes(self, proteins: Iterable[Protein]) -> int:
        """How many passes it takes, all windows of an unmasked protein counting as one."""
        if self.method == "wildtype-marginals":
            return sum(1 for _ in proteins)
        if self.method == "masked-marginals":
            return sum(len(protein.sites) for protein in proteins)
        return sum(
            len(protein.sequence) + sum(len(one.apply(protein.sequence)) for one in protein.variants)
            for protein in proteins
        )


def score(
    model: Encoder, proteins: Sequence[Protein], how: Scoring, advance: Advance = lambda done: None
) -> Iterator[NDArray[np.float64]]:
    """Log-likelihood ratios of all variants, in nats: negative where the model prefers the wild type.

    Args:
        model: with a language-model head.
        proteins: passes of all are packed together.
        how: method and policies.
        advance: told of progress.

    Yields:
        For each protein an array of one number a variant.

    Raises:
        VariantError: a variant that the method cannot score.
        SequenceTooLongError: a protein is too long, and ``how.long`` is ``error``.
        CapabilityError: the model has no language-model head.
    """
    for protein in proteins:
        for variant in protein.variants:
            how.check(variant)
    runner = Runner(model, default_budget(model) if how.token_budget is None else how.token_budget)
    if how.method == "pseudo-likelihood":
        return _by_pseudo_likelihood(runner, proteins, how, advance)
    return _by_marginals(runner, proteins, how, advance)


def pseudo_log_likelihoods(
    runner: Runner, sequences: Iterable[tuple[str, str]], *, long: str, advance: Advance = lambda done: None
) -> Iterator[FloatArray]:
    """Log-probability ``[L]`` of each residue, masked, given all others.

    Args:
        runner: of a model with a language-model head.
        sequences: name and letters of each, taken as they are needed.
        long: what to do with one longer than the model was trained on.
        advance: told of progress, a residue at a time.

    Raises:
        UnknownResidueError: a letter outside the alphabet.
        SequenceTooLongError: one is too long, and ``long`` is ``error``.
        CapabilityError: the model has no language-model head.
    """
    encode = runner.model.alphabet.encode
    proteins = (Sites(name, ids := encode(sequence), range(len(ids))) for name, sequence in sequences)
    for protein, values in masked(runner, proteins, long=long, advance=advance):
        yield values[np.arange(len(protein.ids)), protein.ids]


def _by_marginals(
    runner: Runner, proteins: Sequence[Protein], how: Scoring, advance: Advance
) -> Iterator[NDArray[np.float64]]:
    alphabet = runner.model.alphabet
    wanted = (Sites(one.name, alphabet.encode(one.sequence), one.sites) for one in proteins)
    expected = masked if how.method == "masked-marginals" else unmasked
    found = expected(runner, wanted, long=how.long, advance=advance)
    for protein, (_, values) in zip(proteins, found, strict=True):
        yield _sums(protein, values, alphabet)


def _sums(protein: Protein, values: FloatArray, alphabet: Alphabet) -> NDArray[np.float64]:
    row = {site: number for number, site in enumerate(protein.sites)}
    wild = alphabet.encode(protein.sequence)
    scores = np.zeros(len(protein.variants))
    for number, variant in enumerate(protein.variants):
        for edit in variant.edits:
            found = values[row[edit.start]].astype(np.float64)
            scores[number] += found[alphabet.encode(edit.new)[0]] - found[wild[edit.start]]
    return scores


def _by_pseudo_likelihood(
    runner: Runner, proteins: Sequence[Protein], how: Scoring, advance: Advance
) -> Iterator[NDArray[np.float64]]:
    def sequences() -> Iterator[tuple[str, str]]:
        for protein in proteins:
            yield protein.name, protein.sequence
            for variant in protein.variants:
                yield f"{protein.name}, {variant.name}", variant.apply(protein.sequence)

    found = pseudo_log_likelihoods(runner, sequences(), long=how.long, advance=advance)
    for protein in proteins:
        wild = next(found).sum(dtype=np.float64)
        yield np.array([next(found).sum(dtype=np.float64) - wild for _ in protein.variants])
