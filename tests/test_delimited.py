"""Text tables as people have them: delimiters, headers, comments, encodings, and files that are something else."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages import check_message
from protea.delimited import find_column, folded, text_rows
from protea.errors import DataError, FastaError, ProteaWarning, UsageError
from protea.records import InputColumns, read_groups, read_records
from protea.score.variant_table import Columns, read_variants
from protea.tables import read_table
from test_fasta import DISGUISES

KNOWN = frozenset(("mutant", "mutated_sequence", "id", "sequence"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(content: str | bytes, usual: str = ",", notes: list[str] | None = None) -> list[list[str]]:
    path = Path("in.csv")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(text_rows(path, usual, KNOWN, notes))


cells = st.text(st.sampled_from("aA1#;,\t|\"' \né"), max_size=6)
names = st.text(st.sampled_from("abcXYZ_ "), min_size=1, max_size=6).filter(lambda name: name.strip() != "")
texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=20)


@st.composite
def tables(draw: st.DrawFn) -> list[list[str]]:
    """A header of several columns, one of them known in some spelling, and rows of any text."""
    known = draw(st.sampled_from(["mutant", " Mutant", "MUTATED sequence", "id", "Sequence "]))
    header = [known, *draw(st.lists(names, min_size=1, max_size=3))]
    header = list(draw(st.permutations(header)))
    row = st.lists(cells, min_size=len(header), max_size=len(header))
    rows = draw(st.lists(row, min_size=0, max_size=4))
    return [header, *([f"r{cells[0]}", *cells[1:]] for cells in rows)]


def written(rows: list[list[str]], sign: str, end: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=sign, lineterminator=end).writerows(rows)
    return text.getvalue()


@given(tables(), st.sampled_from(",\t;"), st.sampled_from(",\t;"), st.sampled_from(["\n", "\r\n"]))
def test_any_table_is_read_with_its_delimiter(rows: list[list[str]], sign: str, usual: str, end: str) -> None:
    assert read(written(rows, sign, end), usual) == rows


@given(tables(), st.lists(texts, max_size=3), st.sampled_from(["#", "# ", "## "]), st.sampled_from(",\t;"))
def test_a_header_may_be_written_as_a_comment(rows: list[list[str]], above: list[str], mark: str, sign: str) -> None:
    """Below comments of any text. Without rows or with them, if their cells are as many as the header's."""
    rows = [[rows[0][0].strip(), *rows[0][1:]], *rows[1:]]
    text = "".join(f"#{comment}\n" for comment in above) + mark + written(rows, sign, "\n")
    assert read(text) == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mutant;score\nA24V;1,5\n", [["mutant", "score"], ["A24V", "1,5"]]),  # decimal commas
        ("mutant;score;x, y\nA24V;1,5;2,5\n", [["mutant", "score", "x, y"], ["A24V", "1,5", "2,5"]]),
        ("a, b;mutant\n1,5;A24V\n", [["a, b", "mutant"], ["1,5", "A24V"]]),
        ("sep=;\nmutant;score\nA24V;1,5\n", [["mutant", "score"], ["A24V", "1,5"]]),
        ('"sep=|"\r\nmutant|a,b;c\r\nA24V|1\r\n', [["mutant", "a,b;c"], ["A24V", "1"]]),
        ("SEP=\t\nmutant\tscore\nA24V\t1\n", [["mutant", "score"], ["A24V", "1"]]),
        ("# made by hand\n#mutant,score\nA24V,1\n", [["mutant", "score"], ["A24V", "1"]]),
        ("#mutant\nA24V\n", [["mutant"], ["A24V"]]),
        ("#mutant,score\n", [["mutant", "score"]]),
        ("#,mutant\n1,A24V\n", [["#", "mutant"], ["1", "A24V"]]),
        ("# id\nmutant,id\nA24V,a\n", [["mutant", "id"], ["A24V", "a"]]),
        ("#mutant\np.[Met1Val;Lys2Arg]\n", [["mutant"], ["p.[Met1Val;Lys2Arg]"]]),
        ("# id\nchange,x\nA24V,a\n", [["change", "x"], ["A24V", "a"]]),
        ("mutant\nA24V\n\nK2R\n\n", [["mutant"], ["A24V"], [""], ["K2R"]]),
        ("mutant\n#NAME?\n#E3D\n", [["mutant"], ["#NAME?"], ["#E3D"]]),  # rows, which are reported by the caller
        ("mutant,score\n#E3D,2\n", [["mutant", "score"], ["#E3D", "2"]]),
    ],
)
def test_headers_and_delimiters(text: str, expected: list[list[str]]) -> None:
    notes: list[str] = []
    assert read(text, notes=notes) == expected
    assert not notes


@pytest.mark.parametrize(
    ("text", "comments"),
    [
        ("mutant\n# a, b\nA24V\n#\n", 2),
        ("mutant,x,y\n#E3D,2\nA24V,1,2\n", 1),
        ("mutant,x\n# repeated, see text\nA24V,1\n", 1),
    ],
)
def test_comments_between_rows_are_counted(text: str, comments: int) -> None:
    notes: list[str] = []
    assert len(read(text, notes=notes)) == 2
    assert f"left out {comments} comment" in notes[0]


def test_a_quotation_mark_in_a_comment_takes_no_rows_with_it() -> None:
    with pytest.raises(FastaError, match="line 4: 3 cells, but the header has 2"):
        read('mutant,x\n# a,"b\nA24V,1\n",c\n')


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_reader_takes_the_same_files(encoding: str, pack: type[bytes]) -> None:
    text = "# from elsewhere\r\nID;Sequence;Mutant\r\né;MKT;M1V\r\n# a comment\r\nb;MKV;M1V\r\n"
    path = Path(f"{encoding}.{pack.__name__}.csv")
    path.write_bytes(pack(text.encode(encoding)))
    with pytest.warns(ProteaWarning, match="left out 1 comment"):
        records = list(read_records([path]))
    assert [(record.id, record.sequence) for record in records] == [("é", "MKT"), ("b", "MKV")]
    assert read_variants(path)["ID"].to_pylist() == ["é", "b"]


@pytest.mark.parametrize("name", [name for name in DISGUISES if name not in ("utf-16", "utf-16-be")])
@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "parquet"])
def test_tables_that_are_something_else(name: str, suffix: str) -> None:
    path = Path(f"in.{suffix}")
    path.write_bytes(DISGUISES[name])
    with pytest.raises(DataError) as caught:
        read_table(path)
    check_message(f"fasta.disguise.{name}", caught.value, path=path)


def test_archives() -> None:
    with zipfile.ZipFile("in.csv", "w") as archive:
        archive.writestr("in.csv", "mutant\nM1V\n")
    with pytest.raises(DataError, match=r"in\.csv: is a ZIP archive"):
        read_table(Path("in.csv"))
    Path("in.tsv").write_bytes(gzip.compress(b"mutant\tx\nM1V\t1\n"))  # of another name
    assert read_table(Path("in.tsv"))["x"].to_pylist() == ["1"]
    Path("in.csv.gz").write_bytes(b"mutant,x\nM1V,1\n")
    with pytest.raises(DataError, match=r"in\.csv\.gz: .*not compressed as its name says"):
        read_table(Path("in.csv.gz"))


def test_long_cells() -> None:
    assert read(f"id,sequence\na,{'M' * 200_000}\n")[1][1] == "M" * 200_000


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b"# a comment\n", "empty"),
        (b"mutant,x\nM1V,1\nM1V\n", "line 3: 1 cell, but the header has 2"),
        (b"# a\n\nmutant,x\nM1V,1\nM1V\n", "line 5: 1 cell"),
        (b'# a\nmutant,x\nM1V,"1', "line 3: not a table"),
        (b"mutant,caf\xe9\n", "utf-8.*save it as UTF-8"),
        ("mutant\n".encode("utf-16") + b"x", "utf-16"),
    ],
)
def test_tables_that_are_wrong(content: bytes, named: str) -> None:
    with pytest.raises(FastaError, match=rf"in\.csv.*{named}"):
        read(content)


def test_bytes_that_are_no_text_can_be_kept() -> None:
    Path("in.csv").write_bytes(b"caf\xe9\n")
    assert list(text_rows("in.csv", ",", any_bytes=True)) == [["caf\udce9"]]


def test_columns_are_found_without_case_and_blanks() -> None:
    assert folded(" Mutated  Sequence ") == "mutated_sequence"
    assert find_column(["a", " MUTANT"], ["mutant"], "x") == " MUTANT"
    assert find_column(["Mutant", "mutant"], ["mutant"], "x") == "mutant"  # the exact name
    assert find_column(["Mutant", "variant"], ["mutant", "variant"], "x") == "variant"
    assert find_column(["a"], ["mutant"], "x") is None
    with pytest.raises(DataError) as caught:
        find_column(["Mutant", "MUTANT"], ["mutant"], "in.csv")
    check_message("delimited.two_columns", caught.value)
    Path("in.csv").write_text(" Mutant ,Change\nM1V,K2R\n")
    assert read_variants(Path("in.csv")).column_names == [" Mutant ", "Change"]  # as they are
    table = read_variants(Path("in.csv"), Columns("change"))
    assert Columns("change").of(table) == ["Change", None]
    Path("in.csv").write_text("Id,Sequence,SEQUENCE\na,MKT,MKV\n")
    for wanted, found in (("SEQUENCE", "MKV"), ("Sequence", "MKT")):
        assert [record.sequence for record in read_records(["in.csv"], InputColumns(sequence=wanted))] == [found]
    with pytest.raises(FastaError, match=r"two columns have this name.*Sequence, SEQUENCE"):
        list(read_records(["in.csv"], InputColumns(sequence="sequence")))


def test_named_columns_need_a_table() -> None:
    Path("in.fasta").write_text(">a\nMKT\n")
    for reader in (read_records, read_groups):
        with pytest.raises(UsageError) as caught:
            list(reader(["in.fasta"], InputColumns(id="name")))
        check_message("records.no_table", caught.value)
    Path("in.csv").write_text("name,sequence\nb,MKV\n")
    records = read_records(["in.fasta", "in.csv"], InputColumns(id="name"))
    assert [record.id for record in records] == ["a", "b"]


@pytest.mark.parametrize("mark", ["", "\ufeff", "\n"])
def test_fasta_in_a_file_named_as_a_table(mark: str) -> None:
    Path("in.csv").write_text(f"{mark}>a\nMKT\n>b\nMKV\n")
    for read in (lambda: list(read_records(["in.csv"])), lambda: read_table(Path("in.csv"))):
        with pytest.raises((FastaError, DataError)) as caught:
            read()
    check_message("records.fasta_as_table", caught.value)
