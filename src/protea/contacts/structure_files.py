"""Residues out of structure files, PDB or mmCIF, as they stand there.

What a file holds is found by looking inside. Of models the first is read, of alternate locations that with the highest
occupancy, of residues that share a number the first. Knows nothing of gaps or contacts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xopen import xopen

from protea.errors import MissingExtraError, StructureError
from protea.fasta import DAMAGED

Point = NDArray[np.float32]

SUFFIXES: Final = (".pdb", ".ent", ".cif", ".mmcif")
COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst")

UNKNOWN: Final = "X"
_LETTERS: Final = frozenset("ACDEFGHIKLMNPQRSTVWYBUZO")
_OWN: Final = {"U": "SEC", "O": "PYL"}
"""Residues with letters of their own that biotite's table of letters lacks."""

_ATOMS: Final = ("N", "CA", "C", "CB")
_LARGEST: Final = 1 << 30
"""Bytes of text, far above any structure."""


class Residue(NamedTuple):
    """An amino acid with coordinates, or some of them.

    Attributes:
        name: as the file has it: ``ALA``, ``MSE``.
        number: the author's.
        insertion: the author's insertion code, mostly empty.
        hetero: whether the file calls it a heterogen, as it does modified residues and free amino acids.
        place: its index in the stated sequence, where the file says so.
        atoms: those of N, CA, C and CB that are there.
    """

    name: str
    number: int
    insertion: str
    hetero: bool
    place: int | None
    atoms: dict[str, Point]

    @property
    def label(self) -> str:
        """Number and insertion code."""
        return f"{self.number}{self.insertion}"


@dataclass
class RawChain:
    """A chain as it stands in a file.

    Attributes:
        name: the author's.
        residues: in the file's order.
        stated: names of all residues of the molecule, where the file states them.
        mixed: labels of residues that the file has of several kinds.
        remarks: what else is odd, in words.
    """

    name: str
    residues: list[Residue] = field(default_factory=list)
    stated: list[str] | None = None
    mixed: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def structure_name(path: Path) -> str:
    """A file's name without what it is: ``1abc`` for ``1abc.pdb.gz``."""
    name = path.name
    for suffixes in (COMPRESSED, SUFFIXES):
        name = next((name[: -len(one)] for one in suffixes if name.lower().endswith(one)), name)
    return name


def is_structure(path: Path) -> bool:
    """Whether a file in a folder is taken for a structure, by its name."""
    return path.name.lower().endswith(tuple(one + two for one in SUFFIXES for two in ("", *COMPRESSED)))


def letter(name: str) -> str:
    """The one letter of a residue's name, modified ones by what they are made of; X if there is none."""
    from biotite.structure.info import one_letter_code

    found = one_letter_code(name)
    return found if found in _LETTERS else UNKNOWN


def is_modified(name: str) -> bool:
    """Whether a residue's letter stands for another residue."""
    from biotite.sequence import ProteinSequence

    one = letter(name)
    return str(_OWN.get(one) or ProteinSequence.convert_letter_1to3(one)) != name


def raw_chains(path: Path) -> list[RawChain]:
    """The chains of a file that have amino acids.

    Raises:
        MissingExtraError: biotite is not installed.
        StructureError: the file is missing, unreadable, empty, or holds no structure.
    """
    try:
        import biotite.structure.io.pdb  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("reading structures needs biotite: pip install 'protea[evaluate]'") from error
    text = _text(path)
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    first = next(lines, None)
    if first is None:
        raise StructureError(f"{path}: empty")
    if first.lower().startswith("data_"):
        read = _from_mmcif
    elif any(line.startswith(("ATOM", "HETATM")) for line in text.splitlines()):
        read = _from_pdb
    else:
        raise StructureError(f"{path}: neither PDB (no ATOM records) nor mmCIF (does not begin with data_)")
    try:
        with warnings.catch_warnings():
            # Of what biotite mends, such as absent elements, nothing concerns us.
            warnings.simplefilter("ignore")
            return read(text)
    # Whatever a library raises over a file, it says that the file is not what it should be.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StructureError(f"{path}: cannot be read as a structure: {reason}") from error


def _text(path: Path) -> str:
    try:
        with xopen(path, "rb", threads=0) as stream:
            data = stream.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise StructureError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise StructureError(f"{path}: is a folder; name the files in it") from error
    except PermissionError as error:
        raise StructureError(f"{path}: permission denied; make the file readable") from error
    except DAMAGED as error:
        raise StructureError(f"{path}: cannot be read to its end: cut short or damaged ({error})") from error
    if len(data) > _LARGEST:
        raise StructureError(f"{path}: more than {_LARGEST:,} bytes, which is far beyond a structure")
    return str(data.decode("utf-8", errors="replace")).removeprefix("\ufeff")


def _from_pdb(text: str) -> list[RawChain]:
    from biotite.structure.io import pdb

    atoms = pdb.PDBFile.read(StringIO(text)).get_structure(model=1, altloc="occupancy")
    stated: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("SEQRES"):
            stated.setdefault(line[11:12].strip(), []).extend(line[19:70].split())
    chains = list(_chains(atoms, atoms.chain_id, None).values())
    for chain in chains:
        # Caps such as ACE are no residues.
        chain.stated = [name for name in stated.get(chain.name, []) if name in _amino_acids()] or None
    return chains


def _from_mmcif(text: str) -> list[RawChain]:
    from biotite.structure.io import pdbx

    file = pdbx.CIFFile.read(StringIO(text))
    # Some files describe ligands first.
    block = next((one for one in file.values() if "atom_site" in one), None)
    if block is None:
        raise StructureError("no atoms in it (atom_site)")
    extra = [name for name in ("label_entity_id", "label_seq_id", "label_asym_id") if name in block["atom_site"]]
    atoms = pdbx.get_structure(block, model=1, altloc="occupancy", extra_fields=extra)
    if len(extra) < 3 or "entity_poly_seq" not in block:
        return list(_chains(atoms, atoms.chain_id, None).values())
    stated = _polymers(block["entity_poly_seq"])
    entities = atoms.label_entity_id.tolist()
    numbers = atoms.label_seq_id.tolist()
    places = [stated.get(one, {}).get(number, (-1, ""))[0] for one, number in zip(entities, numbers, strict=True)]
    # Ligands and water have no place in a polymer.
    polymer = np.array(places) >= 0
    if not polymer.any():
        whole = list(_chains(atoms, atoms.chain_id, None).values())
        for chain in whole:
            chain.remarks.append(
                "its atoms have no place in entity_poly_seq; the model sees the residues that have atoms"
            )
        return whole
    chains = _chains(atoms[polymer], atoms.label_asym_id[polymer], np.array(places)[polymer])
    entity = dict(zip(atoms.label_asym_id.tolist(), entities, strict=True))
    for key, chain in chains.items():
        chain.stated = [name for _, name in stated[entity[key]].values()]
    return list(chains.values())


def _polymers(table: Any) -> dict[str, dict[str, tuple[int, str]]]:
    """Index and name of every residue of an mmCIF file's polymers, by entity and number."""
    found: dict[str, dict[str, tuple[int, str]]] = {}
    columns = (table[name].as_array(str).tolist() for name in ("entity_id", "num", "mon_id"))
    for entity, number, name in zip(*columns, strict=True):
        residues = found.setdefault(entity, {})
        # Of several residues with one number, the first is stated.
        if name in _amino_acids() and number not in residues:
            residues[number] = (len(residues), name)
    return found


def _chains(atoms: Any, keys: NDArray[np.str_], places: NDArray[np.int_] | None) -> dict[str, RawChain]:
    """Chains by key, with the amino acids among some atoms.

    Args:
        atoms: biotite's array.
        keys: of the chain of each atom.
        places: of each atom's residue in the stated sequence, if the file says so.
    """
    chains: dict[str, RawChain] = {}
    found: dict[str, dict[tuple[int, str], Residue]] = {}
    latest: dict[str, tuple[int, str]] = {}
    again: dict[str, set[tuple[int, str]]] = {}
    known = np.isin(atoms.res_name, list(_amino_acids()))
    for i in np.flatnonzero(np.isin(atoms.atom_name, _ATOMS) & (known | ~atoms.hetero)):
        key, name, label = str(keys[i]), str(atoms.res_name[i]), (int(atoms.res_id[i]), str(atoms.ins_code[i]))
        chain = chains.setdefault(key, RawChain(str(atoms.chain_id[i])))
        residues = found.setdefault(key, {})
        if label not in residues:
            place = None if places is None else int(places[i])
            residues[label] = Residue(name, *label, bool(atoms.hetero[i]), place, {})
        elif label != latest[key]:
            again.setdefault(key, set()).add(label)
        latest[key] = label
        residue = residues[label]
        if label in again.get(key, ()):
            continue
        if residue.name != name:
            chain.mixed.append(residue.label)
        elif np.isfinite(atoms.coord[i]).all():
            residue.atoms.setdefault(str(atoms.atom_name[i]), atoms.coord[i])
    for key, numbers in again.items():
        chains[key].remarks.append(
            f"{len(numbers)} residues have numbers that stood before; left out: a second molecule of this name?"
        )
    for key, chain in chains.items():
        # A name that nobody knows is an amino acid's if there is a backbone, as with the names of force fields.
        chain.residues = [
            one for one in found[key].values() if one.name in _amino_acids() or {"N", "CA", "C"} <= one.atoms.keys()
        ]
    return {key: chain for key, chain in chains.items() if chain.residues}


@cache
def _amino_acids() -> frozenset[str]:
    from biotite.structure.info import amino_acid_names

    return frozenset(amino_acid_names())
