"""Structure files: what of a chain the model sees, what is missing, which residues are in contact."""

from __future__ import annotations

import gzip
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_structures import LETTERS, NAMES, Mol, change, letters, mmcif, pdb, snake, written
from messages import check_message
from protea.contacts.structures import Chain, fit_into, pairs, read_chains, read_structures, structure_files
from protea.errors import MissingExtraError, StructureError

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "structures"
SEQUENCE = letters(60)
KINDS = {"pdb": pdb, "cif": mmcif}


def read(tmp_path: Path, *mols: Mol, kind: str = "pdb", text: str | None = None) -> list[Chain]:
    return read_chains(written(tmp_path / f"x.{kind}", KINDS[kind](*mols) if text is None else text))


def details(chain: Chain, what: str) -> list[str]:
    return [note.detail for note in chain.notes if note.what == what]


def same(one: Chain, other: Chain) -> None:
    assert (one.name, one.sequence) == (other.name, other.sequence)
    for a, b in ((one.places, other.places), (one.positions, other.positions), (one.points, other.points)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_chain(tmp_path: Path, kind: str) -> None:
    mol = snake(SEQUENCE, stated=True, first=5)
    (chain,) = read(tmp_path, mol, kind=kind)
    assert (chain.name, chain.sequence, chain.resolved, chain.notes) == ("x:A", SEQUENCE, 60, ())
    np.testing.assert_array_equal(chain.places, np.arange(60))
    np.testing.assert_array_equal(chain.positions, np.arange(60))
    expected = [one.atoms["CA" if one.name == "GLY" else "CB"] for one in mol.residues]
    np.testing.assert_allclose(chain.points, expected, atol=1e-3)


def test_pairs_are_those_that_a_loop_finds(tmp_path: Path) -> None:
    (chain,) = read(tmp_path, snake(SEQUENCE, stated=True).without(1, 20, 21, 22, 23, 41))
    found = pairs(chain)
    expected = []
    for i in range(chain.resolved):
        for j in range(i + 1, chain.resolved):
            if chain.places[j] - chain.places[i] >= 6:
                distance = float(np.sqrt(((chain.points[i] - chain.points[j]) ** 2).sum()))
                far = chain.places[j] - chain.places[i]
                expected.append((chain.places[i], chain.places[j], far, distance < 8.0))
    assert expected == list(zip(*found, strict=True))
    assert 0 < found.contacts.sum() < len(found.contacts)
    assert not {0, 19, 20, 21, 22, 40} & {*found.rows.tolist(), *found.columns.tolist()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_sees_what_the_file_states(tmp_path: Path, kind: str) -> None:
    missing = (1, 2, 3, 20, 21, 40, 60)
    (chain,) = read(tmp_path, snake(SEQUENCE, stated=True, first=101).without(*missing), kind=kind)
    assert chain.sequence == SEQUENCE
    assert set(range(60)) - set(chain.places.tolist()) == {place - 1 for place in missing}
    np.testing.assert_array_equal(chain.positions, chain.places)
    assert details(chain, "incomplete") == ["residues without coordinates: 7 of 60; their pairs are left out"]


@pytest.mark.parametrize("column", [7, 8], ids=["label_entity_id", "label_seq_id"])
def test_an_mmcif_file_whose_atoms_have_no_place_in_what_it_states(tmp_path: Path, column: int) -> None:
    lines = []
    for line in mmcif(snake(SEQUENCE, stated=True)).splitlines():
        cells = line.split()
        if cells and cells[0] in ("ATOM", "HETATM"):
            cells[column] = "?"
        lines.append(" ".join(cells))
    (chain,) = read_chains(written(tmp_path / "odd.cif", "\n".join(lines) + "\n"))
    assert chain.sequence == SEQUENCE
    assert any("no place in entity_poly_seq" in one for one in details(chain, "odd"))


def test_the_first_block_with_atoms_is_read(tmp_path: Path) -> None:
    text = "data_ligand\n_chem_comp.id XYZ\n#\n" + mmcif(snake(SEQUENCE), stated=False)
    (chain,) = read_chains(written(tmp_path / "two.cif", text))
    assert chain.sequence == SEQUENCE
    with pytest.raises(StructureError, match="atom_site"):
        read_chains(written(tmp_path / "none.cif", "data_ligand\n_chem_comp.id XYZ\n"))


def test_the_name_of_a_file_in_capitals(tmp_path: Path) -> None:
    (chain,) = read_chains(written(tmp_path / "UPPER.PDB", pdb(snake(SEQUENCE))))
    assert chain.name == "UPPER:A"


def test_without_a_stated_sequence_gaps_in_the_numbering_count(tmp_path: Path) -> None:
    whole = snake(SEQUENCE, first=11)
    text = {"pdb": pdb(whole.without(20, 21, 22)), "cif": mmcif(whole.without(20, 21, 22), stated=False)}
    for kind in KINDS:
        (chain,) = read(tmp_path, kind=kind, text=text[kind])
        assert chain.sequence == SEQUENCE[:19] + SEQUENCE[22:]
        np.testing.assert_array_equal(chain.places, np.arange(57))
        np.testing.assert_array_equal(chain.positions, [*range(19), *range(22, 60)])
        assert details(chain, "incomplete") == ["residues missing by number: 3; the model does not see them"]
    assert (
        pairs(chain).separations == chain.positions[pairs(chain).columns] - chain.positions[pairs(chain).rows]
    ).all()


def test_a_numbering_that_skips_or_repeats_in_an_unbroken_chain_is_no_gap(tmp_path: Path) -> None:
    mol = snake(SEQUENCE)
    residues = [replace(one, number=one.number + (100 if one.place > 30 else 0)) for one in mol.residues]
    residues = [
        replace(one, number=10, insertion="" if one.place == 10 else "ABC"[one.place - 11])
        if 10 <= one.place <= 13
        else one
        for one in residues
    ]
    (chain,) = read(tmp_path, Mol("A", residues))
    assert chain.sequence == SEQUENCE
    np.testing.assert_array_equal(chain.positions, np.arange(60))
    assert not chain.notes


def test_a_break_between_neighbours_by_number_is_told(tmp_path: Path) -> None:
    mol = snake(SEQUENCE).without(30, 31)
    residues = [replace(one, number=one.number - (2 if one.place > 31 else 0)) for one in mol.residues]
    (chain,) = read(tmp_path, Mol("A", residues))
    np.testing.assert_array_equal(chain.positions, np.arange(58))
    assert details(chain, "odd") == ["broken between 29 and 30, which are numbered as neighbours"]


@pytest.mark.parametrize(("missing", "place"), [(0, 4), (6, 10), (7, 10), (8, 12), (50, 14)])
def test_repeats_are_told_apart_by_their_numbers(missing: int, place: int) -> None:
    found = fit_into("GSGSGSAAAAGSGSGS", "GSGSGS", [None, None, None, missing, None])
    assert found is not None
    np.testing.assert_array_equal(found[4:], [place, place + 1])
    assert found[3] < place


def test_what_is_bonded_keeps_together() -> None:
    assert fit_into("MKTAYIAK", "MKYI", [None, None, None]) is None
    assert fit_into("MKTAYIAK", "MKYI", [None, 0, None]) is not None
    assert fit_into("MKTAYIAK", "YIMK", [None, 0, None]) is None


@given(st.text("AGS", min_size=1, max_size=40), st.data())
def test_residues_are_found_where_their_numbers_say(stated: str, data: st.DataObject) -> None:
    seen = sorted(data.draw(st.sets(st.integers(0, len(stated) - 1), min_size=1)))
    broken = [None if b - a == 1 else b - a - 1 for a, b in pairwise(seen)]
    found = fit_into(stated, "".join(stated[i] for i in seen), broken)
    assert found is not None
    np.testing.assert_array_equal(found - found[0], np.array(seen) - seen[0])


def test_a_sequence_that_its_atoms_contradict_is_not_used(tmp_path: Path) -> None:
    mol = snake(SEQUENCE, stated=True)
    mol.stated[30:30] = ["TRP", "TRP"]
    (chain,) = read(tmp_path, mol)
    assert chain.sequence == SEQUENCE
    assert details(chain, "odd") == [
        "its atoms do not agree with its SEQRES; the model sees the residues that have atoms"
    ]


def test_caps_are_no_residues(tmp_path: Path) -> None:
    mol = snake(SEQUENCE, stated=True).without(4)
    mol.stated[:] = ["ACE", *mol.stated, "NH2"]
    in_cif = Mol("A", [replace(one, place=one.place + 1) for one in mol.residues], mol.stated)
    for kind, each in (("pdb", mol), ("cif", in_cif)):
        (chain,) = read(tmp_path, each, kind=kind)
        assert chain.sequence == SEQUENCE
        np.testing.assert_array_equal(chain.places, [*range(3), *range(4, 60)])


@pytest.mark.parametrize("kind", KINDS)
def test_of_alternate_locations_the_likelier_is_taken(tmp_path: Path, kind: str) -> None:
    mol = change(snake(SEQUENCE, stated=True), 30, location="A", occupancy=0.3)
    one = next(one for one in mol.residues if one.place == 30)
    moved = {atom: point + np.array([0, 0, 2.0]) for atom, point in one.atoms.items()}
    mol.residues.insert(30, replace(one, atoms=moved, location="B", occupancy=0.7))
    (chain,) = read(tmp_path, mol, kind=kind)
    assert chain.sequence == SEQUENCE
    np.testing.assert_allclose(chain.points[29], moved["CA" if SEQUENCE[29] == "G" else "CB"], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_of_residues_that_share_a_number_the_first_is_taken(tmp_path: Path, kind: str) -> None:
    mol = snake(SEQUENCE, stated=True)
    one = mol.residues[29]
    mol.residues.insert(30, replace(one, name="TRP" if one.name != "TRP" else "TYR"))
    (chain,) = read(tmp_path, mol, kind=kind)
    assert chain.sequence == SEQUENCE
    assert details(chain, "odd") == ["residue 30 has several names; the first is used"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stated", [True, False])
def test_modified_residues_are_read_as_what_they_are_made_of(tmp_path: Path, kind: str, stated: bool) -> None:
    sequence = "MKTAYMAKQRMLSGVE" * 3
    mol = snake(sequence, stated=stated)
    for place in (1, 6, 22):
        mol = change(mol, place, name="MSE", hetero=True)
        if stated:
            mol.stated[place - 1] = "MSE"
    mol = change(mol, 3, name="TPO", hetero=True)
    if stated:
        mol.stated[2] = "TPO"
    text = pdb(mol) if kind == "pdb" else mmcif(mol, stated=stated)
    (chain,) = read(tmp_path, kind=kind, text=text)
    assert chain.sequence == sequence
    assert details(chain, "altered") == ["3 MSE read as M", "1 TPO read as T"]


def test_modified_residues_at_the_end_of_a_file_come_back_in_place(tmp_path: Path) -> None:
    """Some programs write all heterogens after the rest; two neighbours, the first and the last residue among them."""
    sequence = "MKTAMMAKQRMLSGVEM" * 2
    mol = snake(sequence)
    moved = (1, 5, 6, 11, 34)
    residues = [one for one in mol.residues if one.place not in moved]
    residues += [replace(mol.residues[place - 1], name="MSE", hetero=True) for place in moved]
    (chain,) = read(tmp_path, Mol("A", residues))
    assert chain.sequence == sequence
    np.testing.assert_array_equal(chain.positions, np.arange(34))


def test_a_chain_of_modified_residues_alone(tmp_path: Path) -> None:
    mol = snake("MTMTMTMTMT")
    residues = [replace(one, name="MSE" if one.name == "MET" else "TPO", hetero=True) for one in mol.residues]
    far = {atom: point + np.array([0, 0, 50.0]) for atom, point in residues[0].atoms.items()}
    free = replace(residues[0], number=99, atoms=far)
    (chain,) = read(tmp_path, Mol("A", [*residues, free]))
    assert chain.sequence == "MTMTMTMTMT"
    assert details(chain, "odd") == ["MSE 99 is bound to no residue and was left out"]
    with pytest.raises(StructureError, match="no protein in it"):
        read(tmp_path, Mol("A", [free]))


def test_what_only_looks_like_a_residue_is_left_out(tmp_path: Path) -> None:
    mol = snake(SEQUENCE)
    far = {atom: point + np.array([0, 0, 50.0]) for atom, point in mol.residues[0].atoms.items()}
    mol.residues.append(replace(mol.residues[0], name="GLY", number=301, atoms=far, hetero=True))
    mol.residues.append(replace(mol.residues[0], name="CA", number=302, atoms={"CA": far["CA"]}, hetero=True))
    mol.residues.append(replace(mol.residues[0], name="HOH", number=303, atoms={"O": far["CA"]}, hetero=True))
    (chain,) = read(tmp_path, mol)
    assert chain.sequence == SEQUENCE
    assert details(chain, "odd") == ["GLY 301 is bound to no residue and was left out"]
    ligands = replace(mol.residues[60], place=0), replace(mol.residues[61], place=0)
    molecule = Mol("A", [*mol.residues[:60], *ligands], [NAMES[letter] for letter in SEQUENCE])
    (chain,) = read(tmp_path, molecule, kind="cif")
    assert (chain.sequence, chain.resolved, chain.notes) == (SEQUENCE, 60, ())


def test_a_name_that_nobody_knows_is_x(tmp_path: Path) -> None:
    (chain,) = read(tmp_path, change(snake(SEQUENCE), 7, name="HSD"))
    assert chain.sequence == f"{SEQUENCE[:6]}X{SEQUENCE[7:]}"
    assert details(chain, "altered") == ["1 HSD read as X"]


def test_where_cb_is_absent_ca_is_taken(tmp_path: Path) -> None:
    mol = snake("A" * 30)
    backbone = {atom: mol.residues[9].atoms[atom] for atom in ("N", "CA", "C")}
    mol = change(mol, 10, atoms=backbone)
    mol = change(mol, 20, atoms={"N": mol.residues[19].atoms["N"]})
    (chain,) = read(tmp_path, mol)
    np.testing.assert_allclose(chain.points[9], backbone["CA"], atol=1e-3)
    assert chain.sequence == "A" * 30
    assert 19 not in chain.places
    assert details(chain, "incomplete") == [
        "residues without coordinates: 1 of 30; their pairs are left out",
        "residues without CB: 1; CA is used",
    ]


def test_a_trace_of_ca_is_a_chain(tmp_path: Path) -> None:
    mol = snake(SEQUENCE).without(20, 21, 22)
    (chain,) = read(tmp_path, Mol("A", [replace(one, atoms={"CA": one.atoms["CA"]}) for one in mol.residues]))
    np.testing.assert_array_equal(chain.positions, [*range(19), *range(22, 60)])


@pytest.mark.parametrize("kind", KINDS)
def test_several_chains(tmp_path: Path, kind: str) -> None:
    dna = snake("ACGT" * 5, "D")
    dna.residues = [
        replace(one, name="DA", atoms={"P": one.atoms["N"], "C1'": one.atoms["CA"]}) for one in dna.residues
    ]
    dna.stated = ["DA"] * 20
    first, second = snake(letters(50, 1), "A", stated=True), snake(letters(40, 2), "B", stated=True)
    chains = read(tmp_path, first, dna, second, kind=kind)
    assert [(one.name, one.sequence) for one in chains] == [("x:A", letters(50, 1)), ("x:B", letters(40, 2))]


def test_two_molecules_of_one_name_are_told(tmp_path: Path) -> None:
    first, second = snake(letters(50, 1), " "), snake(letters(60, 2), " ")
    text = pdb(first).replace("END", "TER") + pdb(second)
    (chain,) = read(tmp_path, text=text)
    assert chain.sequence[:50] == letters(50, 1)
    assert (
        details(chain, "odd")[0] == "left out 50 residues with the numbers of earlier ones; is this a second molecule?"
    )
    (same,) = read(tmp_path, text=pdb(first).replace("END", "TER") + pdb(first))
    assert same.sequence == letters(50, 1)
    assert details(same, "odd")[0].startswith("left out 50 residues with the numbers of earlier ones")


def test_a_chain_without_a_name(tmp_path: Path) -> None:
    assert [one.name for one in read(tmp_path, snake(SEQUENCE, " "))] == ["x"]


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_files_are_the_same(tmp_path: Path, kind: str) -> None:
    mol = snake(SEQUENCE, stated=True).without(7)
    (plain,) = read(tmp_path, mol, kind=kind)
    packed = tmp_path / "y" / f"x.{kind}.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(KINDS[kind](mol).encode()))
    (chain,) = read_chains(packed)
    same(chain, plain)
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(StructureError, match=rf"x\.{kind}\.gz: .*cut short or damaged"):
        read_chains(packed)


def test_files_that_hold_no_structure(tmp_path: Path) -> None:
    dna = Mol("A", [replace(one, name="DA", atoms={"P": one.atoms["N"]}) for one in snake("ACGT").residues])
    for text, message in (
        ("", "empty"),
        ("\n \n", "empty"),
        (">a fasta\nMKT\n", "neither PDB"),
        ("HEADER    nothing\nEND\n", "neither PDB"),
        ("data_x\n_entry.id x\n", "cannot be read as a structure"),
        ("data_x\nloop_\n_atom_site.id\n1\n", "cannot be read as a structure"),
        (pdb(snake(SEQUENCE))[:500].replace("0.000", "x.xxx"), "cannot be read as a structure"),
        (pdb(dna), "no protein in it"),
        ("\0\xff" * 50, "neither PDB"),
    ):
        with pytest.raises(StructureError, match=rf"x\.pdb: {message}"):
            read(tmp_path, text=text)
    with pytest.raises(StructureError, match=r"absent\.pdb: "):
        read_chains(tmp_path / "absent.pdb")


@settings(max_examples=25)
@given(st.text(max_size=200), st.sampled_from(["", "data_x\n", "ATOM  ", "loop_\n_atom_site."]))
def test_no_text_brings_anything_but_its_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, before: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pdb"
    path.write_text(before + text, encoding="utf-8")
    with pytest.raises(StructureError, match=r"any\.pdb: "):
        read_chains(path)


def test_folders_and_what_is_in_them(tmp_path: Path) -> None:
    for name in ("b.pdb", "a.cif.gz", "c.ENT", ".hidden.pdb", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    names = [path.name for path in structure_files([tmp_path, tmp_path / "b.pdb", tmp_path / "notes.txt"])]
    assert names == ["a.cif.gz", "b.pdb", "c.ENT", "notes.txt"]
    with pytest.raises(StructureError, match="empty: no structures in this folder"):
        structure_files([tmp_path / "empty"])
    with pytest.raises(StructureError, match="nowhere: no such file or folder"):
        structure_files([tmp_path / "nowhere"])


def test_what_cannot_be_read_is_skipped_with_a_note(tmp_path: Path) -> None:
    written(tmp_path / "a.pdb", pdb(snake(SEQUENCE)))
    written(tmp_path / "a.cif", mmcif(snake(SEQUENCE, stated=True)))
    written(tmp_path / "b.pdb", "")
    chains, notes = read_structures([tmp_path])
    assert [one.name for one in chains] == ["a:A"]
    assert [(note.id, note.what) for note in notes] == [("a:A", "skipped"), ("b", "skipped")]
    with pytest.raises(StructureError) as caught:
        read_structures([tmp_path / "b.pdb"])
    check_message("contacts.no_protein", caught.value, tmp=tmp_path)


def test_without_biotite_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "biotite.structure.io.pdb", None)
    with pytest.raises(MissingExtraError, match=r"pip --python .* install 'protea\[evaluate\]'"):
        read(tmp_path, snake(SEQUENCE))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_real_structures() -> None:
    files = structure_files([SHARED])
    assert len(files) == 141
    some = [path for path in files if path.name.startswith(("1FQJ_l", "1AVX", "2G77", "1F6M"))]
    chains, notes = read_structures(some)
    assert not [note for note in notes if note.what == "skipped"]
    assert len(chains) == len(some) == 7
    for chain in chains:
        found = pairs(chain)
        assert set(chain.sequence) <= set(LETTERS)
        # Of natural folds some 2 % of pairs are in contact.
        assert 0.005 < found.contacts.mean() < 0.06, chain.name
    # Its selenomethionines stand at the end of the file.
    assert "5 MSE read as M" in [note.detail for note in notes if note.id == "1FQJ_l_B:B"]
