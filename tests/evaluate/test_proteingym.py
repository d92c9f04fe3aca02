"""Deep mutational scans: measures beside slow ones and scikit-learn's, and the command."""

from __future__ import annotations

import gzip
import math
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from biotite.sequence import ProteinSequence
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv
from scipy.stats import rankdata

import protea
from conftest import Run, fails
from messages import check_message
from protea.alphabet import ESM
from protea.errors import DataError
from protea.evaluate.proteingym import Assay, Measured, means, measure, read_assays, read_scan
from protea.score.effects import Scoring
from protea.score.variant_table import rows_of, variant_table

WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "proteingym"


def slow(predicted: list[float], measured: list[float], high: list[bool]) -> dict[str, float]:
    """By the definitions, in loops; predictions without ties."""
    n = len(predicted)
    order = sorted(range(n), key=lambda i: -predicted[i])
    pairs = [(i, j) for i in range(n) for j in range(n) if high[i] and not high[j]]
    median = float(np.median(predicted))
    chosen = [value >= median for value in predicted]
    tp, fp, fn, tn = (
        sum(h is a and c is b for h, c in zip(high, chosen, strict=True))
        for a, b in ((True, True), (False, True), (True, False), (False, False))
    )
    low, width = min(measured), max(measured) - min(measured)
    gains = [(value - low) / width for value in measured]
    top = max(1, n // 10)
    ideal = sorted(gains, reverse=True)
    best = [value >= np.percentile(measured, 90) for value in measured]
    found = [value >= np.percentile(predicted, 90) for value in predicted]
    return {
        "spearman": float(np.corrcoef(rankdata(predicted), rankdata(measured))[0, 1]),
        "auc": sum((predicted[i] > predicted[j]) + 0.5 * (predicted[i] == predicted[j]) for i, j in pairs) / len(pairs),
        "mcc": (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
        "ndcg": sum(gains[i] / math.log2(r + 2) for r, i in enumerate(order[:top]))
        / sum(gain / math.log2(r + 2) for r, gain in enumerate(ideal[:top])),
        "top_recall": sum(a and b for a, b in zip(best, found, strict=True)) / sum(best),
    }


@settings(max_examples=25)
@given(st.integers(4, 80), st.integers(0, 2**32 - 1))
def test_measures_by_definition(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted = rng.permutation(n).astype(float)
    measured = rng.integers(0, 6, n).astype(float)
    high = np.zeros(n, bool)
    high[rng.permutation(n)[: rng.integers(1, n)]] = True
    if np.ptp(measured) == 0:
        measured[0] += 1
    found = measure(predicted, measured, high)
    expected = slow(predicted.tolist(), measured.tolist(), high.tolist())
    assert found == pytest.approx(expected, abs=1e-9)


def test_where_a_measure_is_not_defined() -> None:
    one = np.ones(5)
    found = measure(one, np.arange(5.0), np.array([True] * 5))
    assert math.isnan(found["spearman"])
    assert math.isnan(found["auc"])
    assert math.isnan(found["ndcg"])
    assert math.isnan(found["top_recall"])
    assert all(map(math.isnan, measure(np.array([]), np.array([]), np.array([], bool)).values()))
    measured = np.arange(6.0)
    assert measure(np.array([1.0, 1, 1, 1, 1, 2]), measured, measured > 2)["mcc"] == 0  # all reach the median


def test_equal_predictions_stay_in_the_order_of_the_table() -> None:
    rng = np.random.default_rng(0)
    predicted, measured = rng.integers(0, 4, 60).astype(float), rng.normal(size=60)
    expected = slow(predicted.tolist(), measured.tolist(), (measured > 0).tolist())
    assert measure(predicted, measured, measured > 0) == pytest.approx(expected)


def result(name: str, protein: str, kind: str, value: float) -> Measured:
    return Measured(Assay(name, protein, kind, WILD, Path(), {}), 1, [], [], {"spearman": value})


def test_means_are_over_proteins_then_kinds() -> None:
    results = [
        result("a", "P", "x", 0.0),
        result("b", "P", "x", 1.0),
        result("c", "Q", "x", 0.1),
        result("d", "R", "y", 0.9),
        result("e", "S", "y", float("nan")),
    ]
    found = means(results, "spearman")
    assert found == pytest.approx({"assays": 0.5, "proteins": (0.5 + 0.1 + 0.9) / 3, "functions": (0.3 + 0.9) / 2})
    assert means(results, "spearman", {"a": 0.25})["assays"] == 0.25
    # One protein measured for two kinds of function is one protein.
    twice = [result("a", "P", "x", 0.5), result("b", "P", "y", 0.7), result("c", "Q", "x", 0.2)]
    assert means(twice, "spearman") == pytest.approx(
        {"assays": 1.4 / 3, "proteins": (0.6 + 0.2) / 2, "functions": ((0.5 + 0.2) / 2 + 0.7) / 2}
    )
    plain = [result("a", "P", "", 0.5)]
    assert set(means(plain, "spearman")) == {"assays", "proteins"}


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """The short layout, one file compressed."""
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "assays.csv").write_text(
        f"assay,target_seq,spearman Some (8M)\nP1_X_A_2020,{WILD},0.25\nP1_X_B_2021,{WILD},\n"
    )
    rows = [f"{WILD[i]}{i + 1}{new},{(i * 7 + k * 3) % 11 / 10}" for i in range(10) for k, new in enumerate("AW")]
    (folder / "P1_X_A_2020.csv").write_text("\n".join(["mutant,score", *rows]) + "\n")
    bad = ["W1A,1.0", "M1*,0.0"]
    (folder / "P1_X_B_2021.csv.gz").write_bytes(gzip.compress("\n".join(["mutant,score", *rows, *bad]).encode()))
    return folder


def test_the_command(run: Run, short: Path, model_folders: dict[str, Path], one_thread: None) -> None:
    folder = model_folders["esm2"]
    result = run("evaluate", "proteingym", short, "-m", folder, "--beside", "Some (8M)", "-o", "out.csv")
    assert result.code == 1
    assert "P1_X_B_2021: 2 variants could not be scored: W1A: position 1 holds M, not W" in result.err
    lines = result.out.splitlines()
    assert lines[0].split()[:3] == ["assay", "variants", "spearman"]
    assert lines[1].split()[-1] == "0.250"
    assert lines[2].split()[-1] == "-"
    assert lines[3].startswith("mean over 2 assays")
    assert lines[4].startswith("mean over 1 protein ")
    table = csv.read_csv("out.csv").to_pydict()
    assert table["variants"] == [20, 20]
    assert table["left_out"] == [0, 2]
    assert table["spearman"][0] == table["spearman"][1]
    names = [f"{WILD[i]}{i + 1}{new}" for i in range(10) for new in "AW"]
    scores = protea.load(folder).score(WILD, names)
    measured = np.array([(i * 7 + k * 3) % 11 / 10 for i in range(10) for k in range(2)])
    expected = measure(scores, measured, measured >= np.median(measured))
    assert table["spearman"][0] == pytest.approx(expected["spearman"], abs=1e-9)
    assert "P1_X_B_2021\t21\tW1A\t" in Path("out.csv.report.tsv").read_text()
    result = run("evaluate", "proteingym", short, "-m", folder, "-m", model_folders["esm1v"], "--assays", "P1_X_A_2020")
    assert result.code == 0, result.err
    both = scores + protea.load(model_folders["esm1v"]).score(WILD, names)
    expected = measure(both, measured, measured >= np.median(measured))
    assert float(result.out.splitlines()[1].split()[2]) == pytest.approx(expected["spearman"], abs=6e-4)


def test_proteingyms_own_layout(run: Run, tmp_path: Path, model_folders: dict[str, Path], one_thread: None) -> None:
    folder = tmp_path / "gym"
    (folder / "DMS_ProteinGym_substitutions").mkdir(parents=True)
    (folder / "DMS_substitutions.csv").write_text(
        "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type\n"
        f"A,A_file.csv,ONE_HUMAN,{WILD},Stability\nB,B_file.csv,ONE_HUMAN,{WILD},Activity\n"
    )
    for name in ("A_file.csv", "B_file.csv"):
        (folder / "DMS_ProteinGym_substitutions" / name).write_text(
            "mutant,mutated_sequence,DMS_score,DMS_score_bin\n"
            f"M1A,A{WILD[1:]},0.5,1\nM1A:K2R,AR{WILD[2:]},0.1,0\nK2W,MW{WILD[2:]},0.2,1\n"
        )
    result = run("evaluate", "proteingym", folder, "-m", model_folders["esm2"], "--method", "wildtype-marginals")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1].startswith("mean over 2 functions")


def test_what_is_wrong_is_said(run: Run, short: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    command = ("evaluate", "proteingym", short, "-m", model_folders["esm2"])
    unknown = run(*command, "--assays", "Z")
    fails(unknown, 2, "--assays 'Z'", "P1_X_A_2020")
    check_message("proteingym.unknown_assay", unknown.err)
    fails(run(*command, "--beside", "Z"), 2, "--beside 'Z'", "Some (8M)")
    check_message("proteingym.no_assays", run("evaluate", "proteingym", tmp_path).err, tmp=tmp_path)
    (short / "P1_X_A_2020.csv").write_text("mutant,score\nM1A,high\n")
    fails(run(*command), 1, "P1_X_A_2020.csv: score: row 1: 'high' is not a number")
    (short / "P1_X_A_2020.csv").write_text("mutant,score\nM1A,nan\n")
    fails(run(*command), 1, "score: nothing was measured")
    (short / "P1_X_A_2020.csv").write_text("mutant,score\nM1A,1\nM1C,inf\n")
    fails(run(*command), 1, "row 2 is not finite")
    (short / "P1_X_A_2020.csv").write_text("mutant,DMS_score,DMS_score_bin\nM1A,1,1\nM1C,0,2\n")
    fails(run(*command), 1, "DMS_score_bin: row 2: '2' is neither 0 nor 1")
    (short / "P1_X_A_2020.csv").write_text("mutant,fitness\nM1A,1\n")
    fails(run(*command), 1, "no column is named DMS_score or score; it has mutant, fitness")
    for name in ("P1_X_A_2020.csv", "P1_X_B_2021.csv.gz"):
        (short / name).unlink()
    with pytest.raises(DataError, match="P1_X_A_2020") as caught:
        read_assays(short)
    check_message("proteingym.no_scan", caught.value, folder=short)


def test_an_absent_scan_is_told_and_skipped(
    run: Run, short: Path, model_folders: dict[str, Path], one_thread: None
) -> None:
    assays = short / "assays.csv"
    assays.write_text(f"{assays.read_text()}P2_X_C_2022,{WILD},0.75\n")
    command = ("evaluate", "proteingym", short, "-m", model_folders["esm2"], "--beside", "Some (8M)")
    result = run(*command, "-o", "out.csv")
    assert result.code == 1
    told = next(line for line in result.err.splitlines() if "P2_X_C_2022" in line)
    check_message("proteingym.absent_scan", told, folder=short)
    lines = {line.split("  ")[0]: line.split() for line in result.out.splitlines()}
    assert lines["P2_X_C_2022"][1:4] == ["0", "-", "-"]
    assert lines["mean over 2 of 3 assays"][-1] == "0.250"  # without the skipped assay's 0.75
    assert "mean over 1 of 2 proteins" in lines
    table = csv.read_csv("out.csv").to_pydict()
    assert table["variants"] == [20, 20, 0]
    assert "P2_X_C_2022" in Path("out.csv.report.tsv").read_text()
    in_python = protea.load(model_folders["esm2"]).evaluate_proteingym(short)
    assert [one.count for one in in_python] == [20, 20, 0]
    assert math.isnan(in_python[2].measures["spearman"])
    assert means(in_python, "spearman")["assays"] == pytest.approx(in_python[0].measures["spearman"])
    assert "P2_X_C_2022.csv" in in_python[2].advice[0]
    present = run(*command, "--assays", "P1_X_A_2020")
    assert present.code == 0, present.err


def test_scans_with_semicolons_and_columns_of_proteins(run: Run, short: Path, model_folders: dict[str, Path]) -> None:
    """The assay says which protein it is; columns of no use may share a name, as in ProteinGym's predictions."""
    assays = short / "assays.csv"
    assays.write_text("# comment\n" + assays.read_text().replace(",", ";"))
    scan = short / "P1_X_A_2020.csv"
    rows = [line.split(",") for line in scan.read_text().splitlines()[1:]]
    lines = [f"P53_HUMAN;p.{mutant};{score};1;2" for mutant, score in rows]
    scan.write_text("\n".join(["# MaveDB", "protein;hgvs_pro;score;other;other", *lines, "# end"]) + "\n")
    result = run("evaluate", "proteingym", short, "-m", model_folders["esm2"], "--assays", "P1_X_A_2020", "-o", "o.csv")
    assert result.code == 0, result.err
    assert "left out 1 comment" in result.err
    assert csv.read_csv("o.csv")["variants"].to_pylist() == [20]


def test_a_table_of_assays_that_is_odd(run: Run, short: Path, model_folders: dict[str, Path]) -> None:
    command = ("evaluate", "proteingym", short, "-m", model_folders["esm2"])
    assays = short / "assays.csv"
    good = assays.read_text()
    for content, message in (
        (good + good.splitlines()[1] + "\n", "two assays are named P1_X_A_2020"),
        (good.replace("0.25", "pending"), "P1_X_A_2020: spearman Some (8M): 'pending' is not a number"),
        (good.replace(WILD, ""), "P1_X_A_2020 has no target_seq"),
        (good.replace(WILD, WILD.lower()), "P1_X_A_2020: target_seq must be upper-case"),
        (good.replace(WILD, WILD[:-1] + "-"), "P1_X_A_2020: target_seq must be upper-case letters without gaps"),
        (good.replace("assay,", "target_seq,", 1), "two columns are named target_seq"),
        (good.replace(WILD, WILD[:-1] + "J"), "P1_X_A_2020: target_seq: residue 'J'"),
        (good.splitlines()[0] + "\n", "has no rows"),
    ):
        assays.write_text(content)
        fails(run(*command), 1, message)
    assays.write_text(good.replace("P1_X_A_2020", "0012"))
    (short / "P1_X_A_2020.csv").rename(short / "0012.csv")
    (short / "latin.csv").write_bytes(b"caf\xe9\n1\n")
    (short / "old").mkdir()
    (short / "old" / "0012.csv").write_text("mutant,score\nM1A,1\n")
    first, _ = read_assays(short)
    assert (first.name, first.sequence, first.path) == ("0012", WILD, short / "0012.csv")
    (short / "0012.csv.gz").write_bytes(gzip.compress(b"mutant,score\nM1A,1\n"))
    fails(run(*command), 1, "0012 has several scans", "remove one")
    fails(run("evaluate", "proteingym", "absent"), 1, "absent: no such folder")
    fails(run("evaluate", "proteingym", assays), 1, "assays.csv: is not a folder")


def test_what_was_not_measured_is_left_out_and_told(
    run: Run, short: Path, model_folders: dict[str, Path], one_thread: None
) -> None:
    command = ("evaluate", "proteingym", short, "-m", model_folders["esm2"], "--assays", "P1_X_A_2020", "--overwrite")
    scan = short / "P1_X_A_2020.csv"
    measured = [f"{WILD[0]}1{letter},{number},{number > 2}" for number, letter in enumerate("ACDEF")]
    header = "mutant,DMS_score,DMS_score_bin"
    scan.write_text("\n".join([header, *measured]) + "\n")
    result = run(*command, "-o", "whole.csv")
    assert result.code == 0, result.err
    scan.write_text("\n".join([header, *measured, f"{WILD[0]}1G,,", f"{WILD[0]}1H,NA,True"]) + "\n")
    result = run(*command, "-o", "holes.csv")
    assert result.code == 1
    assert "P1_X_A_2020: 2 variants could not be scored: not measured" in result.err
    whole, holes = (csv.read_csv(f"{name}.csv").to_pylist()[0] for name in ("whole", "holes"))
    assert holes == whole | {"left_out": 2}
    assert "P1_X_A_2020\t6\t\tnot measured\n" in Path("holes.csv.report.tsv").read_text()
    in_python = protea.load(model_folders["esm2"]).evaluate_proteingym(short)
    (same,) = (one for one in in_python if one.assay.name == "P1_X_A_2020")
    assert (same.count, same.left_out) == (5, 2)
    assert same.measures["spearman"] == pytest.approx(holes["spearman"])


def test_numbering_from_elsewhere_is_advised_and_obeyed(run: Run, short: Path, model_folders: dict[str, Path]) -> None:
    rows = [f"{WILD[i]}{i + 101}A,{i / 10}" for i in range(2, 12) if WILD[i] != "A"]
    (short / "P1_X_A_2020.csv").write_text("\n".join(["mutant,score", *rows]) + "\n")
    command = ("evaluate", "proteingym", short, "-m", model_folders["esm2"], "--assays", " P1_X_A_2020,P1_X_A_2020 ")
    result = run(*command)
    assert result.code == 1
    assert "with offset 101" in result.err
    result = run(*command, "--offset", 101)
    assert result.code == 0, result.err
    assert sum("P1_X_A_2020" in line for line in result.out.splitlines()) == 1


@pytest.mark.long
@pytest.mark.skipif(not SHARED.is_dir(), reason="the scans are not here")
def test_real_scans_are_read_whole() -> None:
    assays = read_assays(SHARED)
    assert len(assays) == 18
    assert sum(read_scan(assay)[0].num_rows for assay in assays) == 51_962
    for assay in assays:
        assert not rows_of(read_scan(assay)[0], {assay.name: assay.sequence}, ESM, Scoring()).problems
    assert len({assay.protein for assay in assays}) == 15
    assert next(one for one in assays if one.name.startswith("AMIE")).published["ESM2 (8M)"] == 0.326


@pytest.mark.skipif(not SHARED.is_dir(), reason="the scans are not here")
@pytest.mark.parametrize("every", [50, pytest.param(1, marks=pytest.mark.long)])
def test_real_variants_mean_the_same_in_hgvs(every: int) -> None:
    """Names of three letters are biotite's; what a variant changes is read by two lines of our own."""
    for assay in read_assays(SHARED):
        names = read_scan(assay)[0]["mutant"].to_pylist()[::every]
        changes = [[(part[0], int(part[1:-1]), part[-1]) for part in name.split(":")] for name in names]
        expected = [
            tuple((at - 1, at, new, ((at - 1, wild),)) for wild, at, new in sorted(parts, key=itemgetter(1)))
            for parts in changes
        ]
        hgvs = [";".join(f"{three(wild)}{place}{three(new)}" for wild, place, new in parts) for parts in changes]
        for texts in (names, [f"p.[{text}]" for text in hgvs]):
            found = rows_of(variant_table(texts), {"p": assay.sequence}, ESM, Scoring())
            assert not found.problems
            assert [variant.edits for variant in found.proteins[0].variants] == expected


def three(letter: str) -> str:
    return str(ProteinSequence.convert_letter_1to3(letter)).title()
