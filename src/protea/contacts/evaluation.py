"""Precision of a model on structures: the chains to measure, those to leave out, and the table of results."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Final

from protea.contacts.fitted_heads import Fitted, fitted_on
from protea.contacts.precision import PARTS, RANGES, ChainPrecision, usable
from protea.contacts.structures import Chain, read_structures
from protea.errors import UsageError
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.tables import Beside, write_table

LEFT_OUT: Final = "left out"


def select_chains(
    model: Encoder,
    structures: Iterable[Path],
    rows: list[ReportRow],
    *,
    exclude: Collection[str] = (),
    fitted: Fitted | None = None,
    reason: str = "",
    progress: Progress = SILENT,
) -> list[Chain]:
    """The chains of structures that a model is measured on.

    Args:
        model: with a contact head.
        structures: files and folders.
        rows: receives what was skipped, left out or odd.
        exclude: names of chains or files, and paths of ``contact-head.json``.
        fitted: chains that the model's head was fitted on, which are left out too.
        reason: why they are, for ``rows``.
        progress: one step a file.

    Raises:
        MissingExtraError: biotite is not installed.
        StructureError: no file holds a protein.
        UsageError: an excluded name is not that of a chain or file.
        CheckpointError: an excluded file is not a ``contact-head.json``.
    """
    model.require("contacts")
    chains, notes = read_structures(structures, progress)
    rows += notes
    names = {name for name in exclude if not name.endswith(".json")}
    if unknown := sorted(names - {name for chain in chains for name in _names(chain)}):
        raise UsageError(f"--exclude {unknown[0]}: no chain and no structure has this name")
    excluded = [fitted_on(Path(name)) for name in exclude if name not in names]
    kept = []
    for chain in chains:
        if _names(chain) & names or any(head.covers(chain) for head in excluded):
            rows.append(ReportRow(chain.name, LEFT_OUT, "--exclude"))
        elif fitted is not None and fitted.covers(chain):
            rows.append(ReportRow(chain.name, LEFT_OUT, reason))
        else:
            kept.append(chain)
    kept = usable(model, kept, rows)
    first: dict[str, str] = {}
    for chain in kept:
        if first.setdefault(chain.sequence, chain.name) != chain.name:
            rows.append(ReportRow(chain.name, "odd", f"has the sequence of {first[chain.sequence]}; both count"))
    return kept


def _names(chain: Chain) -> set[str]:
    """A chain's own name, and that of its file."""
    return {chain.name, chain.name.rpartition(":")[0] or chain.name}


def write_precisions(
    path: Path, chains: Sequence[ChainPrecision], rows: Sequence[ReportRow], settings: Mapping[str, Any]
) -> None:
    """Write a table with a row a chain, the report and the settings."""
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
    write_table(path, pa.table(columns), Beside("name\twhat\tdetail", rows, settings))
