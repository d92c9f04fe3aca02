"""Proteins to score, from FASTA files, with a report row for everything that was changed or left out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, get_args

from protea.alphabet import Alphabet
from protea.embed.stores import store_name
from protea.errors import FastaError, UnknownResidueError, UsageError
from protea.fasta import Record, read_fasta
from protea.letters import ReportRow, Unknown, clean

GAPS: Final = "-."
_MASK: Final = "<mask>"


def read_proteins(paths: Iterable[str | Path], alphabet: Alphabet, unknown: str, rows: list[ReportRow]) -> list[Record]:
    """Records whose sequences are letters of the alphabet; ids may repeat. ``rows`` receives what was changed."""
    policy: Unknown = choice("--unknown", unknown, Unknown)
    records = []
    for record in read_fasta(paths):
        check_no_masks(record.sequence, record.place)
        sequence, row, _ = clean(record, alphabet, policy)
        if row is not None:
            rows.append(row)
        if sequence is not None:
            records.append(record._replace(sequence=sequence))
            if gaps := sum(sequence.count(gap) for gap in GAPS):
                rows.append(ReportRow(record.id, "odd", f"{gaps:,} gaps, which count as residues"))
    if not records:
        raise FastaError(f"{', '.join(map(str, paths))}: no sequence is left")
    return records


def wild_types(paths: Iterable[str | Path], alphabet: Alphabet, unknown: str, rows: list[ReportRow]) -> dict[str, str]:
    """Sequences by id, as ``read_proteins`` reads them; a ``UsageError`` if two would have the same name in outputs."""
    sequences: dict[str, str] = {}
    names: set[str] = set()
    for record in read_proteins(paths, alphabet, unknown, rows):
        if store_name(record.id) in names:
            raise UsageError(f"{record.place}: this id was used before; give each record its own")
        names.add(store_name(record.id))
        sequences[record.id] = record.sequence
    return sequences


def check_no_masks(sequence: str, place: str) -> None:
    """Refuse a masked position: scores compare what a model expects with the residue that is there."""
    if _MASK in sequence:
        raise UnknownResidueError(
            f"{place}: {_MASK} at position {sequence.index(_MASK) + 1}; scoring needs the residue there"
        )


def choice(option: str, value: str, choices: Any) -> Any:
    """The value of an option, which must be one of the choices of a ``Literal``."""
    if value not in get_args(choices):
        raise UsageError(f"{option} {value!r}: use one of {', '.join(get_args(choices))}")
    return value
