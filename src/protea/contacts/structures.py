"""Chains of structure files as a model sees them, and which of their residues are in contact.

Residues that an experiment did not see are missing from a file's atoms. Where the file states the whole sequence
(``SEQRES``, ``entity_poly_seq``), that is what the model sees, and each residue with coordinates has its place in it.
Elsewhere the model sees the residues that are there, and gaps in their numbering count where the chain is broken; a
numbering that skips within an unbroken chain, as those of antibodies do, does not.

Shapes: S residues of the sequence, R of them with coordinates, P pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.contacts.fit import Progress
from protea.contacts.places import breaks, fit_into, ordered
from protea.contacts.structure_files import (
    SUFFIXES,
    Point,
    RawChain,
    Residue,
    is_modified,
    is_structure,
    letter,
    raw_chains,
    structure_name,
)
from protea.errors import StructureError

CONTACT: Final = 8.0
"""Ångström between CB atoms, below which two residues are in contact."""

LEAST_SEPARATION: Final = 6
"""Pairs nearer along the chain are no matter of prediction."""


class Note(NamedTuple):
    """Something that was not as it should be.

    Attributes:
        name: of the chain or file.
        what: ``skipped``, ``left out``, ``altered``, ``incomplete`` or ``odd``.
        detail: in words.
    """

    name: str
    what: str
    detail: str


@dataclass(frozen=True)
class Chain:
    """A protein chain.

    Attributes:
        name: file and chain, ``1abc:A``.
        sequence: ``[S]`` letters, what a model is to see.
        places: ``[R]`` indices of the residues with coordinates in it.
        positions: ``[R]`` their places along the molecule, which count missing residues that the sequence leaves out.
        points: ``[R, 3]`` positions of CB; CA for glycine, and where CB is absent.
        labels: ``[R]`` their numbers in the file, with insertion codes.
        notes: what was altered or is missing.
    """

    name: str
    sequence: str
    places: NDArray[np.int64]
    positions: NDArray[np.int64]
    points: NDArray[np.float32]
    labels: tuple[str, ...]
    notes: tuple[Note, ...] = ()

    @property
    def resolved(self) -> int:
        """R, what contact precision calls L."""
        return len(self.places)


class Pairs(NamedTuple):
    """Pairs of residues with coordinates, the first before the second.

    Attributes:
        rows: ``[P]`` places of the first in the sequence.
        columns: ``[P]`` places of the second.
        separations: ``[P]`` how far they are apart along the molecule.
        contacts: ``[P]`` whether they are in contact.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    separations: NDArray[np.int64]
    contacts: NDArray[np.bool_]


def pairs(chain: Chain) -> Pairs:
    """All pairs that are at least ``LEAST_SEPARATION`` apart."""
    first, second = np.triu_indices(chain.resolved, 1)
    separations = chain.positions[second] - chain.positions[first]
    far = separations >= LEAST_SEPARATION
    first, second = first[far], second[far]
    distances = np.linalg.norm(chain.points[first] - chain.points[second], axis=1)
    return Pairs(chain.places[first], chain.places[second], separations[far], distances < CONTACT)


class Map(NamedTuple):
    """What a structure says of all pairs of a sequence.

    Attributes:
        contacts: ``[S, S]`` whether residues at least ``LEAST_SEPARATION`` apart are in contact; symmetric.
        missing: ``[S]`` residues without coordinates.
    """

    contacts: NDArray[np.bool_]
    missing: NDArray[np.bool_]


def contact_map(chain: Chain) -> Map:
    """The contacts of a chain as a picture has them."""
    length = len(chain.sequence)
    found = Map(np.zeros((length, length), bool), np.ones(length, bool))
    rows, columns, _, touch = pairs(chain)
    found.contacts[rows[touch], columns[touch]] = True
    found.contacts[columns[touch], rows[touch]] = True
    found.missing[chain.places] = False
    return found


def structure_files(paths: Iterable[Path]) -> list[Path]:
    """Files, and for folders the structure files in them by name, each once.

    Raises:
        StructureError: a path is not there, or a folder holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise StructureError(f"{path}: no such file or folder")
        inside = [path]
        if path.is_dir():
            inside = sorted(one for one in path.iterdir() if is_structure(one) and not one.name.startswith("."))
        if not inside:
            raise StructureError(
                f"{path}: no structures in this folder; looked for *{', *'.join(SUFFIXES)}, also compressed"
            )
        for one in inside:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def read_chains(path: Path) -> list[Chain]:
    """The protein chains of a file.

    Raises:
        MissingExtraError: biotite is not installed.
        StructureError: the file is missing, unreadable, empty, or holds no protein with coordinates.
    """
    stem = structure_name(path)
    chains: dict[str, Chain] = {}
    for raw in raw_chains(path):
        name = f"{stem}:{raw.name}" if raw.name else stem
        while name in chains:
            name += "'"
        chain = _chain(name, raw)
        if chain is not None:
            chains[name] = chain
    if not chains:
        raise StructureError(f"{path}: no protein in it")
    return list(chains.values())


def read_structures(files: Sequence[Path], progress: Progress) -> tuple[list[Chain], list[Note]]:
    """The chains of some files, and notes on them and on what cannot be read.

    Args:
        files: each is skipped with a note if it holds no protein, and so is a chain whose name was there before.
        progress: told how far it is.

    Raises:
        MissingExtraError: biotite is not installed.
        StructureError: there is no chain in any of them.
    """
    chains: dict[str, Chain] = {}
    notes: list[Note] = []
    sources: dict[str, Path] = {}
    for number, path in enumerate(files):
        progress("structures", number, len(files))
        try:
            found = read_chains(path)
        except StructureError as error:
            notes.append(Note(structure_name(path), "skipped", str(error)))
            continue
        for chain in found:
            if chain.name in chains:
                detail = f"{path}: a chain of this name was read from {sources[chain.name]}; rename the file"
                notes.append(Note(chain.name, "skipped", detail))
                continue
            chains[chain.name], sources[chain.name] = chain, path
            notes += chain.notes
    if not chains:
        raise StructureError(f"no protein in {len(files)} files; of the first: {notes[0].detail}")
    return list(chains.values()), notes


def _chain(name: str, raw: RawChain) -> Chain | None:
    placed = _placed(raw)
    points = [_point(one) for one in placed.residues]
    there = np.array([point is not None for point in points], bool)
    if not there.any():
        return None
    mixed = [f"residue {label} is of several kinds; the first was taken" for label in dict.fromkeys(raw.mixed)]
    missing = len(placed.sequence) - int(there.sum())
    return Chain(
        name=name,
        sequence=placed.sequence,
        places=placed.places[there],
        positions=placed.positions[there],
        points=np.stack([point for point in points if point is not None]).astype(np.float32),
        labels=tuple(one.label for one, known in zip(placed.residues, there, strict=True) if known),
        notes=(
            *(Note(name, "odd", remark) for remark in (*mixed, *placed.remarks)),
            *(Note(name, *odd) for odd in _odd(placed, missing)),
        ),
    )


def _point(residue: Residue) -> Point | None:
    """Where a residue is: CB, or CA."""
    alpha = residue.atoms.get("CA")
    return alpha if residue.name == "GLY" else residue.atoms.get("CB", alpha)


class _Placed(NamedTuple):
    """Residues of a chain, their places in a sequence and along the molecule, and what is to be said of that."""

    residues: list[Residue]
    sequence: str
    places: NDArray[np.int64]
    positions: NDArray[np.int64]
    remarks: list[str]


def _placed(raw: RawChain) -> _Placed:
    stated = "".join(map(letter, raw.stated or []))
    by_file = [one.place for one in raw.residues if one.place is not None]
    if len(by_file) == len(raw.residues):
        places = np.array(by_file, np.int64)
        return _Placed(raw.residues, stated, places, places, [])
    residues, free = ordered(raw.residues)
    remarks = raw.remarks + [f"{one.name} {one.label} is bound to no residue and was left out" for one in free]
    letters = "".join(letter(one.name) for one in residues)
    broken = breaks(residues)
    if stated:
        found = fit_into(stated, letters, broken)
        if found is not None:
            return _Placed(residues, stated, found, found, remarks)
        remarks.append("its atoms do not agree with its SEQRES; the model sees the residues that have atoms")
    remarks += [
        f"broken between {one.label} and {after.label}, which are numbered as neighbours"
        for (one, after), gap in zip(pairwise(residues), broken, strict=True)
        if gap == 0
    ]
    positions = np.cumsum([0, *(1 + (gap or 0) for gap in broken)])
    return _Placed(residues, letters, np.arange(len(residues)), positions[: len(residues)], remarks)


def _odd(placed: _Placed, missing: int) -> Iterator[tuple[str, str]]:
    """What is missing or altered, as a note says it."""
    if missing:
        yield (
            "incomplete",
            f"residues without coordinates: {missing} of {len(placed.sequence)}; their pairs are left out",
        )
    if unseen := int(placed.positions[-1] - placed.places[-1]):
        yield "incomplete", f"residues missing by number: {unseen}; the model does not see them"
    if bare := sum(one.name != "GLY" and "CA" in one.atoms and "CB" not in one.atoms for one in placed.residues):
        yield "incomplete", f"residues without CB: {bare}; CA was taken"
    for name, count in sorted(Counter(one.name for one in placed.residues if is_modified(one.name)).items()):
        yield "altered", f"{count} {name} read as {letter(name)}"
