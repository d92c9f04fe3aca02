"""Variants of a protein: what they change, whether they fit, and all single substitutions.

Residues are counted from ``offset``, the number of the first one. Knows nothing of models or tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.errors import UsageError, VariantError
from protea.text import shown

CANONICAL: Final = "ACDEFGHIKLMNPQRSTVWY"
"""The letters of a single-site scan."""

_AMBIGUOUS: Final = {
    "X": "an unknown residue or, in old notation, a stop, which models cannot score",
    "B": "D or N",
    "Z": "E or Q",
    "J": "I or L",
}
"""Letters that stand for several residues. Models were trained on some of them, but a variant must say what it is."""

_POSITIONS: Final = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", re.ASCII)


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

    @property
    def lengthens_by(self) -> int:
        """The number of residues that the protein gains; negative if it loses some."""
        return sum(len(edit.new) - (edit.end - edit.start) for edit in self.edits)

    def apply(self, sequence: str) -> str:
        """The changed sequence."""
        for edit in reversed(self.edits):
            sequence = sequence[: edit.start] + edit.new + sequence[edit.end :]
        return sequence


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
            if letter == "*":
                raise VariantError(f"{variant.name}: adds a stop codon; models score residues only")
            if letter in _AMBIGUOUS and edit.new.count(letter) > sequence[edit.start : edit.end].count(letter):
                raise VariantError(f"{variant.name}: {letter} stands for {_AMBIGUOUS[letter]}; name the residue")
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


def chosen_places(name: str, sequence: str, positions: str | Iterable[int] | None, offset: int = 1) -> Sequence[int]:
    """Places of a protein, from 0, in order: all, or those of ``positions`` such as ``10-40,55``.

    Positions are counted from ``offset``. A ``UsageError`` names one that the protein lacks.
    """
    if positions is None:
        return range(len(sequence))
    places: set[int] = set()
    for part in positions.split(",") if isinstance(positions, str) else map(shown, map(int, positions)):
        match = _POSITIONS.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"positions: {part!r} is neither a position nor a range; write 10-40,55")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"positions: {part} ends before it begins; write the smaller position first")
        for position in (first, last):
            if not 0 <= position - offset < len(sequence):
                raise UsageError(
                    f"positions: {position} is outside residues {offset} to {len(sequence) + offset - 1} of {name}"
                )
        places.update(range(first - offset, last - offset + 1))
    return sorted(places)


def single_substitutions(sequence: str, places: Iterable[int]) -> Iterator[tuple[int, str]]:
    """A single-site scan: each of the places, from 0, with every other amino acid; gaps are skipped."""
    for place in places:
        wild = sequence[place]
        yield from ((place, new) for new in CANONICAL if wild.isalpha() and new != wild)


def scan_cells(sequence: str, places: Iterable[int], scores: Iterable[float]) -> NDArray[np.float64]:
    """The scores of a scan as ``[L, 20]``, columns as in ``CANONICAL``; cells that were not scored are NaN."""
    cells = np.full((len(sequence), len(CANONICAL)), np.nan)
    for (place, new), score in zip(single_substitutions(sequence, places), scores, strict=True):
        cells[place, CANONICAL.index(new)] = score
    return cells


def difference(wild: str, mutated: str, offset: int = 1) -> Variant:
    """The variant that makes one sequence of another: substitutions if their lengths agree, else one replacement."""
    if wild == mutated:
        return Variant("wild type", ())
    if len(wild) == len(mutated):
        places = [place for place, letter in enumerate(wild) if mutated[place] != letter]
        edits = tuple(Edit(place, place + 1, mutated[place], ((place, wild[place]),)) for place in places)
        return Variant(":".join(f"{wild[place]}{place + offset}{mutated[place]}" for place in places), edits)
    start = _shared(wild, mutated)
    tail = _shared(wild[start:][::-1], mutated[start:][::-1])
    end, new = len(wild) - tail, mutated[start : len(mutated) - tail]
    first, last = start + offset, end + offset - 1
    residues = f"residue {first}" if first == last else f"residues {first} to {last}"
    if start == end:
        name = f"{new} inserted {f'after residue {last}' if start else f'before residue {first}'}"
    else:
        name = f"{residues} replaced by {new}" if new else f"{residues} deleted"
    return Variant(name, (Edit(start, end, new, ()),))


def _shared(first: str, second: str) -> int:
    """The number of letters that two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
