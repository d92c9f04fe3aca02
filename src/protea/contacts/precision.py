"""Precision of predicted contacts (Rao et al. 2020): how many of the L most probable pairs are in contact.

    range    long: 24 or more apart; medium: 12 to 23; short: 6 to 11
    P@L      the share of contacts among the L most probable pairs of a range; P@L/2 and P@L/5 likewise
    L        residues of the chain that have coordinates; L/2 and L/5 are rounded down, but are at least 1

As in Meta's ``compute_precisions``, the share is of L even where a range has fewer than L pairs. Where equally probable
pairs compete for the last places, the expected share of a random draw among them counts; sorting would decide by
chance. A chain without any pair in a range has no precision there and does not count in the mean.

Shapes: P pairs, C chains, S residues of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import nan
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.contacts.predict import contacts, too_long
from protea.contacts.structures import Chain, pairs
from protea.errors import UnknownResidueError
from protea.infer.runner import FloatArray
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress

RANGES: Final[Mapping[str, tuple[int, float]]] = {"long": (24, np.inf), "medium": (12, 24), "short": (6, 12)}
"""Separations from the first number to below the second."""

PARTS: Final[Mapping[str, int]] = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}
"""Divisors of L."""

_DRAWS: Final = 2000
_INTERVAL: Final = (2.5, 97.5)


class RangeScore(NamedTuple):
    """Number of pairs in a range, how many of them are in contact, and precisions by ``PARTS``; nan without pairs."""

    pairs: int
    contacts: int
    precisions: dict[str, float]


class ChainPrecision(NamedTuple):
    """Precision of one chain: residues that the model saw, those with coordinates (L), and scores by ``RANGES``."""

    name: str
    residues: int
    resolved: int
    ranges: dict[str, RangeScore]


class Mean(NamedTuple):
    """A mean over chains with its 95 % interval; nan without chains."""

    value: float
    low: float
    high: float
    chains: int


def precision(probabilities: NDArray[np.floating], truth: NDArray[np.bool_], count: int) -> float:
    """The share of contacts (``truth``) among the ``count`` most probable pairs ``[P]``; ``count`` is at least 1."""
    if not len(truth):
        return nan
    taken = min(count, len(truth))
    least = np.partition(probabilities, len(truth) - taken)[len(truth) - taken]
    above, tied = probabilities > least, probabilities == least
    hits = truth[above].sum() + (taken - above.sum()) * truth[tied].mean()
    return float(hits / count)


def score(chain: Chain, probabilities: NDArray[np.floating]) -> ChainPrecision:
    """Precision of one chain, from the probabilities ``[S, S]`` of contacts between the residues of its sequence."""
    rows, columns, separations, truth = pairs(chain)
    predicted = probabilities[rows, columns]
    ranges: dict[str, RangeScore] = {}
    for name, (low, high) in RANGES.items():
        within = (separations >= low) & (separations < high)
        precisions = {
            part: precision(predicted[within], truth[within], max(1, chain.resolved // divisor))
            for part, divisor in PARTS.items()
        }
        ranges[name] = RangeScore(int(within.sum()), int(truth[within].sum()), precisions)
    return ChainPrecision(chain.name, len(chain.sequence), chain.resolved, ranges)


def usable(model: Encoder, chains: Iterable[Chain], rows: list[ReportRow]) -> list[Chain]:
    """The chains that a model and this machine can take; ``rows`` receives the others."""
    kept = []
    for chain in chains:
        if reason := _unfit(model, chain):
            rows.append(ReportRow(chain.name, "skipped", reason))
        else:
            kept.append(chain)
    return kept


def _unfit(model: Encoder, chain: Chain) -> str | None:
    try:
        model.alphabet.encode(chain.sequence)
    except UnknownResidueError as error:
        return str(error)
    return too_long(model, len(chain.sequence))


def measure(
    model: Encoder,
    chains: Sequence[Chain],
    draw: Callable[[Chain, FloatArray], None] = lambda chain, probabilities: None,
    progress: Progress = SILENT,
) -> list[ChainPrecision]:
    """Precision of a model on ``usable`` chains.

    Args:
        model: with a contact head, on the device to compute on.
        chains: with their structures.
        draw: receives every chain and the probabilities ``[S, S]`` of its contacts.
        progress: one step a chain.

    Raises:
        CapabilityError: the model has no contact head.
        NonFiniteError: the model gives infinities or NaN.
    """
    scores = []
    progress.begin("precision", len(chains))
    for chain in chains:
        probabilities = contacts(model, model.alphabet.encode(chain.sequence), chain.name)
        scores.append(score(chain, probabilities))
        draw(chain, probabilities)
        progress.advance()
    return scores


def mean(values: Sequence[float], seed: int = 0) -> Mean:
    """Mean over chains, without nan, and its 95 % interval by bootstrap over chains, which ``seed`` decides."""
    # Sorted, so that the interval does not depend on the order of the chains.
    known = np.sort([value for value in values if not np.isnan(value)])
    if not len(known):
        return Mean(nan, nan, nan, 0)
    draws = np.random.default_rng(seed).integers(0, len(known), (_DRAWS, len(known)))
    low, high = np.percentile(known[draws].mean(1), _INTERVAL)
    return Mean(float(known.mean()), float(low), float(high), len(known))


def means(chains: Sequence[ChainPrecision], seed: int = 0) -> dict[str, dict[str, Mean]]:
    """Means by range and part; ``chance`` is what random predictions would give."""
    by_range: dict[str, dict[str, Mean]] = {}
    for name in RANGES:
        scores = [chain.ranges[name] for chain in chains]
        by_range[name] = {part: mean([result.precisions[part] for result in scores], seed) for part in PARTS}
        shares = [result.contacts / result.pairs if result.pairs else nan for result in scores]
        by_range[name]["chance"] = mean(shares, seed)
    return by_range
