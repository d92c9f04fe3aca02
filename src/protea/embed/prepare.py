"""From records to token ids under the user's policies, with a note of everything that was changed.

Nothing is dropped or altered here without a ``Note``; the report that lies beside every output is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.embed.names import store_name
from protea.errors import FastaError, SequenceTooLongError, UnknownResidueError
from protea.fasta import Record
from protea.infer.windows import spans
from protea.models.encoder import Encoder

Long = Literal["truncate", "window", "full", "error"]
"""What happens to a sequence longer than the models were trained on.

``truncate`` keeps its beginning, as the model cards say; ``window`` runs overlapping windows and joins them; ``full``
runs it whole, which only rotary models can; ``error`` refuses it.
"""

Unknown = Literal["x", "error", "skip"]
"""What happens to a residue outside the alphabet: replaced by X, an error, or its record is left out."""

Duplicates = Literal["error", "rename", "skip"]
"""What happens to the second record of an id: an error, a new id, or it is left out."""

_MASK: Final = "<mask>"
_TO_UPPER: Final = {ord(letter): letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"}
_BLANK: Final = re.compile(r"[ \t\v\f]+")
_REPLACEABLE: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ*-.")
"""What stands for a residue, a stop or a gap; anything else in a sequence is damage, and no X can mend it."""
_POSITIONS_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class RecordPolicies:
    """What becomes of records that cannot be taken as they are."""

    long: Long = "truncate"
    unknown: Unknown = "x"
    duplicates: Duplicates = "error"


class Note(NamedTuple):
    """One line of the report.

    Attributes:
        id: the record, by the id it has in the output.
        what: ``truncated``, ``windowed``, ``altered``, ``renamed`` or ``skipped``.
        detail: how.
    """

    id: str
    what: str
    detail: str


@dataclass(frozen=True)
class EncodedRecord:
    """A record as the model will see it.

    Attributes:
        record: with the id it has in the output.
        ids: ``[L]`` token ids of the residues kept, BOS and EOS not yet added.
        windows: first residue and residue after the last of every pass through the model; usually one for all.
        truncated_from: residues before truncation, if it was truncated.
        tokens: of all passes, those of their frames included.
    """

    record: Record
    ids: NDArray[np.uint8]
    windows: tuple[tuple[int, int], ...]
    truncated_from: int | None
    tokens: int


@dataclass(frozen=True)
class Prepared:
    """What a record became.

    Attributes:
        encoded: ``None`` if it was skipped.
        notes: what was done to it.
        fingerprint: of this record as it was read, and of all records before it.
    """

    encoded: EncodedRecord | None
    notes: tuple[Note, ...]
    fingerprint: bytes


class IdCheck(Protocol):
    """Knows which ids were used before; ``survey.py`` has the ways of knowing."""

    def first_time(self, name: str) -> bool:
        """Whether this is the first record of that name."""

    def free(self, name: str) -> bool:
        """Whether no record of the input has that name."""


def prepare(records: Iterable[Record], model: Encoder, policies: RecordPolicies, ids: IdCheck) -> Iterator[Prepared]:
    """Encode records one by one.

    Args:
        records: in the order of the output.
        model: whose alphabet and limits apply.
        policies: what to do with odd records.
        ids: tells first records of an id from later ones.

    Raises:
        UnknownResidueError: a letter that the policies do not allow, with file, line, record and position.
        SequenceTooLongError: a sequence over the limit that the policies do not allow.
        FastaError: an id that was used before, if that is an error; a record without residues, if
            ``unknown`` is ``error``.
    """
    fingerprint = b""
    numbers: dict[str, int] = {}
    for record in records:
        fingerprint = _chain(fingerprint, record)
        notes: list[Note] = []
        named = _unique(record, policies.duplicates, ids, numbers, notes)
        residues = None if named is None else encode(named, model.alphabet, policies.unknown, notes)
        encoded = None if named is None or residues is None else fit(named, residues, model, policies, notes)
        yield Prepared(encoded, tuple(notes), fingerprint)


def fit(
    record: Record, ids: NDArray[np.uint8], model: Encoder, policies: RecordPolicies, notes: list[Note]
) -> EncodedRecord:
    """One encoded record under the policy for length.

    Raises:
        SequenceTooLongError: it is over the limit and the policy does not help.
    """
    frame = model.alphabet.frame
    limit = frame.residues(model.trained_tokens)
    length = len(ids)
    if length <= limit or (policies.long == "full" and model.max_tokens is None):
        return EncodedRecord(record, ids, ((0, length),), None, frame.tokens(length))
    if policies.long == "truncate":
        notes.append(Note(record.id, "truncated", f"first {limit} of {length} residues"))
        return EncodedRecord(record, ids[:limit], ((0, limit),), length, frame.tokens(limit))
    if policies.long == "window":
        windows = spans(length, limit)
        notes.append(Note(record.id, "windowed", f"{length} residues in {len(windows)} windows of {limit}"))
        return EncodedRecord(record, ids, windows, None, sum(frame.tokens(end - start) for start, end in windows))
    raise _too_long(record, length, model)


def _chain(previous: bytes, record: Record) -> bytes:
    parts = record.id, record.description, record.sequence
    return blake2b(previous + "\0".join(parts).encode(), digest_size=16).digest()


def _unique(
    record: Record, policy: Duplicates, ids: IdCheck, numbers: dict[str, int], notes: list[Note]
) -> Record | None:
    """The record under an id of its own, or ``None``; ``numbers`` holds the last one tried for each repeated id."""
    if ids.first_time(store_name(record.id)):
        return record
    if policy == "error":
        raise FastaError(
            f"{record.place}: this id was used before; give each record its own, "
            "or pass --duplicates rename or --duplicates skip"
        )
    if policy == "skip":
        notes.append(Note(record.id, "skipped", f"duplicate id, {record.place}"))
        return None
    number = numbers.get(record.id, 1) + 1
    while not (ids.free(store_name(f"{record.id}_{number}")) and ids.first_time(store_name(f"{record.id}_{number}"))):
        number += 1
    numbers[record.id] = number
    name = f"{record.id}_{number}"
    notes.append(Note(name, "renamed", f"duplicate of {record.id}"))
    return record._replace(id=name)


def encode(record: Record, alphabet: Alphabet, unknown: Unknown, notes: list[Note]) -> NDArray[np.uint8] | None:
    """Residues of one record as ids ``[L]``, or ``None`` where it is skipped.

    Args:
        record: as it was read.
        alphabet: of the model.
        unknown: what to do with letters outside it.
        notes: is told of everything that was changed.

    Raises:
        UnknownResidueError: a letter that the policy does not allow, with file, line, record and position.
        FastaError: a record without residues, if ``unknown`` is ``error``.
    """
    sequence = record.sequence
    if sequence:
        try:
            return alphabet.encode(sequence)
        except UnknownResidueError:
            pass  # the slow path finds out what is wrong, and whether it may be mended
    altered: list[str] = []
    sequence = _tidy(sequence, altered)
    bad = _outside(sequence, alphabet)
    damage = sorted(letter for letter in bad if letter not in _REPLACEABLE)
    if not sequence:
        reason = "no residues"
    elif bad and (damage or unknown == "skip"):
        reason = f"not in the alphabet: {_listing(sequence, damage or sorted(bad))}"
    else:
        reason = ""
    if unknown == "error" or (damage and unknown == "x"):
        if bad:
            _refuse(record, sequence, alphabet, damage)
        if reason:
            raise FastaError(f"{record.place}: {reason}; remove the record or add its sequence")
    if reason:
        notes.append(Note(record.id, "skipped", reason))
        return None
    if bad:
        altered.append(f"replaced by X: {_listing(sequence, sorted(bad))}")
        sequence = _by_part(sequence, {ord(letter): "X" for letter in bad})
    notes.append(Note(record.id, "altered", "; ".join(altered)))
    return alphabet.encode(sequence)


def _tidy(sequence: str, altered: list[str]) -> str:
    """Upper case, no blanks within, no stop at the end: changes that leave no doubt what was meant."""
    closed = _BLANK.sub("", sequence)
    if len(closed) < len(sequence):
        altered.append(f"{len(sequence) - len(closed)} blanks removed")
    upper = _by_part(closed, _TO_UPPER)
    if changed := sum(a != b for a, b in zip(closed, upper, strict=True)) if closed != upper else 0:
        altered.append(f"{changed} lower-case letters raised")
    bare = upper.rstrip("*")
    if len(bare) < len(upper):
        altered.append("stop removed at the end" if len(upper) - len(bare) == 1 else "stops removed at the end")
    return bare


def _by_part(sequence: str, table: dict[int, str]) -> str:
    return _MASK.join(part.translate(table) for part in sequence.split(_MASK))


def _outside(sequence: str, alphabet: Alphabet) -> set[str]:
    return set(sequence.replace(_MASK, "")) - set(alphabet.residues)


def _listing(sequence: str, letters: Sequence[str]) -> str:
    """Each letter with its first positions, from 1, as in ``J at 5, 17; * at 40``."""
    masked = sequence.replace(_MASK, "?")
    parts = []
    for letter in letters:
        positions = [match.start() + 1 for match in re.finditer(re.escape(letter), masked)]
        shown = ", ".join(map(str, positions[:_POSITIONS_SHOWN]))
        more = len(positions) - _POSITIONS_SHOWN
        name = letter if letter.isprintable() and not letter.isspace() else repr(letter)[1:-1]
        parts.append(f"{name} at {shown}" + (f" and {more} more" if more > 0 else ""))
    return "; ".join(parts)


def _refuse(record: Record, sequence: str, alphabet: Alphabet, damage: Sequence[str]) -> None:
    """Raise what encoding says of the first letter at fault, the damage first."""
    if damage:
        raise UnknownResidueError(
            f"{record.place}: not a residue: {_listing(sequence, damage)}; mend the record, "
            "or leave such records out with --unknown skip"
        )
    try:
        alphabet.encode(sequence)
    except UnknownResidueError as error:
        raise UnknownResidueError(f"{record.place}: {error}") from error


def _too_long(record: Record, length: int, model: Encoder) -> SequenceTooLongError:
    limit = model.alphabet.frame.residues(model.trained_tokens)
    family = model.config.family
    whole = ", full runs it whole" if model.max_tokens is None else ""
    return SequenceTooLongError(
        f"{record.place}: {length} residues, over the {limit} that {family} was trained on; as policy for long ones, "
        f"truncate keeps its beginning, window joins embeddings of overlapping windows{whole}"
    )
