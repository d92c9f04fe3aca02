"""``protea score``, ``perplexity`` and ``contacts`` as users run them."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from pyarrow import csv, parquet

import protea
from conftest import Run, fails
from messages import check_message
from protea.errors import DeviceError, ProteaWarning
from protea.score.variants import CANONICAL

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    (tmp_path / "p.fasta").write_text(f">p some protein\n{SEQUENCE}\n")
    return "p.fasta"


@pytest.fixture
def two(tmp_path: Path) -> str:
    (tmp_path / "two.fasta").write_text(f">p\n{SEQUENCE}\n>q/2\nWWKKAJ\n")
    return "two.fasta"


@pytest.fixture
def folder(model_folders: dict[str, Path], one_thread: None) -> Path:
    return model_folders["esm2"]


def test_a_table_is_scored(run: Run, fasta: str, folder: Path) -> None:
    Path("v.csv").write_text("mutant,DMS_score\nM1V,0.5\nK2R:T3S,1.0\n")
    result = run("score", fasta, "v.csv", "-m", folder, "-o", "out.csv")
    assert result.code == 0, result.err
    assert "out.csv: 2 variants of 1 protein scored" in result.out
    table = csv.read_csv("out.csv").to_pydict()
    assert list(table) == ["mutant", "DMS_score", "model_score"]
    expected = protea.load(folder).score(SEQUENCE, ["M1V", "K2R:T3S"])
    np.testing.assert_allclose(table["model_score"], expected, rtol=0, atol=2e-5)
    told = yaml.safe_load(Path("out.csv.run.yaml").read_text())
    assert (told["method"], told["offset"], told["table"]) == ("masked-marginals", 1, "v.csv")
    assert told["models"][str(folder)]["files"]["model.safetensors"]
    assert Path("out.csv.report.tsv").read_text() == "row\tvariant\treason\n"
    again = ("score", fasta, "out.csv", "-m", folder, "-o", "again.csv")
    fails(run(*again), 2, "'model_score'", "--column NAME")
    assert run(*again, "--column", "other").code == 0
    other = run("score", fasta, "v.csv", "-m", folder, "-o", "out.csv", "--offset", 2)
    fails(other, 1, "out.csv: exists already", "offset 1 -> 2", "--overwrite")
    assert run("score", fasta, "v.csv", "-m", folder, "-o", "out.csv", "--overwrite").code == 0


def test_rows_that_cannot_be_scored_are_reported(run: Run, fasta: str, folder: Path) -> None:
    Path("v.csv").write_text("mutant\nM1V\nM1*\nW2R\n")
    result = run("score", fasta, "v.csv", "-m", folder, "-o", "out.tsv")
    assert result.code == 1
    assert "out.tsv: 1 variant of 1 protein scored" in result.out
    assert "row 2: M1*: " in result.err
    lines = Path("out.tsv").read_text().splitlines()
    assert lines[0] == "mutant\tmodel_score"
    assert [line.endswith("\t") for line in lines[1:]] == [False, True, True]
    report = Path("out.tsv.report.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in report] == ["row", "2", "3"]
    assert "position 2 holds K, not W" in report[2]


def test_an_offset_is_advised(run: Run, fasta: str, folder: Path) -> None:
    result = run("score", fasta, "-v", "M94V,K95R,T96A", "-m", folder)
    assert result.code == 1
    assert "with offset 94" in result.err
    result = run("score", fasta, "-v", "M94V,K95R,T96A", "--offset", "94", "-m", folder)
    assert result.code == 0
    assert len(result.out.splitlines()) == 4
    assert result.out.startswith("mutant\tmodel_score\nM94V\t")


def test_a_scan_of_two_proteins(run: Run, two: str, folder: Path) -> None:
    result = run("score", two, "--scan", "-m", folder, "-o", "scan.parquet", "--method", "wildtype-marginals")
    assert result.code == 0, result.err
    assert "q/2: altered: replaced by X: J at 6" in result.err
    assert "\tq/2\taltered: replaced by X: J at 6\n" in Path("scan.parquet.report.tsv").read_text()
    table = parquet.read_table("scan.parquet")
    assert table.num_rows == 19 * len(SEQUENCE) + 5 * 19 + 20  # an X can become any of the 20
    assert table.column_names == ["id", "position", "wild_type", "letter", "mutant", "model_score"]
    assert np.isfinite(table["model_score"].to_numpy()).all()


def test_an_ensemble(run: Run, fasta: str, model_folders: dict[str, Path], one_thread: None) -> None:
    models = [model_folders["esm2"], model_folders["esm1v"]]
    result = run("score", fasta, "-v", "M1V,K2R", "-m", models[0], "-m", models[1], "-o", "out.csv")
    assert result.code == 0, result.err
    table = csv.read_csv("out.csv").to_pydict()
    each = [protea.load(model).score(SEQUENCE, ["M1V", "K2R"]) for model in models]
    np.testing.assert_allclose(table["model_score"], np.mean(each, axis=0), rtol=0, atol=2e-5)
    for model, values in zip(models, each, strict=True):
        np.testing.assert_allclose(table[f"model_score {model}"], values, rtol=0, atol=2e-5)


def test_insertions_and_deletions(run: Run, fasta: str, folder: Path) -> None:
    result = run("score", fasta, "-v", "K2del,K2_T3insWW", "--method", "pseudo-likelihood", "-m", folder)
    assert result.code == 0, result.err
    expected = protea.load(folder).score(SEQUENCE, ["K2del", "K2_T3insWW"], method="pseudo-likelihood")
    found = [float(line.split("\t")[1]) for line in result.out.splitlines()[1:]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_errors_of_a_model_are_found_before_any_computes(
    run: Run, fasta: str, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("protea.infer.loading.load_model", computed)
    good = ("score", fasta, "-v", "M1V", "-m", model_folders["esm2"])
    fails(run(*good, "-m", "absent/"), 1, "absent")
    fails(run(*good, "-m", model_folders["esm2"]), 2, "-m", str(model_folders["esm2"]))
    Path("long.fasta").write_text(f">long\n{'M' * 1023}\n")
    long = ("score", "long.fasta", "-v", "M1V", "-m", model_folders["esm2"], "-m", model_folders["esm1b"])
    fails(run(*long, "--long", "full"), 1, "long: 1023 residues", "ESM-1b", "1022")
    Path("long.fasta").write_text(f">long\n{'M' * 1022}\n")
    longer = (*long[:2], "-v", "M1_M2insK", *long[4:], "--method", "pseudo-likelihood", "--long", "full")
    fails(run(*longer), 1, "long: 1023 residues", "ESM-1b", "1022")


def test_nothing_to_scan_is_an_error(run: Run, folder: Path) -> None:
    Path("gaps.fasta").write_text(">g\n----\n")
    fails(run("score", "gaps.fasta", "--scan", "-m", folder, "-o", "x.csv"), 1, "gaps.fasta")
    assert not Path("x.csv").exists()


def test_problems_are_shown_or_reported(run: Run, fasta: str, folder: Path) -> None:
    result = run("score", fasta, "-v", ",".join(f"W{place}A" for place in range(3, 15)), "-m", folder)
    assert result.code == 1
    assert len([line for line in result.err.splitlines() if "row " in line]) == 12
    result = run("score", fasta, "-v", "M94V,K95R,T96A", "-m", folder, "-o", "x.csv")
    assert "\t\tp: with offset 94, all 3 " in Path("x.csv.report.tsv").read_text()


def test_numbers_far_too_large(run: Run, fasta: str, folder: Path, with_contacts: Path) -> None:
    scan = ("score", fasta, "--scan", "-m", folder, "-o", "x.csv", "--offset")
    fails(run(*scan, 10**20), 2, "-999,999,999 to 999,999,999", "100000000000000000000")
    result = run("contacts", fasta, "-m", with_contacts, "-o", "y.csv", "--min-separation", 10**23)
    assert result.code == 0, result.err
    assert len(Path("y.csv").read_text().splitlines()) == 1


def test_a_scan_in_python_is_the_commands(run: Run, fasta: str, folder: Path) -> None:
    assert run("score", fasta, "--scan", "-m", folder, "-o", "x.parquet").code == 0
    found = protea.load(folder).scan(SEQUENCE)
    assert found.shape == (len(SEQUENCE), 20)
    told = parquet.read_table("x.parquet").to_pylist()
    assert len(told) == len(SEQUENCE) * 19
    for row in told:
        assert found[row["position"] - 1, CANONICAL.index(row["letter"])] == pytest.approx(row["model_score"], abs=2e-5)
    assert all(found[place, CANONICAL.index(letter)] == 0 for place, letter in enumerate(SEQUENCE))
    with pytest.warns(ProteaWarning, match="gaps"):
        assert np.isnan(protea.load(folder).scan("MK-A")[2]).all()


def test_positions_limit_a_scan(run: Run, fasta: str, folder: Path) -> None:
    scan = ("score", fasta, "--scan", "-m", folder)
    assert run(*scan, "-o", "all.csv", "--offset", 101).code == 0
    result = run(*scan, "-o", "some.csv", "--offset", 101, "--positions", "103-104,133", "--plot", "some.svg")
    assert result.code == 0, result.err
    every, part = (csv.read_csv(name).to_pylist() for name in ("all.csv", "some.csv"))
    wanted = [row for row in every if row["position"] in (103, 104, 133)]
    assert [row["mutant"] for row in part] == [row["mutant"] for row in wanted]
    np.testing.assert_allclose([row["model_score"] for row in part], [row["model_score"] for row in wanted], atol=2e-5)
    assert yaml.safe_load(Path("some.csv.run.yaml").read_text())["variants"] == "scan 103-104,133"
    found = protea.load(folder).scan(SEQUENCE, positions="103-104,133", offset=101)
    assert np.flatnonzero(np.isfinite(found).all(1)).tolist() == [2, 3, 32]
    for row in part:
        place, column = row["position"] - 101, CANONICAL.index(row["letter"])
        assert found[place, column] == pytest.approx(row["model_score"], abs=2e-5)
    fails(run(*scan, "-o", "x.csv", "--positions", "30-34"), 2, "34 is outside residues 1 to 33 of p")
    fails(run(*scan, "-o", "x.csv", "--positions", "some"), 2, "'some'")
    fails(run("score", fasta, "-v", "M1V", "-m", folder, "--positions", "1"), 2, "--positions", "--scan")
    fails(run("score", fasta, "-v", "M1V", "-m", folder, "--mutant-column", "x"), 2, "--mutant-column")


def test_a_table_in_hgvs_is_scored_like_a_plain_one(run: Run, fasta: str, folder: Path) -> None:
    Path("plain.csv").write_text("mutant\nM1V\nK2R:T3S\nR10*\n")
    Path("hgvs.tsv").write_text("# from elsewhere\nchange,x\np.(Met1Val),1\np.[Lys2Arg;Thr3Ser],2\np.Arg10Ter,3\n")
    plain = run("score", fasta, "plain.csv", "-m", folder, "-o", "plain.out.csv")
    hgvs = run("score", fasta, "hgvs.tsv", "--mutant-column", "change", "-m", folder, "-o", "hgvs.out.csv")
    assert (plain.code, hgvs.code) == (1, 1)
    scores = [csv.read_csv(f"{name}.out.csv")["model_score"].to_pylist() for name in ("plain", "hgvs")]
    assert scores[0] == scores[1]
    assert "\tp.Arg10Ter\tp.Arg10Ter: adds a stop codon" in Path("hgvs.out.csv.report.tsv").read_text()
    assert yaml.safe_load(Path("hgvs.out.csv.run.yaml").read_text())["mutant_column"] == "change"


def test_lengths_are_told(run: Run, fasta: str, folder: Path) -> None:
    command = ("score", fasta, "-v", "K2del,M1V", "-m", folder, "--method")
    means, sums = (run(*command, method) for method in ("pseudo-likelihood", "pseudo-likelihood-sum"))
    assert (means.code, sums.code) == (0, 0)
    assert "1 variant of another length than the wild type: scored by means" in means.err
    assert "1 variant of another length than the wild type: scored by sums" in sums.err
    rows = [result.out.splitlines() for result in (means, sums)]
    assert rows[0][1] != rows[1][1]
    assert rows[0][2] == rows[1][2]


def test_an_ensemble_sees_what_its_narrowest_alphabet_has(
    run: Run, model_folders: dict[str, Path], one_thread: None
) -> None:
    Path("g.fasta").write_text(">g\nMK-T.A\n")
    models = ("-m", model_folders["esm2"], "-m", model_folders["esm1nv"])
    found = [run("score", "g.fasta", "-v", "M1V", *order) for order in (models, models[2:] + models[:2])]
    assert [one.code for one in found] == [0, 0]
    header, row = found[0].out.splitlines()
    other = dict(zip(*(line.split("\t") for line in found[1].out.splitlines()), strict=True))
    assert dict(zip(header.split("\t"), row.split("\t"), strict=True)) == other
    assert "g: altered: replaced by X: - at 3; . at 5" in found[0].err
    alone = run("score", "g.fasta", "-v", "M1V", *models[:2])
    assert "note: gaps, which count as residues: record 'g'; --gaps drop" in alone.err
    ungapped = run("score", "g.fasta", "-v", "T3A", "--gaps", "drop", *models[:2])
    assert (ungapped.code, "g: altered: 2 gaps removed" in ungapped.err) == (0, True)


def test_ids_reach_no_terminal_as_they_are(run: Run, folder: Path) -> None:
    Path("red.fasta").write_text(">\x1b[31mred\nMKJ\n")
    result = run("score", "red.fasta", "-v", "M1V", "-m", folder)
    assert "\x1b" not in result.err
    assert "\\x1b[31mred: altered" in result.err


def test_wrong_usage(run: Run, fasta: str, folder: Path) -> None:
    result = run("score", fasta, "-m", folder)
    fails(result, 2, "--variants or --scan")
    check_message("score.what", result.err)
    fails(run("score", fasta, "--scan", "-v", "M1V", "-m", folder, "-o", "x.csv"), 2, "--variants or --scan")
    fails(run("score", fasta, "--scan", "-m", folder), 2, "-o OUT.csv")
    fails(run("score", fasta, "M1V", "-m", folder, "-o", "x.csv"), 2, "M1V: is no table", "-v M1V")
    fails(run("score", fasta, "-v", "", "-m", folder), 2, "--variants")
    fails(run("score", fasta, "-v", "M1V,", "-m", folder), 2, "--variants")
    Path("masked.fasta").write_text(">p\nMK<mask>TA\n")
    result = run("score", "masked.fasta", "-v", "M1V", "-m", folder)
    fails(result, 1, "masked.fasta", "<mask> at position 3")
    check_message("score.masked_position", result.err)
    fails(run("score", fasta, "-v", "M1V", "-m", folder, "--column", ""), 2, "--column ''")
    fails(run("score", fasta, "--scan", "-m", folder, "-o", "x.xlsx"), 2, "x.xlsx")
    fails(run("score", fasta, "-v", "M1V", "--plot", "x.png", "-m", folder), 2, "--plot", "--scan")
    fails(run("score", fasta, "-v", "M1V", "--method", "best", "-m", folder), 2, "'best'")
    fails(run("score", fasta, "-v", "M1V", "--long", "cut", "-m", folder), 2, "'cut'")
    fails(run("score", "absent.fasta", "-v", "M1V", "-m", folder), 1, "absent.fasta: ")
    fails(run("score", fasta, "absent.csv", "-m", folder, "-o", "x.csv"), 1, "absent.csv: ")
    Path("twice.fasta").write_text(">p\nMKT\n>p\nMKW\n")
    result = run("score", "twice.fasta", "-v", "M1V", "-m", folder)
    fails(result, 2, "twice.fasta", "p")
    check_message("score.repeated_id", result.err)
    fails(run("score", fasta, "-v", "M1V", "-m", folder, "--fast", "--dtype", "float16"), 2, "--fast", "--dtype")


# Perplexity


def test_perplexity_and_its_twin(run: Run, two: str, folder: Path) -> None:
    result = run("perplexity", two, "-m", folder, "--select", "0.5", "--against", "transformers", "-o", "p.csv")
    assert result.code == 0, result.out + result.err
    first, second, third = result.out.splitlines()
    assert first.startswith("perplexity ")
    assert "39 residues predicted, 2 sequences" in first
    assert second == "p.csv: 2 sequences"
    assert third.startswith("transformers: perplexity ")
    assert "equal within 0.0005" in third
    assert first.split()[1].rstrip(":") == third.split()[2].rstrip(",")
    table = csv.read_csv("p.csv").to_pydict()
    assert list(table) == ["id", "length", "predicted", "loss", "perplexity"]
    weights = np.array(table["predicted"])
    losses = np.array([0 if loss is None else loss for loss in table["loss"]])
    assert float(first.split()[1].rstrip(":")) == pytest.approx(
        np.exp((losses * weights).sum() / weights.sum()), abs=1e-4
    )
    assert "q/2\taltered" in Path("p.csv.report.tsv").read_text()
    told = yaml.safe_load(Path("p.csv.run.yaml").read_text())
    assert (told["masking"], told["select"], told["seed"]) == ("standard", 0.5, 42)


def test_pseudo_perplexity(run: Run, two: str, folder: Path) -> None:
    result = run("perplexity", two, "-m", folder, "--pseudo", "-o", "p.parquet")
    assert result.code == 0, result.err
    assert "39 of 39 residues predicted" in result.out
    expected = protea.load(folder).pseudo_perplexity([SEQUENCE, "WWKKAX"])
    np.testing.assert_allclose(parquet.read_table("p.parquet")["perplexity"].to_pylist(), expected, rtol=1e-4)


def test_wrong_usage_of_perplexity(run: Run, two: str, folder: Path) -> None:
    fails(run("perplexity", two, "-m", folder, "--pseudo", "--against", "transformers"), 2, "--against", "--pseudo")
    fails(run("perplexity", two, "-m", folder, "--pseudo", "--seed", 7), 2, "--masking, --select and --seed")
    fails(run("perplexity", two, "-m", folder, "--plot", "x.png"), 2, "--plot", "--pseudo")
    fails(run("perplexity", two, "-m", folder, "--masking", "most"), 2, "'most'")
    fails(run("perplexity", two, "-m", folder, "--select", "1.5"), 2, "select", "1.5")
    result = run("perplexity", two, "-m", folder, "--long", "window")
    fails(result, 2, "--long 'window'", "truncate, full, error")
    check_message("perplexity.policy", result.err)
    fails(run("perplexity", two, "-m", folder, "--unknown", "y"), 2, "--unknown 'y'", "x, error, skip")
    fails(run("perplexity", two, "-m", folder, "--unknown", "error"), 1, "J at 6")
    fails(run("perplexity", two, "-m", folder, "--against", "tape"), 2, "--against tape")
    Path("odd.fasta").write_text(">p\nJJ\n")
    fails(run("perplexity", "odd.fasta", "-m", folder, "--unknown", "skip"), 1, "odd.fasta: ")


# Contacts


@pytest.fixture
def with_contacts(folder: Path, tmp_path: Path) -> Path:
    model = protea.load(folder)
    assert model.module.contact_head is not None
    with torch.no_grad():
        weight = model.module.contact_head.regression.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 30)
    model.save(tmp_path / "contacts")
    return tmp_path / "contacts"


def test_maps_and_pairs(run: Run, two: str, with_contacts: Path) -> None:
    result = run("contacts", two, "-m", with_contacts, "-o", "maps.h5")
    assert result.code == 0, result.err
    assert "maps.h5: contacts of 2 proteins" in result.out
    model = protea.load(with_contacts)
    expected = model.contacts(SEQUENCE)
    with h5py.File("maps.h5") as file:
        assert list(file) == ["p", "q%2F2"]
        np.testing.assert_allclose(file["p"][:], expected, rtol=0, atol=2e-5)
        assert file["q%2F2"].attrs["id"] == "q/2"
        assert file["q%2F2"].shape == (6, 6)
    options = ("-m", with_contacts, "--min-probability", "0.5", "--min-separation", "3")
    result = run("contacts", two, "-o", "pairs.csv", *options)
    assert result.code == 0, result.err
    table = csv.read_csv("pairs.csv").to_pydict()
    of_p = [k for k, name in enumerate(table["id"]) if name == "p"]
    wanted = {(i + 1, j + 1) for i in range(33) for j in range(i + 3, 33) if expected[i, j] >= 0.5}
    assert {(table["i"][k], table["j"][k]) for k in of_p} == wanted
    assert wanted
    assert all(table["residue_i"][k] == SEQUENCE[table["i"][k] - 1] for k in of_p)
    assert all(table["residue_j"][k] == SEQUENCE[table["j"][k] - 1] for k in of_p)


def test_proteins_that_are_too_long_are_told_and_the_others_predicted(
    run: Run, model_folders: dict[str, Path], one_thread: None
) -> None:
    Path("some.fasta").write_text(f">short\n{SEQUENCE}\n>long\n{'M' * 1023}\n")
    result = run("contacts", "some.fasta", "-m", model_folders["esm1b"], "-o", "x.h5")
    assert result.code == 1
    assert "long: skipped: 1,023 residues" in result.err
    with h5py.File("x.h5") as file:
        assert list(file) == ["short"]
    Path("long.fasta").write_text(f">long\n{'M' * 1023}\n")
    fails(run("contacts", "long.fasta", "-m", model_folders["esm1b"], "-o", "y.h5"), 1, "long: 1,023 residues")


def test_proteins_whose_maps_memory_does_not_hold_are_told_and_the_others_predicted(
    run: Run, two: str, with_contacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protea.contacts.predict.free_memory", lambda device: 24 * 32**2)
    result = run("contacts", two, "-m", with_contacts, "-o", "x.h5")
    assert result.code == 1
    assert "p: skipped: contacts of 33 residues" in result.err
    with h5py.File("x.h5") as file:
        assert list(file) == ["q%2F2"]
    with pytest.raises(DeviceError, match="contacts of 33 residues"):
        protea.load(with_contacts).contacts(SEQUENCE)


def test_a_model_that_gives_nan_has_no_contacts(run: Run, fasta: str, with_contacts: Path, tmp_path: Path) -> None:
    model = protea.load(with_contacts)
    model.module.word_embeddings.weight.data[:] = torch.nan
    model.save(tmp_path / "nan")
    fails(run("contacts", fasta, "-m", "nan", "-o", "x.csv"), 1, "p: the model gives infinities or NaN")
    assert not Path("x.csv").exists()


def test_pairs_of_nothing_have_columns(run: Run, fasta: str, with_contacts: Path) -> None:
    assert run("contacts", fasta, "-m", with_contacts, "-o", "x.parquet", "--min-separation", 1000).code == 0
    assert [str(kind) for kind in parquet.read_schema("x.parquet").types] == [
        *("string", "int64", "int64", "string", "string", "double")
    ]


def test_wrong_usage_of_contacts(run: Run, two: str, folder: Path, model_folders: dict[str, Path]) -> None:
    fails(run("contacts", two, "-m", folder), 2, "name an output")
    Path("alike.fasta").write_text(">a/b\nMKT\n>a%2Fb\nMKW\n")
    fails(run("contacts", "alike.fasta", "-m", folder, "-o", "x.h5"), 2, "this id was used before")
    fails(run("contacts", two, "-m", folder, "-o", "x.pdb"), 2, "x.pdb: ")
    fails(run("contacts", two, "-m", model_folders["esm1nv"], "-o", "x.h5"), 1, "no contacts", "fit-contacts")
    fails(run("contacts", two, "-m", folder, "--plot", "x.png"), 2, "there are 2 proteins; name a folder")
    assert not list(Path().glob(".x*"))


# Pictures


def test_pictures_of_scores(run: Run, fasta: str, folder: Path) -> None:
    commands = {
        "scan.svg": ("score", fasta, "--scan", "-m", folder, "-o", "scan.csv"),
        "profile.svg": ("perplexity", fasta, "--pseudo", "-m", folder),
    }
    for picture, command in commands.items():
        result = run(*command, "--plot", picture)
        assert result.code == 0, result.err
        assert "<svg" in Path(picture).read_text()
        assert f"{picture}: the {picture.partition('.')[0]} of p" in result.out.splitlines()
    fails(run(*commands["profile.svg"], "--plot", "profile.svg"), 1, "profile.svg", "--overwrite")


def test_a_folder_of_scans(run: Run, two: str, folder: Path) -> None:
    command = ("score", two, "--scan", "-m", folder, "--method", "wildtype-marginals", "-o")
    result = run(*command, "scan.csv", "--plot", "scans")
    assert result.code == 0, result.err
    assert result.out.endswith("scans: 2 scans\n")
    assert sorted(path.name for path in Path("scans").iterdir()) == ["p.html", "plotly.min.js", "q%2F2.html"]
    Path("own").mkdir()
    Path("own/index.html").write_text("the user's own")
    assert run("score", two, "--scan", "-m", folder, "--positions", "1", "-o", "own.csv", "--plot", "own").code == 0
    assert Path("own/index.html").read_text() == "the user's own"
    page = Path("scans/q%2F2.html").read_text()
    assert 'src="plotly.min.js"' in page
    assert len(page) < 100_000
    fails(run(*command, "other.csv", "--plot", "scans"), 1, "scans/p.html", "exists already")
    assert not Path("other.csv").exists()


def test_places_of_scans_are_checked_before_work(
    run: Run, two: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("score", two, "--scan", "-o", "scan.csv", "--plot")
    Path("scans").write_text("a file")
    # The model, which is absent, is not looked for.
    fails(run(*command, "scans", "-m", "absent/"), 1, "scans: exists and was not written by this command; name another")
    fails(run(*command, "scans", "-m", "absent/", "--overwrite"), 1, "scans: exists and was not written")
    fails(run(*command, "deep/er/scans", "-m", "absent/"), 1, "there is no folder deep/er; create it first")

    def fail(*_: object) -> None:
        raise AssertionError("a model computes")

    monkeypatch.setattr("protea.score.variant_table.scores_of", fail)
    Path("full").mkdir()
    Path("full/q%2F2.html").write_text("")
    fails(run(*command, "full", "-m", folder), 1, "full/q%2F2.html: exists already")
    monkeypatch.setattr("protea.output.os.access", lambda path, mode: Path(path).name != "full" or mode == os.R_OK)
    fails(
        run(*command, "full", "-m", folder, "--overwrite"), 1, "full/p.html: no permission to write in the folder full"
    )
    assert not Path("scan.csv").exists()


@pytest.mark.long
def test_pictures(run: Run, fasta: str, two: str, with_contacts: Path) -> None:
    options = ("-m", with_contacts)
    result = run("score", fasta, "--scan", "-o", "scan.csv", "--plot", "scan.html", *options)
    assert result.code == 0, result.err
    assert "scan.html: the scan of p" in result.out
    assert b"plotly" in Path("scan.html").read_bytes()
    assert run("perplexity", fasta, "--pseudo", "--plot", "profile.svg", *options).code == 0
    assert "<svg" in Path("profile.svg").read_text()
    assert run("contacts", fasta, "--plot", "map.png", *options).code == 0
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")
    result = run("contacts", two, "--plot", "maps", *options)
    assert result.code == 0, result.err
    assert sorted(path.name for path in Path("maps").iterdir()) == ["p.png", "q%2F2.png"]
    for picture, command in (
        ("scan.html", ("score", fasta, "--scan", "-o", "other.csv")),
        ("profile.svg", ("perplexity", fasta, "--pseudo")),
        ("map.png", ("contacts", fasta)),
        ("maps", ("contacts", two)),
    ):
        fails(run(*command, "--plot", picture, *options), 1, picture, "exists already")
    assert run("contacts", two, "--plot", "maps", "--overwrite", *options).code == 0


def test_wrong_usage_of_pictures(run: Run, fasta: str, with_contacts: Path) -> None:
    options = ("-m", with_contacts)
    for command in (("score", fasta, "--scan", "-o", "x.csv"), ("perplexity", fasta, "--pseudo"), ("contacts", fasta)):
        fails(run(*command, "--plot", "x.gif", *options), 2, "x.gif", ".png")
        fails(run(*command, "--plot", "absent/x.png", *options), 1, "absent")
    Path("pair.fasta").write_text(">p\nMKT\n>q\nMKW\n")
    for command in (("score", "pair.fasta", "--scan", "-o", "x.csv"), ("perplexity", "pair.fasta", "--pseudo")):
        fails(run(*command, "--plot", "x.png", *options), 2, "--plot", "2")
    assert not Path("x.csv").exists()


def test_proteins_from_tables(run: Run, folder: Path) -> None:
    """Perplexity and scores of a table's proteins are those of the same FASTA file."""
    Path("in.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMKLV-\n")
    Path("in.tsv").write_text("Entry\tName of it\theavy\na\t1\tMKTAYIAKQR\nb\t2\tMKLV-\n")
    Path("known.csv").write_text("Entry,Sequence\na,MKTAYIAKQR\nb,MKLV-\n")
    Path("variants.csv").write_text("id,mutant\na,M1V\nb,K2A\n")
    model = ("-m", folder)
    given = run("perplexity", "in.fasta", *model), run("perplexity", "in.tsv", *model, "--sequence-column", "heavy")
    assert given[0].code == 0
    assert given[0] == given[1]
    assert "note: gaps, which count as residues: record 'b'; --gaps drop" in given[0].err
    for name in ("in.fasta", "known.csv"):
        assert run("score", name, "variants.csv", *model, "-o", f"{name}.out.csv").code == 0
    assert Path("in.fasta.out.csv").read_text() == Path("known.csv.out.csv").read_text()
    assert "b,gapped: 1 gap" in Path("known.csv.out.csv.report.tsv").read_text().replace("\t", ",")
    fails(run("perplexity", "in.tsv", *model), 1, "in.tsv", "--sequence-column", "Entry, Name of it, heavy")
    scored = ("score", "in.tsv", "variants.csv", *model, "-o", "in.tsv.csv")
    assert run(*scored, "--id-column", "entry", "--sequence-column", "heavy").code == 0
    assert Path("in.tsv.csv").read_text() == Path("known.csv.out.csv").read_text()
    told = yaml.safe_load(Path("in.tsv.csv.run.yaml").read_text())
    assert (told["id_column"], told["sequence_column"]) == ("entry", "heavy")
    fails(run("score", "in.fasta", "variants.csv", *model, "-o", "x.csv", "--id-column", "entry"), 2, "is no table")
    Path("whole.csv").write_text("id,heavy\na,VKTAYIAKQR\nb,MALV-\n")
    for proteins, option in (("in.fasta", "--sequence-column"), ("known.csv", "--mutated-sequence-column")):
        named = run("score", proteins, "whole.csv", *model, "-o", f"{proteins}.whole.csv", option, "heavy")
        assert named.code == 0
        columns = [Path(name).read_text().split() for name in ("known.csv.out.csv", f"{proteins}.whole.csv")]
        scores = [[row.rpartition(",")[2] for row in rows] for rows in columns]
        assert scores[0] == scores[1]
    fails(run("perplexity", "in.fasta", *model, "--gaps", "remove"), 2, "--gaps", "'remove'", "keep, drop")
