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
from protea.score.files import check_output, write_table
from protea.score.table import Rows, read_table, rows_of, scan_table, variant_table, with_scores

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
    assert named(found) == {"a": ["M1V", "M1V:R10W"]}
    assert found.problems[0].reason == "is the wild type"
    by_likelihood = rows("mutated_sequence\nMKTYIAKQR\n", how=Scoring(method="pseudo-likelihood"))
    assert by_likelihood.proteins[0].variants[0].apply(WILD["a"]) == "MKTYIAKQR"
    both = rows("mutant,mutated_sequence\nM1V,VKTAYIAKQR\nM1V,MKTAYIAKQR\n")
    assert len(both.problems) == 1
    assert "mutated_sequence is not the wild type with that change" in both.problems[0].reason


def test_several_proteins_are_told_apart_by_id() -> None:
    found = rows("id,mutant\nb/2,W1A\na,M1V\nc,M1V\nb/2,A5K\n", TWO)
    assert named(found) == {"a": ["M1V"], "b/2": ["W1A", "A5K"]}
    assert found.places == [[1], [0, 3]]
    assert "'c' is none of the proteins" in found.problems[0].reason
    with pytest.raises(DataError, match="there are 2 proteins, and no column id or protein says which is meant"):
        rows("mutant\nM1V\n", TWO)
    # Of one protein the column may say what it likes.
    assert named(rows("id,mutant\nsomething,M1V\n")) == {"a": ["M1V"]}


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
        ("x.csv", b"mutant,mutant\nM1V,M1V\n", DataError, "two columns have one name"),
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
        with_scores(table, "mutant", {"m": [1.0]})
    with pytest.raises(OutputError, match="there is no folder"):
        check_output(Path("absent/x.csv"), overwrite=True)
    Path("x.csv").write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        check_output(Path("x.csv"), overwrite=False)
    check_output(Path("x.csv"), overwrite=True)
    Path("d.csv").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(Path("d.csv"), overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write_table(Path("absent/x.csv"), table)
