"""Policy for letters that the alphabet lacks: the same for FASTA files, training stores and scoring.

Nothing is changed or dropped without a ``ReportRow``. ``OUT.report.tsv``, beside every output, lists these rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from protea.alphabet import Alphabet
from protea.errors import FastaError, UnknownResidueError
from protea.fasta import Record
from protea.text import counted

Unknown = Literal["x", "error", "skip"]
"""Policy for a residue outside the alphabet: replace it by X, raise an error, or skip its record."""

Gaps = Literal["keep", "drop"]
"""Policy for the gaps of an alignment: they count as residues, or they are removed."""

GAPS: Final = "-."
NUCLEOTIDES: Final = 20
"""Letters A, C, G, T, U and N from which on a sequence can look like DNA or RNA; real peptides of these are shorter."""

NO_RESIDUES: Final = "no residues"
"""Why a record without a sequence is skipped."""

_MASK: Final = "<mask>"
_TO_UPPER: Final = {ord(letter): letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"}
_BLANK: Final = re.compile(r"[ \t\v\f]+")
_REPLACEABLE: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ*-.")
"""Letters that stand for a residue, a stop or a gap. Any other character is damage, which X must not hide."""
_POSITIONS_SHOWN: Final = 5
_LETTERS_SHOWN: Final = 15
_NO_GAPS: Final = dict.fromkeys(map(ord, GAPS))
_NUCLEOTIDES: Final = "ACGTUN"
_AMBIGUOUS: Final = "RYSWKMBDHV"
"""IUPAC's letters for two or three nucleotides."""
_CHAIN_BREAKS: Final = frozenset(":/")
_DOUBTS: Final = {
    "nucleotides": "DNA or RNA, read as amino acids: {}; translate to protein first",
    "gapped": "gaps, which count as residues: {}; {}",
}
"""Kinds of report rows about records that can be computed but are hardly what the user means."""
_DROP: Final = "--gaps drop removes them (lower-case letters, an A3M's insertions, are residues and stay)"


class ReportRow(NamedTuple):
    """One row of a report: a record's id in the output, what happened (as in ``truncated``), and the details."""

    id: str
    what: str
    detail: str


class Cleaned(NamedTuple):
    """A record after the policies; its sequence is ``None`` if it is skipped. ``letters`` were changed or removed."""

    sequence: str | None
    rows: tuple[ReportRow, ...]
    letters: int


class Doubts:
    """Counts records that can be computed but are hardly what the user means, for one line a kind."""

    kinds: Final = frozenset(_DOUBTS)

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, rows: Iterable[Sequence[str]], place: str = "") -> None:
        """Count the report rows that ``clean`` made, given as id, kind and details; ``place`` is for the message."""
        for name, what, _ in rows:
            if what in _DOUBTS:
                self._counts[what] += 1
                self._first.setdefault(what, place or f"record {name!r}")

    def lines(self, noun: str = "record", drop: str = _DROP) -> list[str]:
        """What to tell the user: the number of records, the first one, and the way out, for gaps ``drop``."""
        first = {what: f"{counted(number, noun)}, the first is " for what, number in self._counts.items() if number > 1}
        return [
            text.format(first.get(what, "") + self._first[what], drop)
            for what, text in _DOUBTS.items()
            if what in self._first
        ]


def doubtful(sequence: str) -> bool:
    """Whether a sequence has gaps or looks like DNA or RNA, and needs ``clean`` even if all letters fit.

    Line breaks may be left in the sequence.
    """
    return "-" in sequence or "." in sequence or _looks_like_nucleotides(sequence)


def clean(record: Record, alphabet: Alphabet, unknown: Unknown, gaps: Gaps = "keep", *, masks: bool = False) -> Cleaned:
    """Apply the policies to one record.

    Lower case becomes upper case; blanks and stops at the end are removed; the policies decide on gaps and on every
    other letter outside the alphabet. With ``masks``, ``<mask>`` stands for a masked position.
    """
    details: list[str] = []
    sequence, letters = _tidied(record.sequence, gaps, masks, details)
    kept, nucleotides = _gaps_in(sequence), _looks_like_nucleotides(sequence)
    bad = set(sequence.replace(_MASK, "") if masks else sequence) - set(alphabet.residues)
    damage = bad - _REPLACEABLE
    if not sequence:
        if unknown == "error":
            raise FastaError(f"{record.place}: {NO_RESIDUES}; remove the record or add its sequence")
        return Cleaned(None, (ReportRow(record.id, "skipped", NO_RESIDUES),), 0)
    if bad and (damage or unknown != "x"):
        listed = listing(sequence, sorted(damage or bad))
        if unknown != "skip":
            why = "not a residue" if damage else f"not in the {alphabet.name} alphabet ({alphabet.residues})"
            fix = "correct the record" if damage else "correct the record, replace them with --unknown x"
            what = joined_chains(sequence, alphabet) or f"{why}: {listed}; {fix}"
            raise UnknownResidueError(f"{record.place}: {what}, or skip such records: --unknown skip")
        return Cleaned(None, (ReportRow(record.id, "skipped", f"not in the alphabet: {listed}"),), 0)
    if bad:
        details.append(f"replaced by X: {listing(sequence, sorted(bad))}")
        letters += sum(sequence.count(letter) for letter in bad)
        sequence = _translated(sequence, {ord(letter): "X" for letter in bad}, masks)
    rows = [("altered", "; ".join(details))] if details else []
    if kept:
        rows.append(
            ("gapped", "1 gap, which counts as a residue" if kept == 1 else f"{kept:,} gaps, which count as residues")
        )
    if nucleotides:
        rows.append(("nucleotides", f"looks like DNA or RNA, is read as amino acids: {sequence[:_LETTERS_SHOWN]}..."))
    return Cleaned(sequence, tuple(ReportRow(record.id, what, detail) for what, detail in rows), letters)


def joined_chains(sequence: str, alphabet: Alphabet) -> str | None:
    """What to say of a sequence whose only damage are the signs that join chains; ``None`` for any other."""
    damage = set(sequence.replace(_MASK, "")) - set(alphabet.residues) - _REPLACEABLE
    if not damage or damage - _CHAIN_BREAKS:
        return None
    return (
        f"not a residue but the joint of two chains: {listing(sequence, sorted(damage))}; write each chain as a "
        "sequence of its own (a linker of G between them would change the result)"
    )


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


def _gaps_in(sequence: str) -> int:
    return sum(map(sequence.count, GAPS))


def _looks_like_nucleotides(sequence: str) -> bool:
    """Nothing but nucleotides, ambiguous ones and gaps; ``NUCLEOTIDES`` letters or more are A, C, G, T, U or N.

    Three of A, C, G, T and U occur, and four if letters are ambiguous: proteins have few cysteines.
    """
    # Proteins have an L. Without one, strip() stops at the first letter that is no nucleotide.
    if "L" in sequence or sequence.strip(f"{_NUCLEOTIDES}{_AMBIGUOUS}{GAPS}\n"):
        return False
    counts = list(map(sequence.count, _NUCLEOTIDES))
    least = 3 if set(_AMBIGUOUS).isdisjoint(sequence) else 4
    return sum(counts) >= NUCLEOTIDES and sum(map(bool, counts[:-1])) >= least


def _tidied(sequence: str, gaps: Gaps, masks: bool, details: list[str]) -> tuple[str, int]:
    """Make the changes that leave no doubt about the residues, and count the letters."""
    dropped = _gaps_in(sequence) if gaps == "drop" else 0
    if dropped:
        details.append(f"{counted(dropped, 'gap')} removed")
        sequence = sequence.translate(_NO_GAPS)
    closed = _BLANK.sub("", sequence)
    upper = _translated(closed, _TO_UPPER, masks)
    bare = upper.rstrip("*")
    blanks, stops = len(sequence) - len(closed), len(upper) - len(bare)
    raised = sum(a != b for a, b in zip(closed, upper, strict=True)) if closed != upper else 0
    if blanks:
        details.append(f"{counted(blanks, 'blank')} removed")
    if raised:
        details.append(f"{raised} lower-case letters changed to upper case")
    if stops:
        details.append("stop removed at the end" if stops == 1 else "stops removed at the end")
    return bare, dropped + blanks + raised + stops


def _translated(sequence: str, table: dict[int, str], masks: bool) -> str:
    if not masks:
        return sequence.translate(table)
    return _MASK.join(part.translate(table) for part in sequence.split(_MASK))
