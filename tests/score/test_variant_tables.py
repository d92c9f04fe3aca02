"""Tables of variants in and out."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from protea.alphabet import ESM
from protea.errors import DataError, OutputError, UsageError
from protea.score.effects import Scoring
from protea.score.variant_table import Rows, check_columns, read_table, rows_of, scan_table, variant_table, with_scores
from protea.tables import Beside, check_output, write_table

WILD = {"a": "MKTAYIAKQR"}
TWO = WILD | {"b/2": "WWKKA"}


def rows(content: str, wild: dict[str, str] = WILD, how: Scoring | None = None) -> Rows:
    path = Path("rows.csv")
    path.write_text(content)
    return rows_of(read_table(path), wild, ESM, how or Scoring())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def named(found: Rows) -> dict[str, list[str]]:
    return {protein.name: [variant.name for variant in protein.variants] for protein in found.proteins}


@pytest.mark.parametrize("header", ["mutant", "mutants", "mutation", "mutations", "variant"])
def test_columns_of_variants(header: str) -> None:
    found = rows(f"{header},DMS_score\nM1V,0.5\nK2R:T3S,-1e-3\n")
    assert named(found) == {"a": ["M1V", "K2R:T3S"]}
    assert found.places == [[0, 1]]
    assert not found.problems


def test_good_rows_are_scored_and_the_others_told() -> None:
    found = rows("mutant,x\nM1V,1\nK1V,2\nM1*,3\nM99V,4\n,5\nM1J,6\nK2del,7\nR10K,8\n")
    assert named(found) == {"a": ["M1V", "R10K"]}
    assert found.places == [[0, 7]]
    assert [(problem.row, problem.variant) for problem in found.problems] == [
        (2, "K1V"),
        (3, "M1*"),
        (4, "M99V"),
        (5, ""),
        (6, "M1J"),
        (7, "K2del"),
    ]
    reasons = " | ".join(problem.reason for problem in found.problems)
    for part in (
        "position 1 holds M, not K",
        "a stop codon",
        "position 99 is outside",
        "names no variant",
        "'J' is not",
    ):
        assert part in reasons
    assert "masked-marginals knows substitutions alone" in reasons


def test_an_offset_that_explains_the_table_is_advised() -> None:
    found = rows("mutant\nM94V\nK95R\nR103K\n")
    assert len(found.problems) == 3
    assert found.advice == ["a: all 3 variants would fit if residues were counted from 94: --offset 94"]
    assert not rows("mutant\nM94V\nK95R\nR103K\n", how=Scoring(offset=94)).problems


def test_whole_sequences_are_compared_with_the_wild_type() -> None:
    found = rows("mutated_sequence\nVKTAYIAKQR\nVKTAYIAKQW\nMKTAYIAKQR\nMKTYIAKQR\n")
    assert named(found) == {"a": ["M1V", "M1V:R10W", "wild type"]}
    assert found.problems[0].row == 4  # a deletion
    # As ProteinGym writes insertions and deletions.
    how = Scoring(method="pseudo-likelihood")
    for text in ("mutant\nMKTYIAKQR\n", "mutant,mutated_sequence\nMKTYIAKQR,MKTYIAKQR\n"):
        (variant,) = rows(text, how=how).proteins[0].variants
        assert variant.apply(WILD["a"]) == "MKTYIAKQR"
    lower = rows("mutated_sequence\nmktyiakqr\n", how=how)
    assert lower.problems[0].reason == "a mutated sequence in lower case; write it in upper case"
    by_likelihood = rows("mutated_sequence\nMKTYIAKQR\n", how=Scoring(method="pseudo-likelihood"))
    assert by_likelihood.proteins[0].variants[0].apply(WILD["a"]) == "MKTYIAKQR"
    both = rows("mutant,mutated_sequence\nM1V,VKTAYIAKQR\nM1V,MKTAYIAKQR\n")
    assert len(both.problems) == 1
    assert "mutated_sequence is not the wild type with that change" in both.problems[0].reason


def test_labels_and_alignments_are_no_variants() -> None:
    how = Scoring(method="pseudo-likelihood")
    found = rows("mutant\nWT\nNA\nDEL\nMKT-YIAKQR\nMKTYIAKQR\n", how=how)
    assert [problem.row for problem in found.problems] == [1, 2, 3, 4]
    assert found.problems[0].reason.startswith("WT: no variant, and as a whole sequence too short: 2 residues of 10")
    found = rows("mutated_sequence\nMKT-YIAKQR\n", how=how)
    assert found.problems[0].reason == "a mutated sequence with a gap, '-' at 4; leave gaps out"
    # Unless the wild type is of the same alignment.
    assert not rows("mutated_sequence\nVKT-YIAKQR\n", {"a": "MKT-YIAKQR"}).problems


def test_times_beyond_pythons_are_written() -> None:
    columns = {
        "date": pa.array([10**7], pa.date32()),
        "nanoseconds": pa.array([1], pa.timestamp("ns", "Mars/Olympus")),
        "time": pa.array([123456789], pa.time64("ns")),
        "duration": pa.array([5], pa.duration("ns")),
    }
    write_table(Path("x.csv"), pa.table(columns))
    assert Path("x.csv").read_text().splitlines()[1] == (
        "29349-01-26,1970-01-01 00:00:00.000000001Z,00:00:00.123456789,5 ns"
    )


def test_a_table_that_was_written_is_read_again() -> None:
    doubled = pa.table([["M1V"], [1], [2]], names=["mutant", "x", "x"])
    write_table(Path("x.parquet"), doubled)
    assert read_table(Path("x.parquet")).equals(doubled)


def test_several_proteins_are_told_apart_by_id() -> None:
    found = rows("id,mutant\nb/2,W1A\na,M1V\nc,M1V\nb/2,A5K\n", TWO)
    assert named(found) == {"a": ["M1V"], "b/2": ["W1A", "A5K"]}
    assert found.places == [[1], [0, 3]]
    assert "'c' is none of the proteins" in found.problems[0].reason
    with pytest.raises(
        DataError,
        match="there are 2 proteins, and nothing says which is meant; give a table with a column id or protein",
    ):
        rows("mutant\nM1V\n", TWO)
    by_protein = rows("id,protein,mutant\n1,a,M1V\n2,b/2,W1A\n", TWO)
    assert named(by_protein) == {"a": ["M1V"], "b/2": ["W1A"]}
    # Of one protein the column may say what it likes, unless it names that protein.
    assert named(rows("id,mutant\nsomething,M1V\n")) == {"a": ["M1V"]}
    told = rows("id,mutant\nsomething,M1V\na,K2R\n")
    assert named(told) == {"a": ["K2R"]}
    assert "'something' is none of the proteins" in told.problems[0].reason


def test_columns_that_are_not_understood_may_share_a_name() -> None:
    """ProteinGym's tables of predictions do."""
    Path("in.csv").write_text("mutant,esm,esm\nM1V,1,2\n")
    table = with_scores(read_table(Path("in.csv")), "model_score", {"m": [0.5]})
    assert not rows_of(table, WILD, ESM, Scoring()).problems
    write_table(Path("out.csv"), table)
    assert Path("out.csv").read_text() == "mutant,esm,esm,model_score\nM1V,1,2,0.5\n"


def test_empty_lines() -> None:
    assert [problem.row for problem in rows("mutant\nM1V\n\nK2R\n\n").problems] == [2]
    Path("cr.csv").write_bytes(b"mutant,x\rM1V,1\rK2R,2\r")
    assert read_table(Path("cr.csv")).num_rows == 2
    Path("long.csv").write_text(f"mutant,{'x' * 200_000}\nM1V,1\n")
    assert read_table(Path("long.csv")).num_rows == 1
    assert not rows("mutant,x\nM1V,1\n\nK2R,2\n\n").problems


def test_text_that_is_no_utf8() -> None:
    Path("in.csv").write_bytes(b"mutant,caf\xe9\nM1V,1\n")
    with pytest.raises(DataError, match=r"in.csv: cannot be read: .*utf-8"):
        read_table(Path("in.csv"))
    for table in (
        lambda: variant_table(["M1A\udcff"]),
        lambda: check_columns(variant_table(["M1V"]), "a\udcff", ["m"]),
    ):
        with pytest.raises(UsageError, match="holds bytes that are no UTF-8"):
            table()
    odd = Path("o\udcff.csv")
    write_table(odd, variant_table(["M1V"]))
    assert read_table(odd).num_rows == 1


def test_a_name_in_capitals_is_compressed_too() -> None:
    write_table(Path("OUT.CSV.GZ"), variant_table(["M1V"]))
    assert gzip.decompress(Path("OUT.CSV.GZ").read_bytes()) == b"mutant\nM1V\n"
    assert read_table(Path("OUT.CSV.GZ")).num_rows == 1


def test_gaps_are_passed_over_in_a_scan() -> None:
    assert scan_table({"a": "M-.K"}, 1).num_rows == 2 * 19
    assert scan_table({"a": "--"}, 1).num_rows == 0


def test_an_interrupt_while_a_table_is_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Path(".out.csv").write_text("a file of the user's own")
    monkeypatch.setattr("protea.score.files.csv.writer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_table(Path("out.csv"), variant_table(["M1V"]), Beside("a", [], {}))
    assert [path.name for path in Path().iterdir()] == [".out.csv"]


def test_what_was_read_is_written() -> None:
    text = 'mutant,DMS_score,note\nM1V,0.10,"a, b"\nK2R,1e-3,\n'
    Path("in.csv").write_text(text)
    table = with_scores(read_table(Path("in.csv")), "model_score", {"m": [-1.5, None]})
    write_table(Path("out.csv"), table)
    assert Path("out.csv").read_text() == 'mutant,DMS_score,note,model_score\nM1V,0.10,"a, b",-1.5\nK2R,1e-3,,\n'
    write_table(Path("out.tsv"), table)
    assert Path("out.tsv").read_text().splitlines()[1] == "M1V\t0.10\ta, b\t-1.5"
    write_table(Path("out.csv.gz"), table)
    assert gzip.decompress(Path("out.csv.gz").read_bytes()) == Path("out.csv").read_bytes()
    assert read_table(Path("out.csv.gz")).num_rows == 2
    write_table(Path("out.parquet"), table)
    assert parquet.read_table("out.parquet")["model_score"].to_pylist() == [-1.5, None]
    assert sorted(path.name for path in Path().iterdir()) == [
        "in.csv",
        "out.csv",
        "out.csv.gz",
        "out.parquet",
        "out.tsv",
    ]


def test_an_ensemble_is_a_mean_and_its_members() -> None:
    table = with_scores(variant_table(["M1V", "K2R"]), "s", {"one": [1.0, None], "two": [2.0, None]})
    assert table.to_pydict() == {"mutant": ["M1V", "K2R"], "s": [1.5, None], "s one": [1.0, None], "s two": [2.0, None]}


def test_numbers_of_parquet_stay_numbers() -> None:
    parquet.write_table(pa.table({"mutant": ["M1V"], "DMS_score": [0.25]}), "in.parquet")
    assert read_table(Path("in.parquet"))["DMS_score"].to_pylist() == [0.25]


def test_a_scan_is_every_other_letter_at_every_place() -> None:
    table = scan_table(TWO, 5)
    assert table.num_rows == 15 * 19
    assert table.to_pylist()[0] == {"id": "a", "position": 5, "wild_type": "M", "letter": "A", "mutant": "M5A"}
    found = rows_of(table, TWO, ESM, Scoring(offset=5))
    assert not found.problems
    assert [len(places) for places in found.places] == [190, 95]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.csv", b"", DataError, "x.csv: cannot be read"),
        ("x.csv", b"mutant\n", DataError, "has no rows"),
        ("x.csv", b"a,b\n1,2\n", DataError, "no column is named mutant, .*; it has a, b"),
        ("x.csv", b"mutant,mutant\nM1V,M1V\n", DataError, "x.csv: two columns are named mutant; rename one"),
        ("x.csv", b"mutant,b\nM1V\n", DataError, "cannot be read"),
        ("x.csv.gz", b"mutant\nM1V\n", DataError, "cannot be read"),
        ("x.parquet", b"PAR1 no more", DataError, "cannot be read"),
        ("x.xlsx", b"", UsageError, "no kind of table; name a .csv"),
        ("x", b"", UsageError, "no kind of table"),
    ],
)
def test_tables_that_cannot_be_read(name: str, content: bytes, error: type[Exception], message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_table(Path(name))


def test_outputs_that_cannot_be_written() -> None:
    with pytest.raises(DataError, match=r"absent.csv: cannot be read"):
        read_table(Path("absent.csv"))
    table = variant_table(["M1V"])
    with pytest.raises(UsageError, match="has a column 'mutant'; choose another name for the scores: --column NAME"):
        check_columns(table, "mutant", ["m"])
    with pytest.raises(UsageError, match="--column ' ': is no name"):
        check_columns(table, " ", ["m"])
    both = table.append_column("s other", pa.array([1.0]))
    check_columns(both, "s", ["other"])
    with pytest.raises(UsageError, match="has a column 's other'"):
        check_columns(both, "s", ["m", "other"])
    with pytest.raises(OutputError, match="there is no folder"):
        check_output(Path("absent/x.csv"), overwrite=True)
    Path("x.csv").write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        check_output(Path("x.csv"), overwrite=False)
    check_output(Path("x.csv"), overwrite=True)
    Path("z.csv.run.yaml").mkdir()
    with pytest.raises(OutputError, match=r"z.csv.run.yaml: is a folder"):
        check_output(Path("z.csv"), overwrite=True)
    Path("y.csv.report.tsv").write_text("precious")
    with pytest.raises(OutputError, match=r"y.csv.report.tsv: exists already"):
        check_output(Path("y.csv"), overwrite=False)
    Path("d.csv").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(Path("d.csv"), overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write_table(Path("absent/x.csv"), table)
