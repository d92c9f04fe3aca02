"""Chains and residues from PDB and mmCIF files, as the file states them. Knows nothing of gaps or contacts.

The content of a file tells its format. Only the first model counts, only the alternate location with the highest
occupancy, and only the first of residues that share a number.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xopen import xopen

from protea.errors import StructureError
from protea.fasta import DAMAGED
from protea.optional import extra
from protea.text import counted

_SUFFIX: Final = r"\.(pdb|ent|cif|mmcif)"
_COMPRESSED: Final = r"(\.(gz|bz2|xz|zst))?"
_LETTERS: Final = frozenset("ACDEFGHIKLMNPQRSTVWYBUZO")
_OWN: Final = {"U": "SEC", "O": "PYL"}  # biotite cannot turn these letters into a residue's name
_ATOMS: Final = ("N", "CA", "C", "CB")
_LARGEST: Final = 1 << 30  # bytes of text, far more than any structure has


class Residue(NamedTuple):
    """An amino acid; number and insertion code are the author's, ``place`` is its index in the stated sequence."""

    name: str
    number: int
    insertion: str
    hetero: bool
    place: int | None
    atoms: dict[str, NDArray[np.float32]]

    @property
    def label(self) -> str:
        """Number and insertion code."""
        return f"{self.number}{self.insertion}"


@dataclass
class RawChain:
    """A chain as it stands in a file; ``stated`` names all residues of the molecule, if the file does."""

    name: str
    residues: list[Residue]
    remarks: list[str]
    stated: list[str] = field(default_factory=list)


def structure_name(path: Path) -> str:
    """A file's name without suffixes: ``1abc`` for ``1abc.pdb.gz``."""
    return re.sub(rf"({_SUFFIX})?{_COMPRESSED}\Z", "", path.name, count=1, flags=re.IGNORECASE)


def is_structure(path: Path) -> bool:
    """Whether a file in a folder counts as a structure, by its name."""
    suffixed = re.search(rf"{_SUFFIX}{_COMPRESSED}\Z", path.name, flags=re.IGNORECASE)
    return suffixed is not None and not path.name.startswith(".")


def letter(name: str) -> str:
    """The letter of a residue; for a modified residue the letter of its parent, or X if it has none."""
    from biotite.structure.info import one_letter_code

    code = one_letter_code(name)
    return code if code in _LETTERS else "X"


def is_modified(name: str) -> bool:
    """Whether a residue's letter stands for another residue."""
    from biotite.sequence import ProteinSequence

    code = letter(name)
    return str(_OWN.get(code) or ProteinSequence.convert_letter_1to3(code)) != name


def raw_chains(path: Path) -> list[RawChain]:
    """The chains of a file that have amino acids; a ``StructureError`` if the file is not a readable structure."""
    with extra("evaluate", "reading structures needs biotite"):
        import biotite.structure.io.pdb  # noqa: F401
    text = _text(path)
    first = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), None)
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
            # biotite warns when it guesses, for example, an absent element; nothing here depends on that.
            warnings.simplefilter("ignore")
            return list(read(text).values())
    # biotite raises errors of various classes for damaged files.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StructureError(f"{path}: cannot be read as a structure: {reason}") from error


def _text(path: Path) -> str:
    try:
        with xopen(path, "rb", threads=0) as stream:
            data = stream.read(_LARGEST + 1)
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or f"cut short or damaged ({error}); fetch it again"
        raise StructureError(f"{path}: cannot be read: {reason}") from error
    if len(data) > _LARGEST:
        raise StructureError(f"{path}: more than {_LARGEST:,} bytes, far more than a structure has")
    return str(data.decode("utf-8", errors="replace")).removeprefix("\ufeff")


def _from_pdb(text: str) -> dict[str, RawChain]:
    from biotite.structure.io import pdb

    atoms = pdb.PDBFile.read(StringIO(text)).get_structure(model=1, altloc="occupancy")
    stated: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("SEQRES"):
            stated.setdefault(line[11:12].strip(), []).extend(line[19:70].split())
    chains = _chains(atoms, atoms.chain_id)
    for chain in chains.values():
        # Caps such as ACE are not residues.
        chain.stated = [name for name in stated.get(chain.name, []) if name in _amino_acids()]
    return chains


def _from_mmcif(text: str) -> dict[str, RawChain]:
    from biotite.structure.io import pdbx

    # Some files have blocks that describe ligands before the block of the protein.
    block = next((block for block in pdbx.CIFFile.read(StringIO(text)).values() if "atom_site" in block), None)
    if block is None:
        raise StructureError("it has no atoms (atom_site)")
    columns = [name for name in ("label_entity_id", "label_seq_id", "label_asym_id") if name in block["atom_site"]]
    atoms = pdbx.get_structure(block, model=1, altloc="occupancy", extra_fields=columns)
    if len(columns) < 3 or "entity_poly_seq" not in block:
        return _chains(atoms, atoms.chain_id)
    stated = _polymers(block["entity_poly_seq"])
    entities = atoms.label_entity_id.tolist()
    numbers = zip(entities, atoms.label_seq_id.tolist(), strict=True)
    places = np.array([stated.get(entity, {}).get(number, (-1, ""))[0] for entity, number in numbers])
    # Ligands and water belong to no polymer.
    polymer = places >= 0
    if not polymer.any():
        chains = _chains(atoms, atoms.chain_id)
        for chain in chains.values():
            chain.remarks.append(
                "its atoms have no place in entity_poly_seq; the model sees the residues that have atoms"
            )
        return chains
    chains = _chains(atoms[polymer], atoms.label_asym_id[polymer], places[polymer])
    entity_of = dict(zip(atoms.label_asym_id.tolist(), entities, strict=True))
    for asym_id, chain in chains.items():
        chain.stated = [name for _, name in stated[entity_of[asym_id]].values()]
    return chains


def _polymers(table: Any) -> dict[str, dict[str, tuple[int, str]]]:
    """Index and name of every residue of an mmCIF file's polymers, by entity and number."""
    polymers: dict[str, dict[str, tuple[int, str]]] = {}
    columns = (table[name].as_array(str).tolist() for name in ("entity_id", "num", "mon_id"))
    for entity, number, name in zip(*columns, strict=True):
        residues = polymers.setdefault(entity, {})
        # Where several residues share a number, the first counts.
        if name in _amino_acids() and number not in residues:
            residues[number] = (len(residues), name)
    return polymers


def _chains(atoms: Any, keys: NDArray[np.str_], places: NDArray[np.int_] | None = None) -> dict[str, RawChain]:
    """The chains that have amino acids, by name; ``places`` are indices in the stated sequence, if known."""
    known = np.isin(atoms.res_name, list(_amino_acids()))
    backbone = np.flatnonzero(np.isin(atoms.atom_name, _ATOMS) & (known | ~atoms.hetero))
    names = dict.fromkeys(keys[backbone].tolist())
    chains = {name: _chain(atoms, backbone[keys[backbone] == name], places) for name in names}
    return {name: chain for name, chain in chains.items() if chain.residues}


def _chain(atoms: Any, indices: NDArray[np.int_], places: NDArray[np.int_] | None) -> RawChain:
    """The chain that has these atoms."""
    residues: dict[tuple[int, str], Residue] = {}
    repeated: set[tuple[int, str]] = set()
    remarks: list[str] = []
    for number, run in groupby(indices.tolist(), key=lambda i: (int(atoms.res_id[i]), str(atoms.ins_code[i]))):
        if number in residues:
            repeated.add(number)
            continue
        own = list(run)
        name, hetero = str(atoms.res_name[own[0]]), bool(atoms.hetero[own[0]])
        residue = Residue(name, *number, hetero, None if places is None else int(places[own[0]]), {})
        residues[number] = residue
        same_name = [i for i in own if atoms.res_name[i] == name]
        if len(same_name) < len(own):
            remarks.append(f"residue {residue.label} has several names; the first is used")
        for i in same_name:
            if np.isfinite(atoms.coord[i]).all():
                residue.atoms.setdefault(str(atoms.atom_name[i]), atoms.coord[i])
    if repeated:
        again = counted(len(repeated), "residue")
        remarks.append(f"left out {again} with the numbers of earlier ones; is this a second molecule?")
    # Force fields have residue names of their own: an unknown name counts as an amino acid if it has a backbone.
    known, backbone = _amino_acids(), {"N", "CA", "C"}
    kept = [residue for residue in residues.values() if residue.name in known or backbone <= residue.atoms.keys()]
    return RawChain(str(atoms.chain_id[indices[0]]), kept, remarks)


@cache
def _amino_acids() -> frozenset[str]:
    from biotite.structure.info import amino_acid_names

    return frozenset(amino_acid_names())
