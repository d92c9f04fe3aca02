"""Policy for letters that the alphabet lacks: the same for FASTA files, training stores and scoring.

Nothing is changed or dropped without a ``ReportRow``. ``OUT.report.tsv``, beside every output, lists these rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from protea.alphabet import Alphabet
from protea.errors import FastaError, UnknownResidueError
from protea.fasta import Record

Unknown = Literal["x", "error", "skip"]
"""Policy for a residue outside the alphabet: replace it by X, raise an error, or skip its record."""

NO_RESIDUES: Final = "no residues"
"""Why a record without a sequence is skipped."""

_MASK: Final = "<mask>"
_TO_UPPER: Final = {ord(letter): letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"}
_BLANK: Final = re.compile(r"[ \t\v\f]+")
_REPLACEABLE: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ*-.")
"""Letters that stand for a residue, a stop or a gap. Any other character is damage, which X must not hide."""
_POSITIONS_SHOWN: Final = 5


class ReportRow(NamedTuple):
    """One row of a report: a record's id in the output, what happened (as in ``truncated``), and the details."""

    id: str
    what: str
    detail: str


class Cleaned(NamedTuple):
    """A record after the policy; its sequence is ``None`` if it is skipped. ``letters`` were changed or removed."""

    sequence: str | None
    row: ReportRow | None
    letters: int


def clean(record: Record, alphabet: Alphabet, unknown: Unknown, *, masks: bool = False) -> Cleaned:
    """Apply the policy to one record.

    Lower case becomes upper case; blanks and stops at the end are removed; the policy decides on every other letter
    outside the alphabet. With ``masks``, ``<mask>`` stands for a masked position.
    """
    details: list[str] = []
    sequence, letters = _tidied(record.sequence, masks, details)
    bad = set(sequence.replace(_MASK, "") if masks else sequence) - set(alphabet.residues)
    damage = bad - _REPLACEABLE
    if not sequence:
        if unknown == "error":
            raise FastaError(f"{record.place}: {NO_RESIDUES}; remove the record or add its sequence")
        return Cleaned(None, ReportRow(record.id, "skipped", NO_RESIDUES), 0)
    if bad and (damage or unknown != "x"):
        listed = listing(sequence, sorted(damage or bad))
        if unknown != "skip":
            why = "not a residue" if damage else f"not in the {alphabet.name} alphabet ({alphabet.residues})"
            fix = "correct the record" if damage else "correct the record, replace them with --unknown x"
            raise UnknownResidueError(f"{record.place}: {why}: {listed}; {fix}, or skip such records: --unknown skip")
        return Cleaned(None, ReportRow(record.id, "skipped", f"not in the alphabet: {listed}"), 0)
    if bad:
        details.append(f"replaced by X: {listing(sequence, sorted(bad))}")
        letters += sum(sequence.count(letter) for letter in bad)
        sequence = _translated(sequence, {ord(letter): "X" for letter in bad}, masks)
    return Cleaned(sequence, ReportRow(record.id, "altered", "; ".join(details)) if details else None, letters)


def listing(sequence: str, letters: Iterable[str]) -> str:
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


def _tidied(sequence: str, masks: bool, details: list[str]) -> tuple[str, int]:
    """Make the changes that leave no doubt about the residues, and count the letters."""
    closed = _BLANK.sub("", sequence)
    upper = _translated(closed, _TO_UPPER, masks)
    bare = upper.rstrip("*")
    blanks, stops = len(sequence) - len(closed), len(upper) - len(bare)
    raised = sum(a != b for a, b in zip(closed, upper, strict=True)) if closed != upper else 0
    if blanks:
        details.append(f"{blanks} blanks removed")
    if raised:
        details.append(f"{raised} lower-case letters changed to upper case")
    if stops:
        details.append("stop removed at the end" if stops == 1 else "stops removed at the end")
    return bare, blanks + raised + stops


def _translated(sequence: str, table: dict[int, str], masks: bool) -> str:
    if not masks:
        return sequence.translate(table)
    return _MASK.join(part.translate(table) for part in sequence.split(_MASK))
