"""Where residues with coordinates lie in their molecule: what is bonded, what is missing between, what fits where.

Knows residues with backbone atoms and nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.contacts.structure_files import Residue

_PEPTIDE_BOND: Final = 2.0
"""Ångström, C to N: 1.33, and room for poor models."""

_NEIGHBOURS: Final = 4.5
"""Ångström, CA to CA, where C or N is absent: 3.8."""


def bonded(one: Residue, after: Residue) -> bool:
    """Whether a peptide bond joins two residues."""
    for atom, next_atom, most in (("C", "N", _PEPTIDE_BOND), ("CA", "CA", _NEIGHBOURS)):
        if atom in one.atoms and next_atom in after.atoms:
            return float(np.linalg.norm(one.atoms[atom] - after.atoms[next_atom])) <= most
    return False


def ordered(residues: Sequence[Residue]) -> tuple[list[Residue], list[Residue]]:
    """Residues of a chain in the order of their bonds, and apart from them free amino acids.

    PDB files list free amino acids with a chain, as heterogens; and some list its modified residues so, after all
    others. What is bonded to the chain belongs beside what it is bonded to.
    """
    pieces: list[list[Residue]] = []
    for one in residues:
        if pieces and bonded(pieces[-1][-1], one):
            pieces[-1].append(one)
        else:
            pieces.append([one])
    chain = [piece for piece in pieces if not all(one.hetero for one in piece)]
    loose = [piece for piece in pieces if all(one.hetero for one in piece)]
    if not chain:  # of modified residues alone, as some antibiotics
        chain, loose = [piece for piece in loose if len(piece) > 1], [piece for piece in loose if len(piece) == 1]
    waiting = len(loose) + 1
    while len(loose) < waiting:
        waiting = len(loose)
        loose = [piece for piece in loose if not _insert(piece, chain)]
    return [one for piece in chain for one in piece], [one for piece in loose for one in piece]


def _insert(piece: list[Residue], chain: list[list[Residue]]) -> bool:
    """Put a piece beside what it is bonded to, if there is any."""
    for i, other in enumerate(chain):
        if bonded(other[-1], piece[0]):
            chain.insert(i + 1, piece)
            return True
        if bonded(piece[-1], other[0]):
            chain.insert(i, piece)
            return True
    return False


def breaks(residues: Sequence[Residue]) -> list[int | None]:
    """For each residue but the first what is missing before it by number, 0 included; ``None`` where nothing is.

    Numbers count only where the chain is broken: numberings made for a family skip, and repeat with insertion codes.
    """
    return [None if bonded(one, after) else max(after.number - one.number - 1, 0) for one, after in pairwise(residues)]


class _Stretch(NamedTuple):
    """Residues without a break between them: their letters, and how many are missing before them by number."""

    letters: str
    missing: int


def fit_into(stated: str, letters: str, broken: Sequence[int | None]) -> NDArray[np.int64] | None:
    """Places of residues in a stated sequence, of which they are a part.

    Unbroken stretches keep together and in order. Where several places are possible, those nearest to what the
    numbers say are taken, the first among equals.

    Args:
        stated: the whole sequence.
        letters: those of the residues.
        broken: as ``breaks`` gives it.

    Returns:
        A place for each residue, or nothing if they do not fit.
    """
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # by end: what is not as numbered, starts so far
    stretches = list(_stretches(letters, broken))
    for number, stretch in enumerate(stretches):
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start in _occurrences(stretch.letters, stated):
            before = [
                (odd + (abs(start - end - stretch.missing) if number else 0), starts)
                for end, (odd, starts) in best.items()
                if end <= start
            ]
            if before:
                odd, starts = min(before)
                found[start + len(stretch.letters)] = (odd, (*starts, start))
        best = found
    if not best:
        return None
    _, starts = min(best.values())
    return np.concatenate(
        [np.arange(start, start + len(one.letters)) for start, one in zip(starts, stretches, strict=True)]
    )


def _stretches(letters: str, broken: Sequence[int | None]) -> Iterator[_Stretch]:
    start, missing = 0, 0
    for i, gap in enumerate(broken, start=1):
        if gap is not None:
            yield _Stretch(letters[start:i], missing)
            start, missing = i, gap
    yield _Stretch(letters[start:], missing)


def _occurrences(part: str, whole: str) -> Iterator[int]:
    at = whole.find(part)
    while at >= 0:
        yield at
        at = whole.find(part, at + 1)
