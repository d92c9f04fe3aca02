"""Structure files of the tests' own: chains that wind over a plane, written as PDB and as mmCIF."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
_NAMES = "ALA CYS ASP GLU PHE GLY HIS ILE LYS LEU MET ASN PRO GLN ARG SER THR VAL TRP TYR"
NAMES = {letter: _NAMES[4 * i : 4 * i + 3] for i, letter in enumerate(LETTERS)}
STEP = 3.8
"""Ångström between neighbours, and between rows."""


@dataclass(frozen=True)
class Res:
    """A residue: its name, number and atoms."""

    name: str
    number: int
    atoms: dict[str, NDArray[np.float64]]
    insertion: str = ""
    hetero: bool = False
    location: str = ""
    occupancy: float = 1.0
    place: int = 0
    """Number in the molecule, from 1; mmCIF states it."""


@dataclass
class Mol:
    """A chain as a file has it: the residues with atoms, and the names of all, where they are stated."""

    name: str
    residues: list[Res]
    stated: list[str] = field(default_factory=list)

    def without(self, *places: int) -> Mol:
        """The same, some residues of the molecule not seen."""
        return Mol(self.name, [one for one in self.residues if one.place not in places], self.stated)


def letters(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=length))


def snake(sequence: str, name: str = "A", *, first: int = 1, width: int = 9, stated: bool = False) -> Mol:
    """A chain that goes to and fro in rows of ``width``: residues side by side in neighbouring rows are in contact."""
    alphas = []
    for i in range(len(sequence) + 1):
        row, column = divmod(i, width)
        alphas.append(np.array([STEP * (width - 1 - column if row % 2 else column), STEP * row, 0.0]))
    residues = []
    for i, letter in enumerate(sequence):
        after = alphas[i + 1] - alphas[i]
        before = alphas[i] - alphas[i - 1] if i else after
        atoms = {"N": alphas[i] - before * 0.32, "CA": alphas[i], "C": alphas[i] + after * 0.32}
        if letter != "G":
            atoms["CB"] = alphas[i] + np.array([0.0, 0.0, 1.5])
        residues.append(Res(NAMES[letter], first + i, atoms, place=i + 1))
    return Mol(name, residues, [NAMES[letter] for letter in sequence] if stated else [])


def change(mol: Mol, place: int, **what: object) -> Mol:
    """The same with one residue changed."""
    residues = [replace(one, **what) if one.place == place else one for one in mol.residues]
    return Mol(mol.name, residues, mol.stated)


def pdb(*mols: Mol) -> str:
    lines = []
    for mol in mols:
        for row in range(0, len(mol.stated), 13):
            names = " ".join(f"{name:>3}" for name in mol.stated[row : row + 13])
            lines.append(f"SEQRES {row // 13 + 1:>3} {mol.name:1} {len(mol.stated):>4}  {names}")
    serial = 0
    for mol in mols:
        for one in mol.residues:
            for atom, point in one.atoms.items():
                serial += 1
                x, y, z = point
                record = "HETATM" if one.hetero else "ATOM"
                lines.append(
                    f"{record:<6}{serial:>5} {atom:^4}{one.location:1}{one.name:>3} {mol.name:1}{one.number:>4}"
                    f"{one.insertion:1}   {x:8.3f}{y:8.3f}{z:8.3f}{one.occupancy:6.2f}{0:6.2f}          {atom[0]:>2}"
                )
        lines.append("TER")
    return "\n".join([*lines, "END", ""])


SITE = """group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id
pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy auth_seq_id auth_comp_id auth_asym_id auth_atom_id
pdbx_PDB_model_num"""


def mmcif(*mols: Mol, stated: bool = True) -> str:
    lines = ["data_made", "#"]
    if stated:
        lines += ["loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num", "_entity_poly_seq.mon_id"]
        for entity, mol in enumerate(mols, start=1):
            lines += [f"{entity} {number} {name}" for number, name in enumerate(mol.stated, start=1)]
        lines.append("#")
    lines += ["loop_", *(f"_atom_site.{column}" for column in SITE.split())]
    serial = 0
    for entity, mol in enumerate(mols, start=1):
        for one in mol.residues:
            for atom, point in one.atoms.items():
                serial += 1
                values = [
                    "HETATM" if one.hetero else "ATOM",
                    serial,
                    atom[0],
                    atom,
                    one.location or ".",
                    one.name,
                    f"L{mol.name}",
                    entity,
                    one.place or ".",
                    one.insertion or "?",
                    *(f"{x:.3f}" for x in point),
                    one.occupancy,
                    one.number,
                    one.name,
                    mol.name,
                    atom,
                    1,
                ]
                lines.append(" ".join(map(str, values)))
    return "\n".join([*lines, "#", ""])


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def folder_of_snakes(folder: Path, count: int, *, low: int = 40, high: int = 70) -> Path:
    """Structures of different sequence."""
    folder.mkdir()
    rng = random.Random(1)
    for number in range(count):
        mol = snake(letters(rng.randint(low, high), seed=number), width=rng.randint(7, 12))
        (folder / f"s{number:02}.pdb").write_text(pdb(mol))
    return folder
