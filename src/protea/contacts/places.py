"""Where residues with coordinates lie in their molecule: which are bonded, which are missing, where they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protea.contacts.structure_files import Residue

_PEPTIDE_BOND: Final = 2.0
"""Longest distance from C to N in Ångström: 1.33, plus room for poor models."""

_NEIGHBOURS: Final = 4.5
"""Longest distance from CA to CA in Ångström, where C or N is absent: 3.8, plus room."""


def bonded(residue: Residue, after: Residue) -> bool:
    """Whether a peptide bond joins two residues."""
    for atom, next_atom, longest in (("C", "N", _PEPTIDE_BOND), ("CA", "CA", _NEIGHBOURS)):
        if atom in residue.atoms and next_atom in after.atoms:
            return float(np.linalg.norm(residue.atoms[atom] - after.atoms[next_atom])) <= longest
    return False


def ordered(residues: Sequence[Residue]) -> tuple[list[Residue], list[Residue]]:
    """The residues of a chain in the order of their bonds, and separately the free amino acids.

    PDB files list free amino acids as heterogens of a chain, and some files list modified residues so, after all
    others. A heterogen that is bonded to the chain belongs next to its neighbour.
    """
    pieces: list[list[Residue]] = []
    for residue in residues:
        if pieces and bonded(pieces[-1][-1], residue):
            pieces[-1].append(residue)
        else:
            pieces.append([residue])
    chain = [piece for piece in pieces if not all(residue.hetero for residue in piece)]
    loose = [piece for piece in pieces if all(residue.hetero for residue in piece)]
    if not chain:  # only modified residues, as in some antibiotics
        chain, loose = [piece for piece in loose if len(piece) > 1], [piece for piece in loose if len(piece) == 1]
    waiting = len(loose) + 1
    while len(loose) < waiting:
        waiting = len(loose)
        loose = [piece for piece in loose if not _insert(piece, chain)]
    return [residue for piece in chain for residue in piece], [residue for piece in loose for residue in piece]


def _insert(piece: list[Residue], chain: list[list[Residue]]) -> bool:
    """Put a piece next to the piece that it is bonded to, if there is one."""
    for i, neighbour in enumerate(chain):
        if bonded(neighbour[-1], piece[0]):
            chain.insert(i + 1, piece)
            return True
        if bonded(piece[-1], neighbour[0]):
            chain.insert(i, piece)
            return True
    return False


def breaks(residues: Sequence[Residue]) -> list[int | None]:
    """For each residue but the first, how many residues are missing before it; ``None`` if it is bonded.

    Numbers count only where the chain is broken: the numberings of some families skip, and repeat with insertion codes.
    """
    return [
        None if bonded(before, after) else max(after.number - before.number - 1, 0)
        for before, after in pairwise(residues)
    ]


def fit_into(stated: str, letters: str, broken: Sequence[int | None]) -> NDArray[np.int64] | None:
    """Places of residues in a stated sequence that contains them; ``None`` if they do not fit.

    Stretches without a break keep together and in order. Of several possible places, those nearest to what the numbers
    say count, and the first among equals. ``broken`` is what ``breaks`` gives.
    """
    # For each end of the stretches so far: the deviation from the numbers, and where the stretches start.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    stretches = list(_stretches(letters, broken))
    for number, (stretch, missing) in enumerate(stretches):
        extended: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start in _occurrences(stretch, stated):
            before = [
                (deviation + (abs(start - end - missing) if number else 0), starts)
                for end, (deviation, starts) in best.items()
                if end <= start
            ]
            if before:
                deviation, starts = min(before)
                extended[start + len(stretch)] = (deviation, (*starts, start))
        best = extended
    if not best:
        return None
    _, starts = min(best.values())
    spans = zip(starts, stretches, strict=True)
    return np.concatenate([np.arange(start, start + len(stretch)) for start, (stretch, _) in spans])


def _stretches(letters: str, broken: Sequence[int | None]) -> Iterator[tuple[str, int]]:
    """The letters of each stretch without a break, and how many residues are missing before it."""
    start, missing = 0, 0
    for i, gap in enumerate(broken, start=1):
        if gap is not None:
            yield letters[start:i], missing
            start, missing = i, gap
    yield letters[start:], missing


def _occurrences(part: str, text: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)
