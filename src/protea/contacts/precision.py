"""Precision of predicted contacts (Rao et al. 2020): of the L pairs a model is surest of, how many are in contact.

    range    long: 24 or more apart; medium: 12 to 23; short: 6 to 11
    P@L      the share of contacts among the L most probable pairs of a range; P@L/2 and P@L/5 likewise
    L        residues of the chain that have coordinates; L/2 and L/5 are rounded down, to no less than 1

As in Meta's ``compute_precisions``, where a range has fewer than L pairs the share is still one of L. Where pairs are
equally probable and only some of them are among the first, the share expected of drawing them is taken, which sorting
decides by chance. A chain without any pair of a range has no precision there and takes no part in the mean.

Shapes: P pairs, C chains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.contacts.predict import contacts, too_large
from protea.contacts.structures import Chain, pairs
from protea.errors import UnknownResidueError
from protea.models.encoder import Encoder

RANGES: Final[Mapping[str, tuple[int, float]]] = {"long": (24, np.inf), "medium": (12, 24), "short": (6, 12)}
"""Least separation, and the least that is too much."""

PARTS: Final[Mapping[str, int]] = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}
"""What L is divided by."""

_DRAWS: Final = 2000
_INTERVAL: Final = (2.5, 97.5)


class RangeScore(NamedTuple):
    """What one range of a chain gave.

    Attributes:
        pairs: how many there are.
        contacts: how many of them are in contact; over ``pairs``, what chance gives.
        precisions: by the names of ``PARTS``; nan without pairs.
    """

    pairs: int
    contacts: int
    precisions: dict[str, float]


@dataclass(frozen=True)
class ChainPrecision:
    """Precision of one chain.

    Attributes:
        name: of the chain.
        residues: that the model saw.
        resolved: of them with coordinates, L.
        ranges: by the names of ``RANGES``.
    """

    name: str
    residues: int
    resolved: int
    ranges: dict[str, RangeScore]


class Mean(NamedTuple):
    """A mean over chains.

    Attributes:
        value: nan without chains.
        low: lower end of its 95 % interval.
        high: upper end.
        chains: how many it is over.
    """

    value: float
    low: float
    high: float
    chains: int


def precision(probabilities: NDArray[np.floating], truth: NDArray[np.bool_], count: int) -> float:
    """The share of contacts among the ``count`` most probable of some pairs, as the module says.

    Args:
        probabilities: ``[P]``, or anything that orders pairs as they do.
        truth: ``[P]`` which are in contact.
        count: at least 1.
    """
    if not len(truth):
        return nan
    taken = min(count, len(truth))
    least = np.partition(probabilities, len(truth) - taken)[len(truth) - taken]
    above, tied = probabilities > least, probabilities == least
    hits = truth[above].sum() + (taken - above.sum()) * truth[tied].mean()
    return float(hits / count)


def score(chain: Chain, probabilities: NDArray[np.floating]) -> ChainPrecision:
    """Precision of one chain.

    Args:
        chain: with its structure.
        probabilities: ``[S, S]`` of contacts between the residues of its sequence.
    """
    rows, columns, separations, truth = pairs(chain)
    found = probabilities[rows, columns]
    ranges: dict[str, RangeScore] = {}
    for name, (low, high) in RANGES.items():
        within = (separations >= low) & (separations < high)
        precisions = {
            part: precision(found[within], truth[within], max(1, chain.resolved // divisor))
            for part, divisor in PARTS.items()
        }
        ranges[name] = RangeScore(int(within.sum()), int(truth[within].sum()), precisions)
    return ChainPrecision(chain.name, len(chain.sequence), chain.resolved, ranges)


def unfit(model: Encoder, chain: Chain) -> str | None:
    """Why a model, or this machine, cannot take a chain."""
    frame, residues = model.alphabet.frame, len(chain.sequence)
    if model.max_tokens is not None and frame.tokens(residues) > model.max_tokens:
        return f"{residues} residues, and this {model.config.family} model takes {frame.residues(model.max_tokens)}"
    try:
        model.alphabet.encode(chain.sequence)
    except UnknownResidueError as error:
        return str(error)
    return too_large(model, len(chain.sequence))


def predict(model: Encoder, chain: Chain) -> NDArray[np.float32]:
    """``[S, S]`` probabilities that residues of a chain are in contact.

    Args:
        model: with a contact head, on the device to compute on.
        chain: that it can see (``unfit``).

    Raises:
        CapabilityError: the model has no contact head.
        NonFiniteError: it gives NaN.
    """
    (probabilities,) = contacts(model, [model.alphabet.encode(chain.sequence)], chain.name)
    return probabilities


def mean(values: Sequence[float], seed: int = 0) -> Mean:
    """Mean over chains that have a value, with a 95 % interval by bootstrap over chains.

    Args:
        values: one a chain, nan for none.
        seed: of the bootstrap.
    """
    # In their own order, so that draws mean the same however chains were listed.
    known = np.sort([value for value in values if not np.isnan(value)])
    if not len(known):
        return Mean(nan, nan, nan, 0)
    draws = np.random.default_rng(seed).integers(0, len(known), (_DRAWS, len(known)))
    low, high = np.percentile(known[draws].mean(1), _INTERVAL)
    return Mean(float(known.mean()), float(low), float(high), len(known))


def means(rows: Sequence[ChainPrecision], seed: int = 0) -> dict[str, dict[str, Mean]]:
    """By range and part; ``chance`` is what random predictions would give."""
    found: dict[str, dict[str, Mean]] = {}
    for name in RANGES:
        scores = [row.ranges[name] for row in rows]
        found[name] = {part: mean([one.precisions[part] for one in scores], seed) for part in PARTS}
        found[name]["chance"] = mean([one.contacts / one.pairs if one.pairs else nan for one in scores], seed)
    return found
