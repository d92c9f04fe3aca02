"""Tables of variants, read and written."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from messages import check_message
from protea.alphabet import ESM
from protea.errors import DataError, OutputError, ProteaWarning, UsageError
from protea.score.effects import Scoring
from protea.score.variant_table import (
    Columns,
    Rows,
    check_columns,
    read_variants,
    rows_of,
    scan_table,
    variant_table,
    with_scores,
)
from protea.tables import Beside, check_output, write_table

WILD = {"a": "MKTAYIAKQR"}
TWO = WILD | {"b/2": "WWKKA"}


def rows(content: str, wild: dict[str, str] = WILD, how: Scoring | None = None) -> Rows:
    path = Path("rows.csv")
    path.write_text(content)
    return rows_of(read_variants(path), wild, ESM, how or Scoring())


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
    reasons = [problem.reason for problem in found.problems]
    for number, part in enumerate(("1 holds M, not K", "M1*", "99", "", "J stands for", "masked-marginals")):
        assert part in reasons[number]
    check_message("variant_table.no_variant", reasons[3])


def test_letters_that_are_no_residues_are_told_by_row() -> None:
    found = rows("mutant,x\nM1V,1\nR10X,2\nR10*,3\nM1B,4\nM1U,5\n")
    assert named(found) == {"a": ["M1V", "M1U"]}
    assert [problem.row for problem in found.problems] == [2, 3, 4]
    assert "old notation, a stop" in found.problems[0].reason


@pytest.mark.parametrize("cell", ["", " ", "NaN", "nan", "NA", "N/A", "<NA>", "None", "null", "NULL", "#N/A"])
def test_cells_without_a_value_name_no_variant(cell: str) -> None:
    found = rows(f"mutant,x\nM1V,1\n{cell},2\n")
    assert [(problem.row, problem.variant.strip()) for problem in found.problems] == [(2, cell.strip())]
    check_message("variant_table.no_variant", found.problems[0].reason)
    if cell not in {"NA", "NULL"}:  # as in a table of insertions and deletions, in which some variants have names
        found = rows(f"mutant,mutated_sequence\nM1V,{cell}\n{cell},VKTAYIAKQR\n{cell},{cell}\n")
        assert named(found) == {"a": ["M1V", "M1V"]}
        assert [problem.row for problem in found.problems] == [3]


def test_a_number_that_is_missing_names_no_variant() -> None:
    parquet.write_table(pa.table({"mutant": pa.array([float("nan"), None], pa.float64())}), "x.parquet")
    found = rows_of(read_variants(Path("x.parquet")), WILD, ESM, Scoring())
    assert [problem.reason.partition(";")[0] for problem in found.problems] == ["the row names no variant"] * 2


def test_a_sequence_that_reads_like_a_missing_value() -> None:
    assert named(rows("mutant,x\nNA,1\n", {"a": "NK"})) == {"a": ["K2A"]}


def test_an_unknown_residue_at_a_wrong_position() -> None:
    """The place is told first, since another protein or offset may be meant."""
    found = rows("mutant,x\nR9X,1\nR10X,2\nR11X,3\n")
    assert [problem.row for problem in found.problems] == [1, 2, 3]
    for problem, part in zip(found.problems, ("position 9 holds Q, not R", "X stands", "outside"), strict=True):
        assert part in problem.reason


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_the_delimiter_is_what_the_file_has(suffix: str, delimiter: str) -> None:
    lines = (["mutant", "score", "note"], ["M1V", "0.5", "a"], ["p.(Met1Val)", '"1,5;2\t"', ""])
    text = "\n".join(delimiter.join(line) for line in lines) + "\n"
    path = Path(f"in{suffix}")
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    assert read_variants(path).to_pydict() == {
        "mutant": ["M1V", "p.(Met1Val)"],
        "score": ["0.5", "1,5;2\t"],
        "note": ["a", ""],
    }


def test_a_delimiter_in_texts_changes_nothing() -> None:
    """The delimiter of the suffix counts if the first lines agree on it; HGVS's names hold semicolons."""
    Path("in.csv").write_text("hgvs_pro\np.[Met1Val;Lys2Arg]\n")
    assert named(rows(Path("in.csv").read_text())) == {"a": ["p.[Met1Val;Lys2Arg]"]}
    for name, header, row in (
        ("in.csv", "mutant,score;x;y", "M1V,1;2;3"),
        ("in.tsv", "mutant\tscore, a, b", "M1V\t1"),
        ("in.csv", 'mutant,"a;b;c"', "M1V,1"),
    ):
        Path(name).write_text(f"{header}\n{row}\n")
        assert read_variants(Path(name)).column_names[0] == "mutant"
    Path("in.csv").write_text("mutant;score, a, b\nM1V;0,5\n")  # a decimal comma
    assert read_variants(Path("in.csv"))["score, a, b"].to_pylist() == ["0,5"]


def test_comments_are_left_out_and_told() -> None:
    above = "# Accession: urn:mavedb:00000001-a-1\r\n#\n\n"
    text = f'{above}mutant,note\nM1V,"two\n# lines"\n# K2R, was repeated, see text\n#NAME?,x\n"#",y\nK2R,z\n'
    Path("in.csv").write_text(text, newline="")
    notes: list[str] = []
    table = read_variants(Path("in.csv"), notes=notes)
    assert table["mutant"].to_pylist() == ["M1V", "#NAME?", "#", "K2R"]
    assert table["note"].to_pylist()[0] == "two\n# lines"
    check_message("tables.comments", notes[0])
    Path("in.csv").write_text(f"{above}mutant\nM1V\n")
    read_variants(Path("in.csv"), notes=notes)
    assert len(notes) == 1
    Path("in.csv").write_text("# nothing else")
    with pytest.raises(DataError, match=r"^in.csv: "):
        read_variants(Path("in.csv"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom"])
def test_marks_of_byte_order(encoding: str) -> None:
    text = "mutant\tna\u00efve\nM1V\t\u0394G\n"
    name = encoding.removesuffix("-bom")
    Path("in.tsv").write_bytes((f"\ufeff{text}" if name != encoding else text).encode(name))
    assert read_variants(Path("in.tsv")).to_pydict() == {"mutant": ["M1V"], "na\u00efve": ["\u0394G"]}


def test_columns_that_are_named() -> None:
    Path("in.csv").write_text("mutant,change,whole\nnonsense,M1V,VKTAYIAKQR\nM1V,K2R,MKTAYIAKQR\n")

    def found(columns: Columns) -> Rows:
        return rows_of(read_variants(Path("in.csv"), columns), WILD, ESM, Scoring(), columns)

    assert [problem.row for problem in found(Columns()).problems] == [1]
    assert named(found(Columns("change"))) == {"a": ["M1V", "K2R"]}
    both = found(Columns("change", "whole"))
    assert named(both) == {"a": ["M1V"]}
    assert both.problems[0].reason.startswith("K2R: the mutated sequence ")
    with pytest.raises(DataError) as caught:
        found(Columns("chnage", "hole"))
    check_message("variant_table.named_columns", caught.value)
    Path("in.csv").write_text("whole\nVKTAYIAKQR\n")
    assert named(found(Columns(mutated_sequence="whole"))) == {"a": ["M1V"]}


def test_mavedbs_layout() -> None:
    table = (
        "# Accession: urn:mavedb:00000001-a-1\naccession,hgvs_nt,hgvs_splice,hgvs_pro,score\n"
        "urn:mavedb:00000001-a-1#1,c.[1A>G;2T>A],NA,p.Met1Val,0.5\nurn:mavedb:00000001-a-1#2,NA,NA,p.Lys2_Thr3del,1\n"
        "urn:mavedb:00000001-a-1#3,NA,NA,p.Lys2Ter,0\nurn:mavedb:00000001-a-1#4,NA,NA,_wt,1\n"
        "urn:mavedb:00000001-a-1#5,NA,NA,p.[Met1Val;Lys2=],0.1\nurn:mavedb:00000001-a-1#6,NA,NA,NA,0.1\n"
    )
    found = rows(table, how=Scoring(method="pseudo-likelihood"))
    assert named(found) == {"a": ["p.Met1Val", "p.Lys2_Thr3del", "_wt", "p.[Met1Val;Lys2=]"]}
    assert [problem.row for problem in found.problems] == [3, 6]


def test_variants_of_another_length_are_told() -> None:
    table = "mutant\nM1V\nK2del\nK2_T3delinsW\nK2_T3delinsWW\n"
    advice = rows(table, how=Scoring(method="pseudo-likelihood")).advice
    check_message("variant_table.means", advice[0])
    check_message("variant_table.sums", rows(table, how=Scoring(method="pseudo-likelihood-sum")).advice[0])
    assert not rows("mutant\nM1V\nK2_T3delinsWW\n", how=Scoring(method="pseudo-likelihood")).advice


def test_an_offset_that_explains_the_table_is_advised() -> None:
    found = rows("mutant\nM94V\nK95R\nR103K\n")
    assert len(found.problems) == 3
    check_message("variant_table.offset", found.advice[0])
    assert "offset 94" in found.advice[0]
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
    check_message("variant_table.lower_case", lower.problems[0].reason)
    by_likelihood = rows("mutated_sequence\nMKTYIAKQR\n", how=Scoring(method="pseudo-likelihood"))
    assert by_likelihood.proteins[0].variants[0].apply(WILD["a"]) == "MKTYIAKQR"
    both = rows("mutant,mutated_sequence\nM1V,VKTAYIAKQR\nM1V,MKTAYIAKQR\n")
    assert len(both.problems) == 1
    assert both.problems[0].reason.startswith("M1V: the mutated sequence ")


def test_labels_and_alignments_are_no_variants() -> None:
    how = Scoring(method="pseudo-likelihood")
    found = rows("mutant\nWT\nNA\nDEL\nMKT-YIAKQR\nMKTYIAKQR\n", how=how)
    assert [problem.row for problem in found.problems] == [1, 2, 3, 4]
    check_message("variant_table.label", found.problems[0].reason)
    found = rows("mutated_sequence\nMKT-YIAKQR\n", how=how)
    assert "'-' at 4" in found.problems[0].reason
    # A gap is fine if the wild type is from the same alignment.
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
    assert read_variants(Path("x.parquet")).equals(doubled)


def test_several_proteins_are_told_apart_by_id() -> None:
    found = rows("id,mutant\nb/2,W1A\na,M1V\nc,M1V\nb/2,A5K\n", TWO)
    assert named(found) == {"a": ["M1V"], "b/2": ["W1A", "A5K"]}
    assert found.places == [[1], [0, 3]]
    assert found.problems[0].reason.startswith("'c' ")
    with pytest.raises(DataError) as caught:
        rows("mutant\nM1V\n", TWO)
    check_message("variant_table.which_protein", caught.value)
    by_protein = rows("id,protein,mutant\n1,a,M1V\n2,b/2,W1A\n", TWO)
    assert named(by_protein) == {"a": ["M1V"], "b/2": ["W1A"]}
    # For a single protein too: another name is another protein.
    told = rows("id,mutant\nother,M1V\nother,K2R\n")
    assert not told.proteins
    assert [problem.row for problem in told.problems] == [1, 2]
    check_message("variant_table.another_protein", told.problems[0].reason)
    assert named(rows("id,mutant\n,M1V\n,K2R\n")) == {"a": ["M1V", "K2R"]}  # names nothing
    told = rows("id,mutant\nsomething,M1V\na,K2R\n")
    assert named(told) == {"a": ["K2R"]}
    assert told.problems[0].reason.startswith("'something' ")


def test_columns_that_are_not_understood_may_share_a_name() -> None:
    """ProteinGym's tables of predictions do."""
    Path("in.csv").write_text("mutant,esm,esm\nM1V,1,2\n")
    table = with_scores(read_variants(Path("in.csv")), "model_score", {"m": [0.5]})
    assert not rows_of(table, WILD, ESM, Scoring()).problems
    write_table(Path("out.csv"), table)
    assert Path("out.csv").read_text() == "mutant,esm,esm,model_score\nM1V,1,2,0.5\n"


def test_empty_lines() -> None:
    assert [problem.row for problem in rows("mutant\nM1V\n\nK2R\n\n").problems] == [2]
    Path("cr.csv").write_bytes(b"mutant,x\rM1V,1\rK2R,2\r")
    assert read_variants(Path("cr.csv")).num_rows == 2
    Path("long.csv").write_text(f"mutant,{'x' * 200_000}\nM1V,1\n")
    assert read_variants(Path("long.csv")).num_rows == 1
    assert not rows("mutant,x\nM1V,1\n\nK2R,2\n\n").problems


def test_text_that_is_not_utf8() -> None:
    Path("in.csv").write_bytes(b"mutant,caf\xe9\nM1V,1\n")
    with pytest.raises(DataError, match=r"^in.csv: .*utf-8"):
        read_variants(Path("in.csv"))
    with pytest.raises(UsageError, match="--variants"):
        variant_table(["M1A\udcff"])
    with pytest.raises(UsageError, match="--column"):
        check_columns(variant_table(["M1V"]), "a\udcff", ["m"])
    odd = Path("o\udcff.csv")
    write_table(odd, variant_table(["M1V"]))
    assert read_variants(odd).num_rows == 1


def test_a_name_in_capitals_is_compressed_too() -> None:
    write_table(Path("OUT.CSV.GZ"), variant_table(["M1V"]))
    assert gzip.decompress(Path("OUT.CSV.GZ").read_bytes()) == b"mutant\nM1V\n"
    assert read_variants(Path("OUT.CSV.GZ")).num_rows == 1


def test_a_scan_skips_gaps() -> None:
    assert scan_table({"a": "M-.K"}, 1).num_rows == 2 * 19
    assert scan_table({"a": "--"}, 1).num_rows == 0


def test_an_interrupt_while_a_table_is_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Path(".out.csv").write_text("a file of the user's own")
    monkeypatch.setattr("protea.tables.csv.writer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_table(Path("out.csv"), variant_table(["M1V"]), Beside("a", [], {}))
    assert [path.name for path in Path().iterdir()] == [".out.csv"]


def test_what_was_read_is_written() -> None:
    text = 'mutant,DMS_score,note\nM1V,0.10,"a, b"\nK2R,1e-3,\n'
    Path("in.csv").write_text(text)
    table = with_scores(read_variants(Path("in.csv")), "model_score", {"m": [-1.5, None]})
    write_table(Path("out.csv"), table)
    assert Path("out.csv").read_text() == 'mutant,DMS_score,note,model_score\nM1V,0.10,"a, b",-1.5\nK2R,1e-3,,\n'
    write_table(Path("out.tsv"), table)
    assert Path("out.tsv").read_text().splitlines()[1] == "M1V\t0.10\ta, b\t-1.5"
    write_table(Path("out.csv.gz"), table)
    assert gzip.decompress(Path("out.csv.gz").read_bytes()) == Path("out.csv").read_bytes()
    assert read_variants(Path("out.csv.gz")).num_rows == 2
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
    assert read_variants(Path("in.parquet"))["DMS_score"].to_pylist() == [0.25]


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
        ("x.csv", b"", DataError, "^x.csv: "),
        ("x.csv", b"mutant\n", DataError, "^x.csv: "),
        ("x.csv", b"a,b\n1,2\n", DataError, "^x.csv: .*mutant, .* a, b; .*--mutant-column"),
        ("x.csv", b"mutant,mutant\nM1V,M1V\n", DataError, "^x.csv: two columns may be mutant"),
        ("x.csv", b"mutant,b\nM1V\n", DataError, "^x.csv, line 2: "),
        ("x.csv.gz", b"mutant\nM1V\n", DataError, "^x.csv.gz: "),
        ("x.parquet", b"PAR1 no more", DataError, "^x.parquet: "),
        ("x.xlsx", b"", UsageError, "^x.xlsx: .* .csv"),
        ("x", b"", UsageError, "^x: .* .csv"),
        ("x.gz", b"", UsageError, "^x.gz: .* .csv"),
    ],
)
def test_tables_that_cannot_be_read(name: str, content: bytes, error: type[Exception], message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_variants(Path(name))


def test_wording_of_tables() -> None:
    Path("x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError) as caught:
        read_variants(Path("x.csv"))
    check_message("variant_table.columns", caught.value)
    with pytest.raises(UsageError) as usage:
        check_output(Path("x.xlsx"), {}, dict, overwrite=True)
    check_message("tables.kind", usage.value)


def test_columns_of_scores_have_new_names() -> None:
    table = variant_table(["M1V"])
    with pytest.raises(UsageError, match=r"'mutant'.*--column NAME"):
        check_columns(table, "mutant", ["m"])
    with pytest.raises(UsageError, match="--column ' '"):
        check_columns(table, " ", ["m"])
    both = table.append_column("s other", pa.array([1.0]))
    check_columns(both, "s", ["other"])
    with pytest.raises(UsageError, match="'s other'"):
        check_columns(both, "s", ["m", "other"])


@pytest.mark.parametrize("name", ["x.csv", "x.csv.run.yaml", "x.csv.report.tsv"])
def test_outputs_that_exist(name: str) -> None:
    """A table is never replaced unasked; what is left of a table that is gone is replaced, with a warning."""
    Path(name).write_text("precious")
    if name == "x.csv":
        with pytest.raises(OutputError, match=f"^{name}: .*--overwrite"):
            check_output(Path("x.csv"), {}, dict, overwrite=False)
        check_output(Path("x.csv"), {}, dict, overwrite=True)
    else:
        for overwrite in (False, True):
            with pytest.warns(ProteaWarning, match=f"^{name} is of an output that is gone"):
                check_output(Path("x.csv"), {}, dict, overwrite=overwrite)
    Path(name).unlink()
    Path(name).mkdir()
    with pytest.raises(OutputError, match=f"^{name}: is a folder"):
        check_output(Path("x.csv"), {}, dict, overwrite=True)


def test_outputs_without_a_folder_or_rights() -> None:
    with pytest.raises(DataError, match=r"^absent.csv: "):
        read_variants(Path("absent.csv"))
    with pytest.raises(OutputError, match="absent;"):
        check_output(Path("absent/x.csv"), {}, dict, overwrite=True)
    Path("file").write_text("")
    with pytest.raises(OutputError, match=r"^file/x.csv: "):
        write_table(Path("file/x.csv"), variant_table(["M1V"]))
