"""Turns records into tables of token ids, thousands at a time. Every change is counted and reported.

``protea.letters`` decides on letters outside the alphabet, as it does for ``protea embed``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from protea.alphabet import Alphabet
from protea.data.build_settings import BuildSettings
from protea.data.token_table import TableWriter, lengths_of, token_batch
from protea.errors import DataError
from protea.fasta import Block, Record
from protea.letters import NO_RESIDUES, Doubts, ReportRow, clean, doubtful
from protea.progress import Progress
from protea.text import counted, printable

REPORT: Final = "report.tsv"
NOTES: Final = "notes"

_INVALID: Final = 255
_END: Final = 254
_GROUP: Final = 1 << 12


@dataclass
class Counts:
    """Counts of records: each record counts as ``kept`` or in one of the ``skipped`` counters."""

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
    """Reads records into a table."""

    def __init__(self, alphabet: Alphabet, settings: BuildSettings, progress: Progress) -> None:
        self.counts = Counts()
        self._settings, self._alphabet, self._progress = settings, alphabet, progress
        table = bytearray([_INVALID] * 256)
        for letter in alphabet.residues:
            table[ord(letter)] = int(alphabet.encode(letter)[0])
        self._to_id = bytes(table)
        table[ord(">")] = _END
        self._with_ends = bytes(table)
        self._pattern = re.compile(settings.leave_out) if settings.leave_out else None
        self._rows: list[ReportRow] = []
        self._doubts = Doubts()

    def table(
        self,
        groups: Iterable[list[Record] | Block],
        folder: Path,
        note: Callable[[list[Record]], bytes] | None = None,
    ) -> Counts:
        """Write a table of the records that are taken, and a report with a line for each altered or skipped record.

        ``note`` makes the bytes for the file of notes from the records of a batch.
        """
        with (
            TableWriter(folder) as writer,
            (folder / REPORT).open("w", encoding="utf-8") as report,
            (folder / NOTES).open("wb") as notes,
        ):
            for group in groups:
                batch = self._encode_block(group) if isinstance(group, Block) and note is None else None
                if batch is None:
                    records = list(group.records()) if isinstance(group, Block) else group
                    kept = [taken for record in records if (taken := self._kept(record)) is not None]
                    batch = self._encode(kept)
                    if note is not None:
                        notes.write(note(kept))
                if batch.num_rows:
                    writer.write(batch)
                writer.leave_out([row.id.encode() for row in self._rows if row.what == "skipped"])
                report.writelines("\t".join(map(printable, row)) + "\n" for row in self._rows)
                self._doubts.add(self._rows)
                self._rows.clear()
                residues = int(lengths_of(batch).sum())
                self.counts.kept += len(batch)
                self.counts.residues += residues
                self._progress.advance(group.consumed if isinstance(group, Block) else residues)
        for line in self._doubts.lines():
            self._progress.note(line)
        if not self.counts.kept:
            skipped = {name[8:]: count for name, count in vars(self.counts).items() if name.startswith("skipped")}
            reasons = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in skipped.items() if count)
            raise DataError(f"none of {counted(self.counts.records, 'record')} can be used; skipped: {reasons}")
        return self.counts

    def _encode_block(self, block: Block) -> pa.RecordBatch | None:
        """All records of a block; ``None`` if some need to be changed or skipped."""
        if self._pattern is not None or not block.plain:
            return None
        records = [record.partition(b"\n") for record in block.data[1:].split(b"\n>")]
        words = [header.split(None, 1) for header, _, _ in records]
        if not all(words):
            return None
        # ">" separates the sequences: no alphabet has it. A ">" within a record changes the number of sequences.
        tokens = b">".join([residues for _, _, residues in records]).translate(self._with_ends, b"\n")
        if _INVALID in tokens or any(doubtful(residues.decode("ascii")) for _, _, residues in records):
            return None
        ends = np.append(np.flatnonzero(np.frombuffer(tokens, np.uint8) == _END), len(tokens))
        lengths = np.diff(ends, prepend=-1) - 1
        longest = self._settings.max_length or lengths.max()
        if len(lengths) != len(records) or lengths.min() < self._settings.min_length or lengths.max() > longest:
            return None
        self.counts.records += len(records)
        return token_batch([word[0] for word in words], lengths, tokens.translate(None, bytes([_END])))

    def _encode(self, records: list[Record]) -> pa.RecordBatch:
        lengths = np.fromiter((len(record.sequence) for record in records), np.int64, len(records))
        tokens = self._token_ids("".join([record.sequence for record in records]))
        return token_batch([record.id.encode() for record in records], lengths, tokens)

    def _token_ids(self, sequence: str) -> bytes:
        # A letter beyond Latin-1 becomes "?", which no alphabet has.
        return sequence.encode("latin-1", "replace").translate(self._to_id)

    def _kept(self, record: Record) -> Record | None:
        """The record with letters of the alphabet alone; ``None`` if it is skipped."""
        counts, settings = self.counts, self._settings
        counts.records += 1
        if self._pattern is not None and self._pattern.search(f"{record.id} {record.description}"):
            counts.skipped_by_header += 1
            self._rows.append(ReportRow(record.id, "skipped", f"header matches {settings.leave_out!r}"))
            return None
        if not record.sequence or _INVALID in self._token_ids(record.sequence) or doubtful(record.sequence):
            cleaned = clean(record, self._alphabet, settings.unknown, settings.gaps)
            self._rows.extend(cleaned.rows)
            if cleaned.sequence is None:
                if cleaned.rows[0].detail == NO_RESIDUES:
                    counts.skipped_empty += 1
                else:
                    counts.skipped_unknown += 1
                return None
            counts.altered_records += bool(cleaned.letters)
            counts.altered_letters += cleaned.letters
            record = record._replace(sequence=cleaned.sequence)
        length = len(record.sequence)
        if length < settings.min_length:
            counts.skipped_short += 1
            reason = f"{length} residues, below {settings.min_length}"
        elif settings.max_length is not None and length > settings.max_length:
            counts.skipped_long += 1
            reason = f"{length} residues, over {settings.max_length}"
        else:
            return record
        self._rows.append(ReportRow(record.id, "skipped", reason))
        return None


def grouped(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records, thousands at a time."""
    iterator = iter(records)
    while group := list(islice(iterator, _GROUP)):
        yield group
