"""Variants of a protein: what users write, and what it means.

    A24V             a substitution; several by colon: A24V:G30S
    A24del           a deletion; A24_G30del of several residues
    A24_G25insKL     an insertion between two neighbours
    A24_G30delinsKL  a replacement of some residues by any number

Residues are counted from ``offset``, the number of the first one. Knows nothing of models or tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from protea.alphabet import Alphabet
from protea.errors import VariantError

CANONICAL: Final = "ACDEFGHIKLMNPQRSTVWY"
"""The letters of a single-site scan."""

SEPARATOR: Final = ":"

_SUBSTITUTION: Final = re.compile(r"(?P<first>[A-Z])(?P<start>-?\d{1,9})(?P<new>[A-Z*])", re.ASCII)
_REPLACEMENT: Final = re.compile(
    r"(?P<first>[A-Z])(?P<start>-?\d{1,9})(_(?P<last>[A-Z])(?P<end>-?\d{1,9}))?(?P<kind>delins|del|ins)(?P<new>[A-Z]*)",
    re.ASCII,
)


_SHOWN: Final = 60
"""Letters of what is no variant that a message shows."""


class Edit(NamedTuple):
    """One change.

    Attributes:
        start: the first residue that goes, from 0; an insertion comes before it.
        end: the residue after the last that goes.
        new: what comes instead.
        stated: the residues that were named, with their places from 0.
    """

    start: int
    end: int
    new: str
    stated: tuple[tuple[int, str], ...]

    @property
    def is_substitution(self) -> bool:
        """Whether one residue takes the place of one."""
        return self.end - self.start == 1 == len(self.new)


class Variant(NamedTuple):
    """Some changes of one protein.

    Attributes:
        name: as it was written.
        edits: in the order of their places.
    """

    name: str
    edits: tuple[Edit, ...]

    @property
    def is_substitution(self) -> bool:
        """Whether all of its changes are."""
        return all(edit.is_substitution for edit in self.edits)

    def apply(self, sequence: str) -> str:
        """The changed sequence."""
        for edit in reversed(self.edits):
            sequence = sequence[: edit.start] + edit.new + sequence[edit.end :]
        return sequence


def parse(text: str, offset: int = 1) -> Variant:
    """Read a variant.

    Args:
        text: as the module says; lower case will not do.
        offset: the number of the protein's first residue.

    Raises:
        VariantError: it is spelled in no such way, changes a residue twice, or brings a stop codon.
    """
    edits = sorted(_edit(part, offset, text) for part in text.strip().split(SEPARATOR))
    for one, other in pairwise(edits):
        if other.start < one.end or (one.start, one.end) == (other.start, other.end):
            raise VariantError(f"{text}: changes residue {other.start + offset} twice")
    return Variant(text, tuple(edits))


def _edit(text: str, offset: int, whole: str) -> Edit:
    found = _SUBSTITUTION.fullmatch(text)
    if found:
        if found["new"] == "*":
            raise VariantError(f"{text}: a stop codon; models score residues, not where a protein ends")
        start = int(found["start"]) - offset
        return Edit(start, start + 1, found["new"], ((start, found["first"]),))
    found = _REPLACEMENT.fullmatch(text)
    if found is None:
        part = "" if text == whole.strip() else f"{text!r} is "
        why = "letters are upper case; " if text != text.upper() and not text.isupper() else ""
        shown = whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}…"
        raise VariantError(
            f"{shown!r}: {part}no variant; {why}write A24V, A24V:G30S, A24del, A24_G30del, A24_G25insKL or "
            "A24_G30delinsKL"
        )
    start, kind, new = int(found["start"]) - offset, found["kind"], found["new"]
    end = start if found["end"] is None else int(found["end"]) - offset
    stated = tuple(dict.fromkeys([(start, found["first"]), (end, found["last"] or found["first"])]))
    if (kind == "del") == bool(new):
        raise VariantError(f"{text}: {'a deletion brings nothing' if new else 'what is inserted is missing'}")
    if kind == "ins":
        if end != start + 1:
            raise VariantError(f"{text}: an insertion lies between two neighbours, as in A24_G25insKL")
        return Edit(end, end, new, stated)
    if end < start:
        raise VariantError(f"{text}: ends before it begins")
    return Edit(start, end + 1, new, stated)


def check(variant: Variant, sequence: str, alphabet: Alphabet, offset: int = 1) -> None:
    """See that a variant fits a protein.

    Raises:
        VariantError: a place is outside, holds another residue than stated, a letter is no residue, or none is left.
    """
    for edit in variant.edits:
        for place, letter in edit.stated:
            if not 0 <= place < len(sequence):
                raise VariantError(
                    f"{variant.name}: position {place + offset} is outside; residues are {offset} to "
                    f"{len(sequence) + offset - 1}"
                )
            if sequence[place] != letter:
                raise VariantError(f"{variant.name}: position {place + offset} holds {sequence[place]}, not {letter}")
        for letter in edit.new:
            if letter not in alphabet.residues:
                raise VariantError(f"{variant.name}: {letter!r} is not in the {alphabet.name} alphabet")
    if not variant.apply(sequence):
        raise VariantError(f"{variant.name}: no residue would be left")


def explaining_offset(variants: Iterable[Variant], sequence: str, offset: int) -> int | None:
    """The only other offset with which all stated residues would be where they are said to be, if there is one."""
    stated = {pair for variant in variants for edit in variant.edits for pair in edit.stated}
    if len(stated) < 2:
        return None
    first, last = min(place for place, _ in stated), max(place for place, _ in stated)
    fitting = [
        shift
        for shift in range(-first, len(sequence) - last)
        if all(sequence[place + shift] == letter for place, letter in stated)
    ]
    return offset - fitting[0] if len(fitting) == 1 and fitting[0] else None


def parse_all(texts: Sequence[str], sequence: str, alphabet: Alphabet, offset: int = 1) -> list[Variant]:
    """Variants that all fit a protein.

    Raises:
        VariantError: the first that does not, and the offset with which all would, if there is one.
    """
    for text in texts:
        if not isinstance(text, str):
            raise VariantError(f"{text!r}: no variant; write 'A24V'")
    parsed = [parse(text, offset) for text in texts]
    for variant in parsed:
        try:
            check(variant, sequence, alphabet, offset)
        except VariantError as error:
            shift = explaining_offset(parsed, sequence, offset)
            advice = "" if shift is None else f"; all {len(parsed):,} would fit with offset={shift}"
            raise VariantError(f"{error}{advice}") from error
    return parsed


def single_substitutions(sequence: str) -> Iterator[tuple[int, str]]:
    """A single-site scan: places from 0, and at each every amino acid that does not stand there; gaps passed over."""
    for place, wild in enumerate(sequence):
        yield from ((place, new) for new in CANONICAL if wild.isalpha() and new != wild)


def difference(wild: str, mutated: str, offset: int = 1) -> Variant:
    """What leads from one sequence to another: substitutions where they are of one length, else one replacement.

    Nothing leads from a sequence to itself: the wild type, whose score is 0.
    """
    if wild == mutated:
        return Variant("wild type", ())
    if len(wild) == len(mutated):
        places = [i for i, (a, b) in enumerate(zip(wild, mutated, strict=True)) if a != b]
        edits = tuple(Edit(i, i + 1, mutated[i], ((i, wild[i]),)) for i in places)
        return Variant(SEPARATOR.join(f"{wild[i]}{i + offset}{mutated[i]}" for i in places), edits)
    start = _shared(wild, mutated)
    tail = _shared(wild[start:][::-1], mutated[start:][::-1])
    end, new = len(wild) - tail, mutated[start : len(mutated) - tail]
    name = f"residues {start + offset} to {end + offset - 1} become {new or 'nothing'}"
    return Variant(name, (Edit(start, end, new, ()),))


def _shared(one: str, other: str) -> int:
    """How many letters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
