"""Reads records from FASTA files, plain or compressed (gz, bz2, xz, zst), and from standard input.

Keeps a few megabytes in memory, or one record if it is larger. Passes on every byte between the line breaks; the
encoder decides what the byte means.
"""

from __future__ import annotations

import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from xopen import xopen

from protea.errors import DamagedFileError, FastaError

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError
else:
    from backports.zstd import ZstdError

STDIN: Final = "-"

_BLOCK: Final = 1 << 22
_CHUNK: Final = 1 << 13
_CONTROL: Final = bytes(code for code in (*range(32), 127) if code != ord("\n"))
_BOM: Final = b"\xef\xbb\xbf"
_REASONS: Final[dict[type[OSError], str]] = {
    FileNotFoundError: "no such file",
    IsADirectoryError: "is a folder; name the files in it",
    PermissionError: "permission denied; make the file readable",
}
_HEAD: Final = 64
_MARKED: Final = rb"\xff\xfe|\xfe\xff"
_UTF16: Final = "text, as PowerShell's > writes it; convert it: iconv -f {0} -t UTF-8 IN > OUT"
_DISGUISES: Final = {
    rb"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch the file: git lfs pull",
    rb"\s*<[!?a-zA-Z]": "is a web page (HTML or XML), not the file itself; download the file behind the page",
    _MARKED: f"is UTF-16 {_UTF16.format('UTF-16')}",
    rb".\0[^\0]\0": f"is UTF-16 {_UTF16.format('UTF-16LE')}",
    rb"\0[^\0]\0.": f"is UTF-16 {_UTF16.format('UTF-16BE')}",
    rb"PK\x03\x04": "is a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV",
    rb"%PDF-": "is a PDF; save the sequences as text",
}
"""What a file is instead of what its name says, by its first bytes, and what to do."""

_HINTS: Final = {
    "@": "FASTQ? convert it to FASTA first",
    "LOCUS |ID   ": "GenBank or UniProt text? download the sequences as FASTA",
    "(HEADER|ATOM|TITLE|REMARK|CRYST1) |data_": "a structure? download its sequences as FASTA",
    "CLUSTAL|# STOCKHOLM": "an alignment? save it as FASTA",
}
"""Guesses what a file is that does not begin with '>', by the beginning of its first line, and says what to do."""


def _decoder_error(module: str) -> type[Exception]:
    """The exception of a decoder that xopen prefers for gzip where it is installed."""
    try:
        error: type[Exception] = import_module(module).error
    except ImportError:
        return zlib.error
    return error


DAMAGED: Final = (
    *(EOFError, OSError, lzma.LZMAError, ZstdError),
    *(zlib.error, _decoder_error("isal.isal_zlib"), _decoder_error("zlib_ng.zlib_ng")),
)
"""Exceptions that decompressors raise for data that are cut short or damaged."""


class Record(NamedTuple):
    """One FASTA record.

    Attributes:
        id: the first word of the header.
        description: the rest of the header.
        sequence: the residues as in the file, without line breaks; may be empty. A byte beyond ASCII becomes the
            Latin-1 letter of its value.
        place: file, line and id, for messages.
    """

    id: str
    description: str
    sequence: str
    place: str


def read_fasta(paths: Iterable[str | Path]) -> Iterator[Record]:
    """Yield the records of several files in order; ``-`` is standard input.

    A ``DamagedFileError`` comes after the records before the damage.
    """
    for block in read_blocks(paths, streaming=True):
        yield from block.records()


@dataclass(frozen=True)
class Block:
    """Complete records as the bytes of the file ``name``, from line ``line`` on; the last line has no line break."""

    data: bytes
    name: str
    line: int
    consumed: int = 0  # bytes of the file, compressed or not, that were read for it; 0 if nobody can say

    @property
    def plain(self) -> bool:
        """Whether the block needs no special treatment: ASCII, no control characters, no blanks at the ends of lines.

        A line break and ``>`` then separate the records, each header ends at the first line break, and only line
        breaks have to be removed from the residues.
        """
        data = self.data
        return (
            data.startswith(b">")
            and data.isascii()
            and len(data.translate(None, _CONTROL)) == len(data)
            and not (b" \n" in data or b"\n " in data or data.endswith(b" "))
        )

    def records(self) -> Iterator[Record]:
        """The records in order."""
        header: bytes | None = None
        header_line = 0
        residues: list[bytes] = []
        for number, line in enumerate(_lines(self.data), start=self.line):
            if line[:1] == b">":
                if header is not None:
                    yield _record(header, residues, self.name, header_line)
                header, header_line, residues = line, number, []
            elif header is not None:
                residues.append(line)
            elif line:
                raise FastaError(
                    f"{self.name}, line {number}: not FASTA: expected '>' and a header, found {_excerpt(line)}"
                )
        if header is None:
            raise FastaError(f"{self.name}: no records; the file is empty")
        yield _record(header, residues, self.name, header_line)


def read_blocks(paths: Iterable[str | Path], *, streaming: bool = False) -> Iterator[Block]:
    """Yield the records thousands at a time, or with ``streaming`` as soon as a pipe has them.

    A line that is not FASTA is an error when the records of its block are read.
    """
    least = 1 if streaming else _BLOCK
    for path in paths:
        with opened(path) as stream:
            before = 0
            for block in _blocks(stream, "standard input" if str(path) == STDIN else str(path), least):
                here = place_in(stream)
                yield replace(block, consumed=here - before)
                before = here


def place_in(stream: BinaryIO) -> int:
    """How many bytes of the file behind an input were read; 0 if it is none."""
    try:
        return os.lseek(stream.fileno(), 0, os.SEEK_CUR)
    except OSError:
        return 0


def size_of(paths: Iterable[str | Path]) -> int | None:
    """The bytes of some inputs together; ``None`` if one is no file."""
    paths = list(paths)
    return sum(map(os.path.getsize, paths)) if all(map(os.path.isfile, paths)) else None


def opened(path: str | Path, *, utf16: bool = False) -> BinaryIO:
    """An input, decompressed by suffix or content, or a ``FastaError``; ``utf16`` admits UTF-16 with its mark."""
    if str(path) == STDIN and sys.stdin is None:
        raise FastaError("standard input is closed; name a file, or pipe the records in")
    try:
        if os.path.isfile(path):
            with Path(path).open("rb") as file:
                if reason := disguise(file.read(_HEAD), utf16=utf16):
                    raise FastaError(f"{path}: {reason}")
        return xopen(path, "rb", threads=0)
    except OSError as error:
        reason = _REASONS.get(type(error), f"cannot be opened: {error.strerror or error}")
        raise FastaError(f"{path}: {reason}") from error


def disguise(data: bytes, *, utf16: bool = False) -> str | None:
    """What a file with these first bytes is instead of text, and what to do; ``None`` if that is unknown."""
    heads = [head for head in _DISGUISES if re.match(head, data[:_HEAD], re.DOTALL) and not (utf16 and head == _MARKED)]
    return _DISGUISES[heads[0]] if heads else None


def damaged(name: str, error: Exception) -> DamagedFileError:
    """The error for an input whose decompressor raised one of ``DAMAGED``."""
    reason = "it is cut short, damaged, or not compressed as its name says"
    return DamagedFileError(f"{name}: cannot be read to its end; {reason} ({error})")


def flows(path: str) -> bool:
    """Whether an input can be read only once: standard input or a pipe."""
    # os.path accepts any path without an error; reading it later reports what is wrong.
    return path == STDIN or not (not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path))


def _blocks(stream: BinaryIO, name: str, least: int) -> Iterator[Block]:
    """Cut the file before lines that start with ``>``."""
    rest, line = b"", 1
    damage: DamagedFileError | None = None
    while damage is None:
        parts, size = [rest], 0
        try:
            # read() would lose the last good bytes of a damaged file; read1() returns them.
            # A record longer than a block is read in steps that double.
            while size < max(least, len(rest)) and (chunk := stream.read1(min(_BLOCK, _CHUNK))):  # type: ignore[attr-defined]
                parts.append(chunk)
                size += len(chunk)
        except DAMAGED as error:
            damage = damaged(name, error)
            damage.__cause__ = error
        data = b"".join(parts)
        if line == 1:
            data = data.removeprefix(_BOM)
            if reason := disguise(data):
                raise FastaError(f"{name}: {reason}")
        cut = data.rfind(b"\n>") if size or damage else len(data)
        if cut > 0 and (not size or data[:cut].strip()):
            block, rest = data[:cut], data[cut + 1 :]
            yield Block(block.removesuffix(b"\n") if cut == len(data) else block, name, line)
            line += sum(1 for _ in _lines(block + b"\n")) if b"\r" in block else block.count(b"\n") + 1
        else:
            rest = data
        if not size and damage is None:
            if line == 1:
                yield Block(b"", name, 1)
            return
    raise damage


def _record(header: bytes, residues: list[bytes], name: str, line: int) -> Record:
    text = _decode(header[1:])
    words = text.split(maxsplit=1)
    sequence = b"".join(residues)
    if not words:
        raise FastaError(f"{name}, line {line}: a record without an id; write one after '>'")
    place = f"{name}, line {line}, record {words[0]!r}"
    if "\0" in text:
        raise FastaError(f"{place}: the header holds a NUL byte; remove it")
    return Record(words[0], words[1].strip() if len(words) > 1 else "", sequence.decode("latin-1"), place)


def _lines(data: bytes) -> Iterator[bytes]:
    """Stripped lines; they may end in LF, CRLF, or in the CR alone of old Macintosh files."""
    for raw in BytesIO(data):
        line = raw.strip()
        if b"\r" in line:
            yield from map(bytes.strip, line.split(b"\r"))
        else:
            yield line


def _decode(header: bytes) -> str:
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        return header.decode("latin-1")


def _excerpt(line: bytes) -> str:
    text = _decode(line)
    shown = repr(text[:40] + ("…" if len(text) > 40 else ""))
    if hint := next((hint for start, hint in _HINTS.items() if re.match(start, text)), None):
        return f"{shown} ({hint})"
    return f"{shown} (a table? give it as a .csv or .tsv file)" if "," in text or "\t" in text else shown
