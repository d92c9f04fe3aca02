"""Proteins to score, from FASTA files, with a report row for everything that was changed or left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from protea.alphabet import Alphabet
from protea.embed.stores import store_name
from protea.errors import FastaError, UnknownResidueError, UsageError
from protea.fasta import Record
from protea.letters import Gaps, ReportRow, Unknown, clean
from protea.records import InputColumns, read_records

_MASK: Final = "<mask>"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How proteins are read, by the options of the same names."""

    unknown: Unknown = "x"
    gaps: Gaps = "keep"
    id_column: str | None = None
    sequence_column: str | None = None

    def __post_init__(self) -> None:
        choice("--unknown", self.unknown, Unknown)
        choice("--gaps", self.gaps, Gaps)


def read_proteins(
    paths: Iterable[str | Path], alphabet: Alphabet, reading: Reading, rows: list[ReportRow]
) -> list[Record]:
    """Records whose sequences are letters of the alphabet; ids may repeat. ``rows`` receives what was changed."""
    records = []
    for record in read_records(paths, InputColumns(reading.id_column, reading.sequence_column)):
        check_no_masks(record.sequence, record.place)
        cleaned = clean(record, alphabet, reading.unknown, reading.gaps)
        rows.extend(cleaned.rows)
        if cleaned.sequence is not None:
            records.append(record._replace(sequence=cleaned.sequence))
    if not records:
        raise FastaError(f"{', '.join(map(str, paths))}: no sequence is left")
    return records


def wild_types(
    paths: Iterable[str | Path], alphabet: Alphabet, reading: Reading, rows: list[ReportRow]
) -> dict[str, str]:
    """Sequences by id, as ``read_proteins`` reads them; a ``UsageError`` if outputs would name two of them alike."""
    sequences: dict[str, str] = {}
    names: set[str] = set()
    for record in read_proteins(paths, alphabet, reading, rows):
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


AS_USUAL: Final = Reading()
