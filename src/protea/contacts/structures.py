"""Chains of structure files as a model sees them, and which of their residues are in contact.

Residues that an experiment did not see have no atoms in a file. Where the file states the sequence of the molecule
(``SEQRES``, ``entity_poly_seq``), the model sees that sequence, and each residue with coordinates has its place in it.
Otherwise the model sees the residues that have atoms. Gaps in their numbers then count as missing residues where the
chain is broken; they do not count within an unbroken chain, where the numberings of antibodies, for example, skip.

Shapes: S residues of the sequence, R of them with coordinates, P pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.contacts.structure_files import (
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
from protea.text import counted

CONTACT: Final = 8.0  # two residues are in contact if their CB atoms are closer than this, in Ångström
LEAST_SEPARATION: Final = 6  # pairs nearer along the chain do not count

_PEPTIDE_BOND: Final = 2.0  # longest distance from C to N in Ångström: 1.33, plus room for poor models
_NEIGHBOURS: Final = 4.5  # longest distance from CA to CA in Ångström, if C or N is absent: 3.8, plus room


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
    """The files, and the structure files in the folders; each file once."""
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise StructureError(f"{path}: no such file or folder")
        inside = sorted(filter(is_structure, path.iterdir())) if path.is_dir() else [path]
        if not inside:
            raise StructureError(f"{path}: no structures in this folder; expected .pdb, .ent, .cif or .mmcif, also .gz")
        for file in inside:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def read_chains(path: Path) -> list[Chain]:
    """The protein chains of a file; a ``StructureError`` if none has coordinates."""
    stem = structure_name(path)
    chains: dict[str, Chain] = {}
    for raw in raw_chains(path):
        name = f"{stem}:{raw.name}" if raw.name else stem
        while name in chains:
            name += "'"
        if chain := _chain(name, raw):
            chains[name] = chain
    if not chains:
        raise StructureError(f"{path}: no protein in it")
    return list(chains.values())


def read_structures(paths: Iterable[Path], progress: Progress = SILENT) -> tuple[list[Chain], list[ReportRow]]:
    """The chains of files and folders, and rows on these chains and on what was skipped.

    A file without protein is skipped, and so is a chain whose name was read before. A path that does not exist, and
    paths without any chain, are a ``StructureError``.
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
        raise StructureError(f"no protein in {counted(len(files), 'file')}; the first: {rows[0].detail}")
    return list(chains.values()), rows


def _chain(name: str, raw: RawChain) -> Chain | None:
    residues, sequence, places, positions = _placed(raw)
    points = [
        residue.atoms.get("CA" if residue.name == "GLY" else "CB", residue.atoms.get("CA")) for residue in residues
    ]
    resolved = np.array([point is not None for point in points], bool)
    if not resolved.any():
        return None
    notes = [ReportRow(name, "odd", remark) for remark in raw.remarks]
    if missing := len(sequence) - int(resolved.sum()):
        detail = f"residues without coordinates: {missing} of {len(sequence)}; their pairs are left out"
        notes.append(ReportRow(name, "incomplete", detail))
    if unseen := int(positions[-1] - places[-1]):
        detail = f"residues missing by number: {unseen}; the model does not see them"
        notes.append(ReportRow(name, "incomplete", detail))
    without_beta = [residue for residue in residues if residue.name != "GLY" and "CB" not in residue.atoms]
    if bare := sum("CA" in residue.atoms for residue in without_beta):
        notes.append(ReportRow(name, "incomplete", f"residues without CB: {bare}; CA is used"))
    modified = Counter(residue.name for residue in residues if is_modified(residue.name))
    for residue_name, count in sorted(modified.items()):
        notes.append(ReportRow(name, "altered", f"{count} {residue_name} read as {letter(residue_name)}"))
    coordinates = np.stack([point for point in points if point is not None]).astype(np.float32)
    return Chain(name, sequence, places[resolved], positions[resolved], coordinates, tuple(notes))


def _placed(raw: RawChain) -> tuple[list[Residue], str, NDArray[np.int64], NDArray[np.int64]]:
    """The residues in order, the sequence, and the residues' places in it and along the molecule."""
    stated = "".join(map(letter, raw.stated))
    given = [residue.place for residue in raw.residues if residue.place is not None]
    if len(given) == len(raw.residues):
        places = np.array(given, np.int64)
        return raw.residues, stated, places, places
    residues, free = ordered(raw.residues)
    raw.remarks += [f"{residue.name} {residue.label} is bound to no residue and was left out" for residue in free]
    letters = "".join(letter(residue.name) for residue in residues)
    broken = breaks(residues)
    if stated:
        fitted = fit_into(stated, letters, broken)
        if fitted is not None:
            return residues, stated, fitted, fitted
        raw.remarks.append("its atoms do not agree with its SEQRES; the model sees the residues that have atoms")
    raw.remarks += [
        f"broken between {before.label} and {after.label}, which are numbered as neighbours"
        for (before, after), gap in zip(pairwise(residues), broken, strict=True)
        if gap == 0
    ]
    positions = np.cumsum([0, *(1 + (gap or 0) for gap in broken)])
    return residues, letters, np.arange(len(residues)), positions[: len(residues)]


def bonded(residue: Residue, after: Residue) -> bool:
    """Whether a peptide bond joins two residues."""
    for atom, next_atom, longest in (("C", "N", _PEPTIDE_BOND), ("CA", "CA", _NEIGHBOURS)):
        if atom in residue.atoms and next_atom in after.atoms:
            return float(np.linalg.norm(residue.atoms[atom] - after.atoms[next_atom])) <= longest
    return False


def ordered(residues: Sequence[Residue]) -> tuple[list[Residue], list[Residue]]:
    """The residues of a chain in the order of their bonds, and separately the free amino acids.

    PDB files list free amino acids as heterogens of a chain. Some files also list modified residues as heterogens, at
    the end. A heterogen that is bonded to the chain belongs next to its neighbour.
    """
    pieces: list[list[Residue]] = []
    for residue in residues:
        if pieces and bonded(pieces[-1][-1], residue):
            pieces[-1].append(residue)
        else:
            pieces.append([residue])
    chain = [piece for piece in pieces if not all(residue.hetero for residue in piece)]
    loose = [piece for piece in pieces if all(residue.hetero for residue in piece)]
    if not chain:  # all residues are modified, as in some antibiotics
        chain, loose = [piece for piece in loose if len(piece) > 1], [piece for piece in loose if len(piece) == 1]
    waiting = len(loose) + 1
    while len(loose) < waiting:
        waiting = len(loose)
        loose = [piece for piece in loose if not _insert(piece, chain)]
    return [residue for piece in chain for residue in piece], [residue for piece in loose for residue in piece]


def _insert(piece: list[Residue], chain: list[list[Residue]]) -> bool:
    """Put a piece next to the piece that it is bonded to; return whether there is such a piece."""
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

    Stretches without a break keep together and in order. If several places are possible, the nearest to the numbers is
    chosen, and the first among equals. ``broken`` is the result of ``breaks``.
    """
    # Key: the end of the last stretch. Value: the least deviation from the numbers, and the starts of all stretches.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    stretches = list(_stretches(letters, broken))
    for number, (stretch, missing) in enumerate(stretches):
        extended: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start in (match.start() for match in re.finditer(f"(?={stretch})", stated)):
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
    """The letters of the stretches without a break, and how many residues are missing before them."""
    start, missing = 0, 0
    for i, gap in enumerate(broken, start=1):
        if gap is not None:
            yield letters[start:i], missing
            start, missing = i, gap
    yield letters[start:], missing
