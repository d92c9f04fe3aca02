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
    """Write a table with a row a chain, the report and the settings.

    Raises:
        OutputError: the table cannot be written.
    """
    import pyarrow as pa

    # A table without rows has these columns too.
    columns = {"name": pa.string(), "residues": pa.int64(), "resolved": pa.int64()}
    for name in RANGES:
        columns |= {f"{name}_pairs": pa.int64(), f"{name}_contacts": pa.int64()}
        columns |= {f"{name}_{part}": pa.float64() for part in PARTS}
    table = pa.Table.from_pylist([_cells(chain) for chain in chains], schema=pa.schema(list(columns.items())))
    write_table(path, table, Beside("name\twhat\tdetail", rows, settings))


def _cells(chain: ChainPrecision) -> dict[str, object]:
    cells: dict[str, object] = {"name": chain.name, "residues": chain.residues, "resolved": chain.resolved}
    for name, result in chain.ranges.items():
        cells |= {f"{name}_pairs": result.pairs, f"{name}_contacts": result.contacts}
        for part, value in result.precisions.items():
            cells[f"{name}_{part}"] = None if isnan(value) else round(value, 6)
    return cells
