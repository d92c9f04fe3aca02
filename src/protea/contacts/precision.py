"""Precision of predicted contacts (Rao et al. 2020): how many of the L most probable pairs are in contact.

Chains that a contact head was fitted on are left out: ``contact-head.json`` beside a model lists them.

    range    long: 24 or more apart; medium: 12 to 23; short: 6 to 11
    P@L      the share of contacts among the L most probable pairs of a range; P@L/2 and P@L/5 likewise
    L        residues of the chain that have coordinates; L/2 and L/5 are rounded down, but are at least 1

As in Meta's ``compute_precisions``, the share is of L even where a range has fewer than L pairs. Where equally probable
pairs compete for the last places, the expected share of a random draw among them counts; sorting would choose by
chance. A chain without any pair in a range has no precision there and does not count in the mean.

Shapes: P pairs, C chains, S residues of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.checkpoints.settings_files import read_json
from protea.contacts.predict import contacts, too_long
from protea.contacts.structures import Chain, pairs, read_structures
from protea.errors import ArgumentError, CheckpointError, UnknownResidueError
from protea.infer.runner import FloatArray
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.rerun import failed
from protea.tables import Beside, write_table

RANGES: Final[Mapping[str, tuple[int, float]]] = {"long": (24, np.inf), "medium": (12, 24), "short": (6, 12)}
"""Separations from the first number to below the second."""

PARTS: Final[Mapping[str, int]] = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}  # divisors of L
_DRAWS: Final = 2000


class RangeScore(NamedTuple):
    """Number of pairs in a range, how many of them are in contact, and precisions by ``PARTS``; nan without pairs."""

    pairs: int
    contacts: int
    precisions: dict[str, float]


class ChainPrecision(NamedTuple):
    """Precision of a chain: residues that the model saw, residues with coordinates (L), and scores by ``RANGES``."""

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
    """Precision of a chain, from the probabilities ``[S, S]`` of contacts between the residues of its sequence."""
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
        try:
            model.alphabet.encode(chain.sequence)
            reason = too_long(model, len(chain.sequence))
        except UnknownResidueError as error:
            reason = str(error)
        if reason is None:
            kept.append(chain)
        else:
            rows.append(ReportRow(chain.name, "skipped", reason))
    return kept


def fitted_on(path: Path) -> frozenset[str]:
    """Names and sequences of the chains in a ``contact-head.json``; names alone may differ between files."""
    try:
        chains = read_json(path)["structures"]
        return frozenset(str(chain[key]) for chain in chains for key in ("name", "sequence"))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: does not say what a contact head was fitted on; remove it, or fit the head again"
        ) from error


def select_chains(
    model: Encoder,
    structures: Iterable[Path],
    rows: list[ReportRow],
    *,
    exclude: Collection[str] = (),
    fitted: Collection[str] = (),
    reason: str = "",
    progress: Progress = SILENT,
) -> list[Chain]:
    """The chains of files and folders that a model is measured on; ``rows`` receives what was skipped or is odd.

    ``exclude`` holds names of chains or files, and paths of ``contact-head.json``. ``fitted``, from ``fitted_on``, are
    left out too, for the ``reason`` that the rows state.
    """
    model.require("contacts")
    chains, notes = read_structures(structures, progress)
    rows += notes
    names = {name for name in exclude if not name.endswith(".json")}
    files = {chain.name: chain.name.rpartition(":")[0] or chain.name for chain in chains}
    if unknown := sorted(names - files.keys() - set(files.values())):
        raise ArgumentError(f"exclude={unknown[0]}: no chain and no structure has this name")
    excluded = frozenset().union(*(fitted_on(Path(name)) for name in exclude if name not in names))
    kept = []
    for chain in chains:
        own = {chain.name, chain.sequence}
        if not names.isdisjoint((chain.name, files[chain.name])) or own & excluded:
            rows.append(ReportRow(chain.name, "left out", "--exclude"))
        elif not own.isdisjoint(fitted):
            rows.append(ReportRow(chain.name, "left out", reason))
        else:
            kept.append(chain)
    kept = usable(model, kept, rows)
    first: dict[str, str] = {}
    for chain in kept:
        if first.setdefault(chain.sequence, chain.name) != chain.name:
            rows.append(ReportRow(chain.name, "odd", f"has the sequence of {first[chain.sequence]}; both count"))
    return kept


def measure(
    model: Encoder,
    chains: Sequence[Chain],
    draw: Callable[[Chain, FloatArray], None] = lambda chain, probabilities: None,
    progress: Progress = SILENT,
) -> list[ChainPrecision]:
    """Precision of a model on ``usable`` chains; ``draw`` receives a chain and its probabilities."""
    scores = []
    progress.begin("precision", len(chains))
    for chain in chains:
        probabilities = contacts(model, model.alphabet.encode(chain.sequence), chain.name)
        scores.append(score(chain, probabilities))
        draw(chain, probabilities)
        progress.advance()
    return scores


def mean(values: Sequence[float], seed: int = 0) -> Mean:
    """Mean over the chains that are not nan, and its 95 % interval from a bootstrap over chains with ``seed``."""
    # Sorted, so that the interval does not depend on the order of the chains.
    known = np.sort([value for value in values if not np.isnan(value)])
    if not len(known):
        return Mean(nan, nan, nan, 0)
    draws = np.random.default_rng(seed).integers(0, len(known), (_DRAWS, len(known)))
    low, high = np.percentile(known[draws].mean(1), (2.5, 97.5))
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


def shown(chains: Sequence[ChainPrecision], seed: int = 0) -> dict[str, Any]:
    """Precisions and their means as plain values."""
    every = [
        {**chain._asdict(), "ranges": {name: score._asdict() for name, score in chain.ranges.items()}}
        for chain in chains
    ]
    averages = {name: {part: one._asdict() for part, one in by.items()} for name, by in means(chains, seed).items()}
    return {"chains": every, "means": averages}


def write_precisions(
    path: Path, chains: Sequence[ChainPrecision], rows: Sequence[ReportRow], settings: Mapping[str, Any]
) -> None:
    """Write a table with one row for each chain, the report and the settings."""
    import pyarrow as pa

    columns = {
        "name": pa.array([chain.name for chain in chains], pa.string()),
        "residues": pa.array([chain.residues for chain in chains], pa.int64()),
        "resolved": pa.array([chain.resolved for chain in chains], pa.int64()),
    }
    for name in RANGES:
        results = [chain.ranges[name] for chain in chains]
        columns[f"{name}_pairs"] = pa.array([result.pairs for result in results], pa.int64())
        columns[f"{name}_contacts"] = pa.array([result.contacts for result in results], pa.int64())
        for part in PARTS:
            values = [result.precisions[part] for result in results]
            cells = [None if isnan(value) else round(value, 6) for value in values]
            columns[f"{name}_{part}"] = pa.array(cells, pa.float64())
    write_table(path, pa.table(columns), Beside("name\twhat\tdetail", rows, {**settings, **failed(rows)}))
