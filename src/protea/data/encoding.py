"""Records into tables of token ids, thousands at a time, with a count and a line of the report for all that changed.

Letters are treated as ``protea embed`` treats them: lower case is raised, blanks and a stop at the end are removed,
what stands for a residue but is not in the alphabet becomes X, and anything else is damage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.token_table import BATCH_BYTES, Keys, TableWriter, TokenRows, keys_of
from protea.errors import DataError, FastaError, UnknownResidueError
from protea.fasta import Block, Record

Unknown = Literal["x", "error", "skip"]
"""A residue outside the alphabet: it becomes X, is an error, or its record is left out."""

Advance = Callable[[int], None]
"""Called with a number of residues done."""

_INVALID: Final = 255
_END: Final = 254
_REPLACEABLE: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ*-.")
_BLANK: Final = re.compile(r"[ \t\v\f]+")
_RAISED: Final = {ord(letter): letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"}
_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class RecordFilter:
    """Which records are taken, and how.

    Attributes:
        unknown: what becomes of residues outside the alphabet.
        min_length: residues a sequence must have, at least 1.
        max_length: residues a sequence may have.
        leave_out: a regular expression; records whose header it matches are left out.
    """

    unknown: Unknown = "x"
    min_length: int = 1
    max_length: int | None = None
    leave_out: str | None = None


@dataclass
class Counts:
    """What a reading came to; every record is in exactly one of ``kept`` and those after ``altered_letters``."""

    records: int = 0
    kept: int = 0
    residues: int = 0
    altered_records: int = 0
    altered_letters: int = 0
    skipped_empty: int = 0
    skipped_unknown: int = 0
    skipped_short: int = 0
    skipped_long: int = 0
    skipped_by_header: int = 0


class Reader:
    """Reads records into tables.

    Args:
        alphabet: of the tokens.
        policies: what to take.
        report: gets a line for each record altered or left out.
        advance: told of progress.
    """

    def __init__(self, alphabet: Alphabet, policies: RecordFilter, report: Path, advance: Advance) -> None:
        self.counts = Counts()
        self._policies = policies
        self._alphabet = alphabet
        table = bytearray([_INVALID] * 256)
        for letter in alphabet.residues:
            table[ord(letter)] = int(alphabet.encode(letter)[0])
        self._to_id = bytes(table)
        table[ord(">")] = _END
        self._with_ends = bytes(table)
        self._pattern = re.compile(policies.leave_out) if policies.leave_out else None
        self._report = report
        self._advance = advance

    def table(
        self, items: Iterable[Record | Block], path: Path, watch: Callable[[list[Record]], None] | None = None
    ) -> Counts:
        """Write a table of all records taken; ``watch`` sees them, a batch at a time, as they are numbered.

        Raises:
            FastaError: a record without residues, if ``unknown`` is ``error``.
            UnknownResidueError: a letter that the policies do not allow, with file, line, record and position.
            DataError: nothing was taken.
        """
        with TableWriter(path) as writer, self._report.open("a", encoding="utf-8") as report:
            self._lines: list[str] = []
            self._skipped: list[bytes] = []
            for group in _groups(items):
                whole = self._encode_block(group) if isinstance(group, Block) and watch is None else None
                if whole is not None:
                    writer.write(*whole)
                    self._advance(int(whole[0].lengths().sum()))
                    continue
                records = list(group.records()) if isinstance(group, Block) else group
                taken, batch = self._encode(records)
                if taken:
                    writer.write(batch, keys_of(item.id.encode() for item in taken))
                    if watch is not None:
                        watch(taken)
                writer.leave_out(self._skipped)
                report.writelines(self._lines)
                self._lines, self._skipped = [], []
                self._advance(sum(len(item.sequence) for item in records))
        if not self.counts.kept:
            raise DataError(f"none of {self.counts.records:,} records was taken: {self.left_out()}")
        return self.counts

    def left_out(self) -> str:
        """What was not taken, in words."""
        counts = vars(self.counts)
        names = [name for name in counts if name.startswith("skipped") and counts[name]]
        return ", ".join(f"{counts[name]:,} {name[8:].replace('_', ' ')}" for name in names)

    def _encode_block(self, block: Block) -> tuple[TokenRows, Keys] | None:
        """All records of a block, if it is plain and every one is taken as it is."""
        if self._pattern is not None or not block.plain:
            return None
        records = [record.partition(b"\n") for record in block.data[1:].split(b"\n>")]
        words = [header.split(None, 1) for header, _, _ in records]
        if not all(words):
            return None
        # ">" is in no alphabet and in no plain record's residues but as damage, so it can stand between them.
        tokens = b">".join([residues for _, _, residues in records]).translate(self._with_ends, b"\n")
        if _INVALID in tokens:
            return None
        ends = np.append(np.flatnonzero(np.frombuffer(tokens, np.uint8) == _END), len(tokens))
        lengths = np.diff(ends, prepend=-1) - 1
        policies = self._policies
        if len(lengths) != len(records) or lengths.min() < policies.min_length:
            return None
        if policies.max_length is not None and lengths.max() > policies.max_length:
            return None
        ids = [word[0] for word in words]
        self.counts.records += len(records)
        self.counts.kept += len(records)
        self.counts.residues += int(lengths.sum())
        return TokenRows.of(ids, lengths, tokens.translate(None, bytes([_END]))), keys_of(ids)

    def _encode(self, group: list[Record]) -> tuple[list[Record], TokenRows]:
        counts, policies = self.counts, self._policies
        counts.records += len(group)
        tokens, lengths = self._joined(group)
        most = policies.max_length
        odd = self._pattern is not None or _INVALID in tokens or lengths.min() < max(1, policies.min_length)
        if odd or (most is not None and lengths.max() > most):
            group = [taken for item in group if (taken := self._taken(item)) is not None]
            tokens, lengths = self._joined(group)
        counts.kept += len(group)
        counts.residues += len(tokens)
        return group, TokenRows.of([item.id.encode() for item in group], lengths, tokens)

    def _joined(self, group: list[Record]) -> tuple[bytes, NDArray[np.int64]]:
        """The token ids of some records end to end, and how many each has."""
        tokens = "".join([item.sequence for item in group]).encode("latin-1").translate(self._to_id)
        return tokens, np.fromiter((len(item.sequence) for item in group), np.int64, len(group))

    def _taken(self, item: Record) -> Record | None:
        """A record as it is taken, or ``None``; all that is done to one is told before the next."""
        if self._pattern is not None and self._by_header(item):
            return None
        mended = self._mended(item)
        return mended if mended is not None and self._fits(mended) else None

    def _note(self, item: Record, what: str, detail: str) -> None:
        fields = (item.id, what, detail)
        clean = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in text) for text in fields)
        self._lines.append("\t".join(clean) + "\n")
        if what == "skipped":
            self._skipped.append(item.id.encode())

    def _by_header(self, item: Record) -> bool:
        assert self._pattern is not None
        if not self._pattern.search(f"{item.id} {item.description}"):
            return False
        self.counts.skipped_by_header += 1
        self._note(item, "skipped", f"header matches {self._policies.leave_out!r}")
        return True

    def _fits(self, item: Record) -> bool:
        length, policies = len(item.sequence), self._policies
        if not length:
            if policies.unknown == "error":
                raise FastaError(f"{item.place}: no residues; remove the record or add its sequence")
            self.counts.skipped_empty += 1
            self._note(item, "skipped", "no residues")
        elif length < policies.min_length:
            self.counts.skipped_short += 1
            self._note(item, "skipped", f"{length} residues, below {policies.min_length}")
        elif policies.max_length is not None and length > policies.max_length:
            self.counts.skipped_long += 1
            self._note(item, "skipped", f"{length} residues, over {policies.max_length}")
        else:
            return True
        return False

    def _mended(self, item: Record) -> Record | None:
        """A record with letters of the alphabet alone, or ``None`` if it is left out."""
        if _INVALID not in item.sequence.encode("latin-1").translate(self._to_id):
            return item
        text = _BLANK.sub("", item.sequence).translate(_RAISED)
        bare = text.rstrip("*")
        bad = set(bare) - set(self._alphabet.residues)
        damage = sorted(bad - _REPLACEABLE)
        unknown = self._policies.unknown
        if bad and (damage or unknown != "x"):
            what = _listing(bare, damage or sorted(bad))
            if unknown != "skip":
                why = "not a residue" if damage else f"not in the {self._alphabet.name} alphabet"
                mend = "mend the record, or leave such records out with --unknown skip"
                raise UnknownResidueError(f"{item.place}: {why}: {what}; {mend}")
            self.counts.skipped_unknown += 1
            self._note(item, "skipped", f"not in the alphabet: {what}")
            return None
        changed = len(item.sequence) - len(bare)
        details = [f"{changed} blanks or stops removed"] if changed else []
        lower = sum(letter.islower() for letter in item.sequence) if item.sequence != bare else 0
        if lower:
            details.append(f"{lower} lower-case letters raised")
        replaced = sum(bare.count(letter) for letter in bad)
        if replaced:
            details.append(f"replaced by X: {_listing(bare, sorted(bad))}")
            bare = bare.translate({ord(letter): "X" for letter in bad})
        if bare != item.sequence:
            self.counts.altered_records += 1
            self.counts.altered_letters += changed + lower + replaced
            self._note(item, "altered", "; ".join(details))
        return item._replace(sequence=bare)


def _groups(items: Iterable[Record | Block]) -> Iterator[list[Record] | Block]:
    group: list[Record] = []
    size = 0
    for item in items:
        if isinstance(item, Block):
            yield item
            continue
        group.append(item)
        size += len(item.sequence) + 100  # what else a record takes, so that empty ones do not pile up
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _listing(sequence: str, letters: Iterable[str]) -> str:
    parts = []
    for letter in letters:
        places = [match.start() + 1 for match in re.finditer(re.escape(letter), sequence)]
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        name = letter if letter.isprintable() and not letter.isspace() else repr(letter)[1:-1]
        parts.append(f"{name} at {', '.join(map(str, places[:_SHOWN]))}{more}")
    return "; ".join(parts)
