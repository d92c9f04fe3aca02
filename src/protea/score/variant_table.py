"""Tables of variants: which column means what, which rows can be scored, and what is wrong with the others.

A table is CSV, TSV (both perhaps compressed) or Parquet. Columns that are understood, as ProteinGym names them:

    mutant            a variant as ``variants.py`` reads it, or, of letters alone, the whole sequence, as in
                      ProteinGym's insertions and deletions; also ``mutants``, ``mutation``, ``mutations``, ``variant``
    mutated_sequence  the whole sequence; alone, it is compared with the wild type, beside ``mutant`` it is checked
    id                which protein, where there are several; also ``protein``

All columns are kept as they are; those of text files as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from protea.alphabet import Alphabet
from protea.errors import DataError, UsageError, VariantError
from protea.models.encoder import Encoder
from protea.score.effects import Protein, Scoring, score
from protea.score.expected import Advance
from protea.score.records import GAPS
from protea.score.variants import Variant, check, difference, explaining_offset, parse, single_substitutions
from protea.tables import DELIMITERS, compression, kind_of

if TYPE_CHECKING:
    import pyarrow as pa

_VARIANT: Final = ("mutant", "mutants", "mutation", "mutations", "variant")
_PROTEIN: Final = ("id", "protein")
_SEQUENCE: Final = "mutated_sequence"


class Problem(NamedTuple):
    """A row that cannot be scored.

    Attributes:
        row: from 1, the header not counted.
        variant: as it stands there.
        reason: why.
    """

    row: int
    variant: str
    reason: str


@dataclass
class Rows:
    """The rows of a table, by protein.

    Attributes:
        table: as it was read.
        proteins: those that have rows, with their variants.
        places: of each variant of each protein, its row from 0.
        problems: the other rows.
        advice: what would explain many of them.
    """

    table: pa.Table
    proteins: list[Protein] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def read_table(path: Path) -> pa.Table:
    """A table of variants.

    Raises:
        UsageError: the suffix names no format.
        DataError: it cannot be read, is empty, or has no column of variants.
    """
    import pyarrow as pa
    from pyarrow import parquet

    kind = kind_of(path)
    try:
        with path.open("rb") as file:
            table = (
                parquet.ParquetFile(file).read(use_threads=False)
                if kind == "parquet"
                else _read_text(file, path, DELIMITERS[kind])
            )
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read: {reason}") from error
    if not {*_VARIANT, _SEQUENCE} & set(table.column_names):
        raise DataError(
            f"{path}: no column is named {', '.join(_VARIANT)} or {_SEQUENCE}; it has {', '.join(table.column_names)}"
        )
    understood = [name for name in table.column_names if name in {*_VARIANT, *_PROTEIN, _SEQUENCE}]
    if doubled := [name for name, count in Counter(understood).items() if count > 1]:
        raise DataError(f"{path}: two columns are named {doubled[0]}; rename one")
    if not table.num_rows:
        raise DataError(f"{path}: has no rows")
    return table


def _read_text(file: BinaryIO, path: Path, delimiter: str) -> pa.Table:
    """All cells as text, so that what is written is what was read."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    content = pa.input_stream(file, compression=compression(path)).read()
    # Arrow's threads, if an error ends the program while they are at work, abort it.
    reading = arrow_csv.ReadOptions(use_threads=False)
    parsing = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # Read for its names alone, half a second a million rows: Arrow's means of reading less start threads, or fail on
    # tables without rows.
    names = arrow_csv.read_csv(pa.BufferReader(content), read_options=reading, parse_options=parsing).column_names
    if len(names) == 1:
        # An empty line is a row here, if not at the end.
        content = content.strip() + b"\n"
        parsing.ignore_empty_lines = False
    types = arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return arrow_csv.read_csv(
        pa.BufferReader(content), read_options=reading, parse_options=parsing, convert_options=types
    )


def variant_table(variants: Sequence[str]) -> pa.Table:
    """A table of variants that were typed.

    Raises:
        UsageError: one is empty, or no text.
    """
    import pyarrow as pa

    for name in variants:
        if not name.strip():
            raise UsageError(f"--variants {','.join(variants)!r}: names no variant; write A24V,A24V:G30S")
        check_text("--variants", name)
    return pa.table({"mutant": list(variants)})


def scan_table(wild_types: Mapping[str, str], offset: int) -> pa.Table:
    """Every residue of some proteins replaced by each of the other 19 amino acids; gaps are passed over."""
    import pyarrow as pa

    cells = [
        (name, place + offset, sequence[place], new, f"{sequence[place]}{place + offset}{new}")
        for name, sequence in wild_types.items()
        for place, new in single_substitutions(sequence)
    ]
    names = ("id", "position", "wild_type", "letter", "mutant")
    return pa.table({name: [cell[i] for cell in cells] for i, name in enumerate(names)})


def rows_of(table: pa.Table, wild_types: Mapping[str, str], alphabet: Alphabet, how: Scoring) -> Rows:
    """Which variants of which proteins a table holds.

    Args:
        table: of ``read_table``, or with its columns.
        wild_types: sequences by name.
        alphabet: of the model.
        how: they will be scored.

    Raises:
        DataError: there are several proteins, and no column says which one is meant.
    """
    offset = how.offset
    columns = set(table.column_names)
    texts = _column(table, next((name for name in _VARIANT if name in columns), None))
    mutated = _column(table, _SEQUENCE if _SEQUENCE in columns else None)
    named = _owners(table, wild_types)
    owners = _column(table, named)
    only = next(iter(wild_types)) if named is None else None
    found = Rows(table)
    parsed: dict[str, list[Variant]] = {name: [] for name in wild_types}
    good: dict[str, list[tuple[int, Variant]]] = {name: [] for name in wild_types}
    for row in range(table.num_rows):
        text, sequence, owner = texts[row], mutated[row], only or str(owners[row])
        try:
            if owner not in wild_types:
                raise VariantError(f"{owner!r} is none of the proteins")
            variant = _variant(text, sequence, wild_types[owner], offset)
            parsed[owner].append(variant)
            check(variant, wild_types[owner], alphabet, offset)
            how.check(variant)
            if text and sequence and variant.apply(wild_types[owner]) != sequence:
                raise VariantError(f"{text}: {_SEQUENCE} is not the wild type with that change")
            good[owner].append((row, variant))
        except VariantError as error:
            found.problems.append(Problem(row + 1, str(text or sequence or ""), str(error)))
    for name, variants in good.items():
        if variants:
            found.proteins.append(Protein(name, wild_types[name], [variant for _, variant in variants]))
            found.places.append([row for row, _ in variants])
        if len(variants) < len(parsed[name]):
            shift = explaining_offset(parsed[name], wild_types[name], offset)
            if shift is not None:
                found.advice.append(
                    f"{name}: all {len(parsed[name]):,} variants would fit if residues were counted from {shift}: "
                    f"--offset {shift}"
                )
    return found


def _owners(table: pa.Table, wild_types: Mapping[str, str]) -> str | None:
    """The column that says which protein a row is of; none where there is one protein, which no column names."""
    columns = [name for name in _PROTEIN if name in table.column_names]
    naming = [name for name in columns if not wild_types.keys().isdisjoint(map(str, _column(table, name)))]
    if naming or len(wild_types) == 1:
        return next(iter(naming), None)
    if not columns:
        raise DataError(
            f"there are {len(wild_types)} proteins, and nothing says which is meant; give a table with a column "
            f"{' or '.join(_PROTEIN)}, or one protein"
        )
    return columns[0]


def scores_of(model: Encoder, rows: Rows, how: Scoring, advance: Advance) -> list[float | None]:
    """A score for each row of a table, ``None`` where there can be none."""
    values: list[float | None] = [None] * rows.table.num_rows
    for places, scores in zip(rows.places, score(model, rows.proteins, how, advance), strict=True):
        for place, value in zip(places, scores.tolist(), strict=True):
            values[place] = value
    return values


def check_columns(table: pa.Table, column: str, models: Sequence[str]) -> None:
    """See that scores can be added to a table, before they are computed.

    Raises:
        UsageError: it has a column of that name, or that is no name.
    """
    if not column.strip():
        raise UsageError(f"--column {column!r}: is no name")
    check_text("--column", column)
    for name in _score_columns(column, models):
        if name in table.column_names:
            raise UsageError(f"the table has a column {name!r}; choose another name for the scores: --column NAME")


def check_text(option: str, text: str) -> None:
    """See that what was typed can be written into a table.

    Raises:
        UsageError: it holds bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option} {text.encode(errors='replace').decode()}: holds bytes that are no UTF-8") from error


def with_scores(table: pa.Table, column: str, scores: Mapping[str, Sequence[float | None]]) -> pa.Table:
    """A table with its scores, under names that are free; of several models their mean, and then each."""
    import pyarrow as pa

    each = list(scores.values())
    mean = [None if None in row else sum(row) / len(row) for row in zip(*each, strict=True)]
    for name, values in zip(_score_columns(column, list(scores)), [mean, *each], strict=False):
        table = table.append_column(name, pa.array(values, pa.float64()))
    return table


def _score_columns(column: str, models: Sequence[str]) -> list[str]:
    return [column, *(f"{column} {name}" for name in models if len(models) > 1)]


def _column(table: pa.Table, name: str | None) -> list[Any]:
    return [None] * table.num_rows if name is None else table.column(name).to_pylist()


def _variant(text: Any, mutated: Any, wild: str, offset: int) -> Variant:
    if text and not str(text).isalpha():
        return parse(str(text), offset)
    whole = str(text or mutated or "")
    if not whole:
        raise VariantError("names no variant")
    for gap in GAPS:
        if gap in whole and gap not in wild:
            raise VariantError(f"a mutated sequence with a gap, {gap!r} at {whole.index(gap) + 1}; leave gaps out")
    if whole != whole.upper():
        raise VariantError("a mutated sequence in lower case; write it in upper case")
    # Tables say WT, NA or DEL of rows that are no variants; half a protein and more is deleted by numbers.
    if 2 * len(whole) < len(wild):
        raise VariantError(
            f"{whole}: no variant, and as a whole sequence too short: {len(whole)} residues of {len(wild)}; a large "
            "deletion is written A4_K30del"
        )
    return difference(wild, whole, offset)
