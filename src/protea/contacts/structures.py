"""Chains of structure files as a model sees them, and which of their residues are in contact.

Residues that an experiment did not see have no atoms in a file. Where the file states the sequence of the molecule
(``SEQRES``, ``entity_poly_seq``), the model sees that sequence, and each residue with coordinates has its place in it.
Elsewhere the model sees the residues that have atoms. Gaps in their numbers then count as missing residues where the
chain is broken; they do not count within an unbroken chain, where the numberings of antibodies, for example, skip.

Shapes: S residues of the sequence, R of them with coordinates, P pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.contacts.places import breaks, fit_into, ordered
from protea.contacts.structure_files import (
    SUFFIXES,
    RawChain,
    Residue,
    is_modified,
    is_structure,
    letter,
    raw_chains,
    structure_name,
)
from protea.errors import StructureError
from protea.letters import ReportRow
from protea.progress import SILENT, Progress

CONTACT: Final = 8.0
"""Two residues are in contact if their CB atoms are closer than this, in Ångström."""

LEAST_SEPARATION: Final = 6
"""Pairs nearer along the chain do not count."""


@dataclass(frozen=True)
class Chain:
    """A protein chain.

    Attributes:
        name: file and chain, ``1abc:A``.
        sequence: ``[S]`` letters that a model sees.
        places: ``[R]`` indices in the sequence of the residues with coordinates.
        positions: ``[R]`` places along the molecule; they count missing residues that the sequence leaves out.
        points: ``[R, 3]`` positions of CB; CA for glycine, and where CB is absent.
        notes: what was altered or is missing: ``altered``, ``incomplete`` or ``odd``.
    """

    name: str
    sequence: str
    places: NDArray[np.int64]
    positions: NDArray[np.int64]
    points: NDArray[np.float32]
    notes: tuple[ReportRow, ...] = ()

    @property
    def resolved(self) -> int:
        """R, which is the L of contact precision."""
        return len(self.places)


class Pairs(NamedTuple):
    """Pairs ``[P]``: both places in the sequence, their distance along the molecule, whether they are in contact."""

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


def contact_map(chain: Chain) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """``[S, S]`` which ``pairs`` are in contact, symmetric, and ``[S]`` which residues have no coordinates."""
    length = len(chain.sequence)
    contacts, missing = np.zeros((length, length), bool), np.ones(length, bool)
    rows, columns, _, touch = pairs(chain)
    contacts[rows[touch], columns[touch]] = True
    missing[chain.places] = False
    return contacts | contacts.T, missing


def structure_files(paths: Iterable[Path]) -> list[Path]:
    """The files, and the structure files in the folders; each file once.

    Raises:
        StructureError: a path does not exist, or a folder holds no structure.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise StructureError(f"{path}: no such file or folder")
        inside = sorted(filter(is_structure, path.iterdir())) if path.is_dir() else [path]
        if not inside:
            raise StructureError(
                f"{path}: no structures in this folder; looked for *{', *'.join(SUFFIXES)}, also compressed"
            )
        for file in inside:
            files.setdefault(file.resolve(), file)
    return list(files.values())


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


def read_structures(paths: Iterable[Path], progress: Progress = SILENT) -> tuple[list[Chain], list[ReportRow]]:
    """The chains of files and folders, and rows on these chains and on what was skipped.

    A file without protein is skipped, and so is a chain whose name was read before.

    Raises:
        MissingExtraError: biotite is not installed.
        StructureError: a path does not exist, a folder holds no structure, or no file holds a chain.
    """
    files = structure_files(paths)
    chains: dict[str, Chain] = {}
    rows: list[ReportRow] = []
    sources: dict[str, Path] = {}
    progress.begin("structures", len(files))
    for path in files:
        try:
            in_file = read_chains(path)
        except StructureError as error:
            rows.append(ReportRow(structure_name(path), "skipped", str(error)))
            in_file = []
        for chain in in_file:
            if chain.name in chains:
                detail = f"{path}: a chain of this name was read from {sources[chain.name]}; rename the file"
                rows.append(ReportRow(chain.name, "skipped", detail))
            else:
                chains[chain.name], sources[chain.name] = chain, path
                rows += chain.notes
        progress.advance()
    if not chains:
        raise StructureError(f"none of {len(files)} files holds a protein; the first: {rows[0].detail}")
    return list(chains.values()), rows


def _chain(name: str, raw: RawChain) -> Chain | None:
    placed = _placed(raw)
    points = [_point(residue) for residue in placed.residues]
    resolved = np.array([point is not None for point in points], bool)
    if not resolved.any():
        return None
    return Chain(
        name=name,
        sequence=placed.sequence,
        places=placed.places[resolved],
        positions=placed.positions[resolved],
        points=np.stack([point for point in points if point is not None]).astype(np.float32),
        notes=(
            *(ReportRow(name, "odd", remark) for remark in placed.remarks),
            *(ReportRow(name, *note) for note in _notes(placed, int(resolved.sum()))),
        ),
    )


def _point(residue: Residue) -> NDArray[np.float32] | None:
    """The position of CB, or of CA."""
    alpha = residue.atoms.get("CA")
    return alpha if residue.name == "GLY" else residue.atoms.get("CB", alpha)


class _Placed(NamedTuple):
    """Residues of a chain, their places in a sequence and along the molecule, and what is odd about them."""

    residues: list[Residue]
    sequence: str
    places: NDArray[np.int64]
    positions: NDArray[np.int64]
    remarks: list[str]


def _placed(raw: RawChain) -> _Placed:
    stated = "".join(map(letter, raw.stated))
    given = [residue.place for residue in raw.residues if residue.place is not None]
    if len(given) == len(raw.residues):
        places = np.array(given, np.int64)
        return _Placed(raw.residues, stated, places, places, raw.remarks)
    residues, free = ordered(raw.residues)
    remarks = raw.remarks + [
        f"{residue.name} {residue.label} is bound to no residue and was left out" for residue in free
    ]
    letters = "".join(letter(residue.name) for residue in residues)
    broken = breaks(residues)
    if stated:
        fitted = fit_into(stated, letters, broken)
        if fitted is not None:
            return _Placed(residues, stated, fitted, fitted, remarks)
        remarks.append("its atoms do not agree with its SEQRES; the model sees the residues that have atoms")
    remarks += [
        f"broken between {before.label} and {after.label}, which are numbered as neighbours"
        for (before, after), gap in zip(pairwise(residues), broken, strict=True)
        if gap == 0
    ]
    positions = np.cumsum([0, *(1 + (gap or 0) for gap in broken)])
    return _Placed(residues, letters, np.arange(len(residues)), positions[: len(residues)], remarks)


def _notes(placed: _Placed, resolved: int) -> Iterator[tuple[str, str]]:
    """What is missing or altered, as ``what`` and ``detail``."""
    if missing := len(placed.sequence) - resolved:
        yield (
            "incomplete",
            f"residues without coordinates: {missing} of {len(placed.sequence)}; their pairs are left out",
        )
    if unseen := int(placed.positions[-1] - placed.places[-1]):
        yield "incomplete", f"residues missing by number: {unseen}; the model does not see them"
    without = [residue for residue in placed.residues if residue.name != "GLY" and "CB" not in residue.atoms]
    if bare := sum("CA" in residue.atoms for residue in without):
        yield "incomplete", f"residues without CB: {bare}; CA is used"
    names = Counter(residue.name for residue in placed.residues if is_modified(residue.name))
    for name, count in sorted(names.items()):
        yield "altered", f"{count} {name} read as {letter(name)}"
