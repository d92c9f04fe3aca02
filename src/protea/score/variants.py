"""Variants of a protein: their notation and what it means.

    A24V             a substitution; several are joined by colons: A24V:G30S
    A24del           a deletion; A24_G30del deletes several residues
    A24_G25insKL     an insertion between two neighbours
    A24_G30delinsKL  a replacement of residues by any number of others

Residues are counted from ``offset``, the number of the first one. Knows nothing of models or tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.errors import VariantError

CANONICAL: Final = "ACDEFGHIKLMNPQRSTVWY"
"""The letters of a single-site scan."""

_SEPARATOR: Final = ":"
_MOST_LETTERS_SHOWN: Final = 60
_NOTATIONS: Final = "A24V, A24V:G30S, A24del, A24_G30del, A24_G25insKL or A24_G30delinsKL"
_SUBSTITUTION: Final = re.compile(r"(?P<first>[A-Z])(?P<start>-?\d{1,9})(?P<new>[A-Z*])", re.ASCII)
_REPLACEMENT: Final = re.compile(
    r"(?P<first>[A-Z])(?P<start>-?\d{1,9})(_(?P<last>[A-Z])(?P<end>-?\d{1,9}))?(?P<kind>delins|del|ins)(?P<new>[A-Z]*)",
    re.ASCII,
)


class Edit(NamedTuple):
    """Residues from ``start`` up to ``end``, from 0, become ``new``; an insertion comes before ``start``.

    ``stated`` holds place and letter of the wild-type residues that the notation names.
    """

    start: int
    end: int
    new: str
    stated: tuple[tuple[int, str], ...]

    @property
    def is_substitution(self) -> bool:
        """Whether one residue replaces one."""
        return self.end - self.start == 1 == len(self.new)


class Variant(NamedTuple):
    """The changes of one protein, in the order of their places; ``name`` is the text they were read from."""

    name: str
    edits: tuple[Edit, ...]

    @property
    def is_substitution(self) -> bool:
        """Whether all changes are substitutions."""
        return all(edit.is_substitution for edit in self.edits)

    def apply(self, sequence: str) -> str:
        """The changed sequence."""
        for edit in reversed(self.edits):
            sequence = sequence[: edit.start] + edit.new + sequence[edit.end :]
        return sequence


def parse(text: str, offset: int = 1) -> Variant:
    """Read a variant; a ``VariantError`` says what is wrong with the text."""
    edits = sorted(_edit(part, offset, text) for part in text.strip().split(_SEPARATOR))
    for before, after in pairwise(edits):
        if after.start < before.end or (before.start, before.end) == (after.start, after.end):
            raise VariantError(f"{text}: changes residue {after.start + offset} twice")
    return Variant(text, tuple(edits))


def _edit(text: str, offset: int, variant: str) -> Edit:
    if match := _SUBSTITUTION.fullmatch(text):
        if match["new"] == "*":
            raise VariantError(f"{text}: adds a stop codon; models score residues only")
        start = int(match["start"]) - offset
        return Edit(start, start + 1, match["new"], ((start, match["first"]),))
    match = _REPLACEMENT.fullmatch(text)
    if match is None:
        shown = variant if len(variant) <= _MOST_LETTERS_SHOWN else f"{variant[:_MOST_LETTERS_SHOWN]}…"
        part = "" if text == variant.strip() else f"{text!r} is "
        advice = "use upper case and " if text != text.upper() else ""
        raise VariantError(f"{shown!r}: {part}not a variant; {advice}write {_NOTATIONS}")
    start, kind, new = int(match["start"]) - offset, match["kind"], match["new"]
    end = start if match["end"] is None else int(match["end"]) - offset
    stated = tuple(dict.fromkeys([(start, match["first"]), (end, match["last"] or match["first"])]))
    if kind == "del" and new:
        raise VariantError(f"{text}: a deletion adds no residues; write delins to replace residues by {new}")
    if kind != "del" and not new:
        raise VariantError(f"{text}: names no residues to insert; add them at the end")
    if kind == "ins":
        if end != start + 1:
            raise VariantError(f"{text}: an insertion lies between two neighbours, as in A24_G25insKL")
        return Edit(end, end, new, stated)
    if end < start:
        raise VariantError(f"{text}: ends before it begins; write the smaller position first")
    return Edit(start, end + 1, new, stated)


def check(variant: Variant, sequence: str, alphabet: Alphabet, offset: int = 1) -> None:
    """Refuse a variant that does not fit a protein, by a ``VariantError`` that says why."""
    for edit in variant.edits:
        for place, letter in edit.stated:
            if not 0 <= place < len(sequence):
                raise VariantError(
                    f"{variant.name}: position {place + offset} is outside residues {offset} to "
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
    """The only other offset at which the protein holds all residues that the variants name; ``None`` without one."""
    stated = {pair for variant in variants for edit in variant.edits for pair in edit.stated}
    if len(stated) < 2:  # one residue alone would fit at many offsets
        return None
    first, last = min(place for place, _ in stated), max(place for place, _ in stated)
    fitting = [
        shift
        for shift in range(-first, len(sequence) - last)
        if all(sequence[place + shift] == letter for place, letter in stated)
    ]
    return offset - fitting[0] if len(fitting) == 1 and fitting[0] else None


def parse_all(texts: Sequence[str], sequence: str, alphabet: Alphabet, offset: int = 1) -> list[Variant]:
    """Variants of one protein; a ``VariantError`` names the first that does not fit, and the offset if all would."""
    for text in texts:
        if not isinstance(text, str):
            raise VariantError(f"{text!r}: a variant is a string; write 'A24V'")
    variants = [parse(text, offset) for text in texts]
    for variant in variants:
        try:
            check(variant, sequence, alphabet, offset)
        except VariantError as error:
            better = explaining_offset(variants, sequence, offset)
            advice = "" if better is None else f"; all {len(variants):,} would fit with offset={better}"
            raise VariantError(f"{error}{advice}") from error
    return variants


def single_substitutions(sequence: str) -> Iterator[tuple[int, str]]:
    """A single-site scan: each place, from 0, with every other amino acid; gaps are skipped."""
    for place, wild in enumerate(sequence):
        yield from ((place, new) for new in CANONICAL if wild.isalpha() and new != wild)


def scan_cells(sequence: str, scores: Iterable[float]) -> NDArray[np.float64]:
    """The scores of a scan as ``[L, 20]``, columns as in ``CANONICAL``; the wild type's cells are NaN."""
    cells = np.full((len(sequence), len(CANONICAL)), np.nan)
    for (place, new), score in zip(single_substitutions(sequence), scores, strict=True):
        cells[place, CANONICAL.index(new)] = score
    return cells


def difference(wild: str, mutated: str, offset: int = 1) -> Variant:
    """The variant that makes one sequence of another: substitutions if their lengths agree, else one replacement."""
    if wild == mutated:
        return Variant("wild type", ())
    if len(wild) == len(mutated):
        places = [place for place, letter in enumerate(wild) if mutated[place] != letter]
        edits = tuple(Edit(place, place + 1, mutated[place], ((place, wild[place]),)) for place in places)
        return Variant(_SEPARATOR.join(f"{wild[place]}{place + offset}{mutated[place]}" for place in places), edits)
    start = _shared(wild, mutated)
    tail = _shared(wild[start:][::-1], mutated[start:][::-1])
    end, new = len(wild) - tail, mutated[start : len(mutated) - tail]
    name = f"residues {start + offset} to {end + offset - 1} become {new or 'nothing'}"
    return Variant(name, (Edit(start, end, new, ()),))


def _shared(first: str, second: str) -> int:
    """The number of letters that two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
