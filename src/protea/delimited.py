"""The rows of text tables: CSV and TSV, as the programs write them that people have.

The cells are separated by commas, tabs or semicolons, or as Excel's first line ``sep=;`` says. The text is UTF-8 or,
with a byte order mark, UTF-16. Lines that begin with ``#`` are comments above the header; below it, if they have not as
many cells as the header or if a blank follows the ``#``. A header may begin with ``#`` too if it has the name of a
column that the reader looks for.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

from protea.errors import DataError, FastaError
from protea.fasta import DAMAGED, damaged, disguise, opened
from protea.text import counted

_Start = tuple[str, list[str], int]
"""The delimiter, the lines read from the header on, and the number of lines above."""

_SIGNS: Final = (",", "\t", ";")
_EXCEL: Final = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*$', re.IGNORECASE)
_MARK: Final = re.compile(r'#+ *(?=[\w"])')  # of a header that is written as a comment
_LONGEST_CELL: Final = 10**8  # in letters; beyond, there is rather a quotation mark that nobody closed


def folded(name: str) -> str:
    """A column's name in lower case, with ``_`` for blanks and signs, and without blanks around it."""
    return re.sub(r"[\W_]+", "_", name.strip().lower())


def find_column(columns: Sequence[str], names: Sequence[str], place: str) -> str | None:
    """The column with the first of some names, exactly or else as ``folded``; a ``DataError`` if two have it."""
    for form in (str, folded):
        for name in names:
            fitting = [column for column in columns if form(column) == form(name)]
            if len(fitting) > 1:
                raise DataError(f"{place}: two columns may be {name}: {fitting[0]!r} and {fitting[1]!r}; rename one")
            if fitting:
                return fitting[0]
    return None


def text_rows(
    path: str | Path, usual: str, known: Container[str] = (), notes: list[str] | None = None, *, any_bytes: bool = False
) -> Iterator[list[str]]:
    """Yield the header, then the rows, each with as many cells as the header.

    ``usual`` is the delimiter if the first lines leave a choice, ``known`` has the names, ``folded``, of columns that
    the caller looks for. ``notes`` receives a sentence if comments below the header were left out. With ``any_bytes``,
    bytes that are not UTF-8 become surrogates instead of an error.

    Raises:
        FastaError: the file cannot be read, or is no such table.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    try:
        with opened(path, utf16=True) as stream, _decoded(stream, path, any_bytes=any_bytes) as text:
            yield from _rows(text, _start(text, usual, known), str(path), notes)
    except DAMAGED as error:
        raise damaged(str(path), error) from error
    except UnicodeDecodeError as error:
        raise FastaError(f"{path}: cannot be read: {error}; save it as UTF-8") from error


def _decoded(stream: BinaryIO, path: str | Path, *, any_bytes: bool) -> TextIOWrapper:
    head = stream.peek(64)  # type: ignore[attr-defined]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return TextIOWrapper(stream, encoding="utf-16", newline="")
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b">"):
        raise FastaError(f"{path}: is FASTA, not a table; give it a name that ends in .fasta")
    if reason := disguise(head):  # of a compressed file
        raise FastaError(f"{path}: {reason}")
    return TextIOWrapper(stream, "utf-8-sig", "surrogateescape" if any_bytes else "strict", newline="")


def _start(text: Iterable[str], usual: str, known: Container[str]) -> _Start:
    """The table as far as it must be read to know its header and its delimiter.

    The header is the first line that is no comment, or a comment above it that names a known column.
    """
    lines: list[str] = []
    plain, comments = list[int](), list[int]()
    signs = tuple(dict.fromkeys((usual, *_SIGNS)))
    for place, line in enumerate(text):
        lines.append(line)
        if not plain and (match := _EXCEL.match(line)):
            signs = (match[1],)
        elif line.startswith("#"):
            comments += [] if plain else [place]
        elif line.strip():
            plain.append(place)
            if len(plain) == 2:
                break
    # The beginning of a cell that goes on in the next line tells nothing.
    rows = [*(lines[place] if lines[place].count('"') % 2 == 0 else "" for place in plain), "", ""]
    choices = [(place, lines[place], rows[1]) for place in plain[:1]]
    choices += [(place, _MARK.sub("", lines[place], count=1), rows[0]) for place in reversed(comments)]
    starts: list[_Start] = []
    for place, header, row in choices:
        found, several, equal, _, sign = max((*_fit(header, row, sign, known), sign == usual, sign) for sign in signs)
        starts.append((sign, [header, *lines[place + 1 :]], place))
        if found and (place in plain or not row or (equal and (several or usual not in row))):
            return starts[-1]
    return starts[0] if plain else (usual, [], 0)


def _fit(header: str, row: str, sign: str, known: Container[str]) -> tuple[int, bool, bool]:
    """How well a delimiter fits: how many columns are known, whether there are several, and as many as cells."""
    names, cells = (next(csv.reader([line], delimiter=sign), []) for line in (header, row))
    return sum(folded(name) in known for name in names), len(names) > 1, len(names) == len(cells)


def _rows(text: Iterable[str], start: _Start, name: str, notes: list[str] | None) -> Iterator[list[str]]:
    delimiter, lines, above = start
    reader = csv.reader(chain(lines, text), delimiter=delimiter, strict=True)
    width = blank = comments = line = 0
    try:
        for row in reader:
            in_one_line, line = reader.line_num == line + 1, reader.line_num
            if not row:
                blank += width == 1  # an empty line is a row then, except at the end
            elif width and in_one_line and _is_comment(row, width):
                comments += 1
            elif width and len(row) != width:
                cells = f"{counted(len(row), 'cell')}, but the header has {width}"
                raise FastaError(f"{name}, line {above + line}: {cells}; correct the row")
            else:
                yield from [[""]] * blank
                yield row
                width, blank = width or len(row), 0
    except csv.Error as error:
        raise FastaError(f"{name}, line {above + reader.line_num}: not a table of this kind: {error}") from error
    if not width:
        raise FastaError(f"{name}: has no header; the file is empty, or all of it is comments")
    if comments and notes is not None:
        notes.append(f"{name}: left out {counted(comments, 'comment')} below the header (lines that begin with #)")


def _is_comment(row: Sequence[str], width: int) -> bool:
    return row[0].startswith("#") and (len(row) != width or row == ["#"] or row[0][1:2].isspace())
