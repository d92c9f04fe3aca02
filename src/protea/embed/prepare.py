"""From records to token ids, under the user's policies for ids, letters and length.

Nothing is dropped or changed without a ``ReportRow``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.embed.stores import store_name
from protea.errors import FastaError, SequenceTooLongError, UnknownResidueError
from protea.fasta import Record
from protea.infer.windows import spans
from protea.letters import Gaps, ReportRow, Unknown, clean, doubtful
from protea.models.encoder import Encoder

Long = Literal["truncate", "window", "full", "error"]
"""Policy for a sequence longer than the model was trained on.

``truncate`` keeps its beginning, as the model cards say; ``window`` computes overlapping windows and joins them;
``full`` computes it whole, which only rotary models can; ``error`` refuses it.
"""

Duplicates = Literal["error", "rename", "skip"]
"""Policy for the second record of an id: raise an error, give it a new id, or skip it."""


@dataclass(frozen=True, kw_only=True)
class RecordPolicies:
    """Policies for records that cannot be embedded as they are."""

    long: Long = "truncate"
    unknown: Unknown = "x"
    gaps: Gaps = "keep"
    duplicates: Duplicates = "error"


@dataclass(frozen=True)
class EncodedRecord:
    """A record, with its id in the output, as the model sees it.

    Attributes:
        ids: ``[L]`` token ids of the residues kept, without BOS and EOS.
        windows: first residue and residue after the last of each pass through the model; usually one pass.
        truncated_from: residues before truncation; ``None`` if the record is not truncated.
        tokens: number of tokens in all passes, BOS and EOS included.
    """

    record: Record
    ids: NDArray[np.uint8]
    windows: tuple[tuple[int, int], ...]
    truncated_from: int | None
    tokens: int


class Prepared(NamedTuple):
    """A prepared record, or ``None`` for a record that is skipped, and its rows for the report.

    ``fingerprint`` is a hash of this record as read and of all records before it.
    """

    encoded: EncodedRecord | None
    rows: tuple[ReportRow, ...]
    fingerprint: bytes


class SeenIds:
    """Knows which ids came before. This class keeps every name; ``survey.py`` has other classes for surveyed input."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def first_time(self, name: str) -> bool:
        """Whether this is the first record of that name."""
        first = name not in self._seen
        self._seen.add(name)
        return first

    def free(self, name: str) -> bool:
        """Whether no record so far, or no record of surveyed input, has that name."""
        return name not in self._seen


def prepare(records: Iterable[Record], model: Encoder, policies: RecordPolicies, ids: SeenIds) -> Iterator[Prepared]:
    """Prepare records one by one, in the order of the output, for a model with its alphabet and its limit of length."""
    fingerprint = b""
    last_numbers: dict[str, int] = {}
    for record in records:
        fingerprint = fingerprint_after(fingerprint, record)
        rows: list[ReportRow] = []
        named = _with_own_id(record, policies.duplicates, ids, last_numbers, rows)
        residues = None if named is None else encode(named, model.alphabet, policies, rows)
        encoded = None if named is None or residues is None else fit(named, residues, model, policies.long, rows)
        yield Prepared(encoded, tuple(rows), fingerprint)


def fingerprint_after(before: bytes, record: Record) -> bytes:
    """The fingerprint of an input up to a record, from that of the records before; empty bytes for none."""
    text = "\0".join((record.id, record.description, record.sequence))
    return blake2b(before + text.encode(), digest_size=16).digest()


def encode(
    record: Record, alphabet: Alphabet, policies: RecordPolicies, rows: list[ReportRow]
) -> NDArray[np.uint8] | None:
    """Token ids ``[L]`` of a record's residues; ``None`` if the record is skipped.

    ``<mask>`` stands for a masked position. ``rows`` receives what ``clean`` reports.
    """
    if record.sequence and not doubtful(record.sequence):
        try:
            return alphabet.encode(record.sequence)
        except UnknownResidueError:
            pass  # ``clean`` decides whether the policy allows it
    cleaned = clean(record, alphabet, policies.unknown, policies.gaps, masks=True)
    rows.extend(cleaned.rows)
    return None if cleaned.sequence is None else alphabet.encode(cleaned.sequence)


def fit(record: Record, ids: NDArray[np.uint8], model: Encoder, long: Long, rows: list[ReportRow]) -> EncodedRecord:
    """Apply the policy for length to one record; ``SequenceTooLongError`` if it does not allow so many residues."""
    frame = model.alphabet.frame
    limit = frame.residues(model.trained_tokens)
    length = len(ids)
    if length <= limit or (long == "full" and model.max_tokens is None):
        return EncodedRecord(record, ids, ((0, length),), None, frame.tokens(length))
    if long == "truncate":
        rows.append(ReportRow(record.id, "truncated", f"first {limit} of {length} residues"))
        return EncodedRecord(record, ids[:limit], ((0, limit),), length, frame.tokens(limit))
    if long == "window":
        windows = spans(length, limit)
        rows.append(ReportRow(record.id, "windowed", f"{length} residues in {len(windows)} windows of {limit}"))
        return EncodedRecord(record, ids, windows, None, sum(frame.tokens(end - start) for start, end in windows))
    full = ", or full to compute it whole" if model.max_tokens is None else ""
    raise SequenceTooLongError(
        f"{record.place}: {length} residues exceed the {limit} that {model.config.family} was trained on; choose the "
        f"policy truncate to keep the first {limit}, window to join overlapping windows{full}"
    )


def _with_own_id(
    record: Record, policy: Duplicates, ids: SeenIds, last_numbers: dict[str, int], rows: list[ReportRow]
) -> Record | None:
    """The record with an id that no other record has; ``None`` if it is skipped."""
    if ids.first_time(store_name(record.id)):
        return record
    if policy == "error":
        raise FastaError(
            f"{record.place}: an earlier record has this id; give each record its own id, or pass --duplicates rename "
            "or --duplicates skip"
        )
    if policy == "skip":
        rows.append(ReportRow(record.id, "skipped", f"duplicate id, {record.place}"))
        return None
    number = last_numbers.get(record.id, 1) + 1
    while not (ids.free(name := store_name(f"{record.id}_{number}")) and ids.first_time(name)):
        number += 1
    last_numbers[record.id] = number
    name = f"{record.id}_{number}"
    rows.append(ReportRow(name, "renamed", f"duplicate of {record.id}"))
    return record._replace(id=name)
