"""Tables of sequences give the records of a FASTA file, with the same outcomes."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from conftest import CONFIGS
from messages import check_message
from protea.embed.prepare import RecordPolicies, SeenIds, prepare
from protea.errors import DamagedFileError, FastaError, ProteaError
from protea.fasta import Record
from protea.models.registry import build
from protea.records import InputColumns, is_table, read_groups, read_records
from test_fasta import COMPRESSORS

MODEL = build(CONFIGS["esm2"])
SUFFIXES = [".csv", ".tsv", ".parquet", *(f".csv.{name}" for name in COMPRESSORS)]


def written(path: Path, rows: list[tuple[str | None, str | None]], names: tuple[str, str] = ("id", "sequence")) -> Path:
    """Write a table by another program than the reader's: pyarrow, or Python's csv."""
    if path.suffix == ".parquet":
        columns = zip(*rows, strict=True) if rows else ((), ())
        parquet.write_table(pa.table(dict(zip(names, (pa.array(c, pa.string()) for c in columns), strict=True))), path)
        return path
    plain = path.with_name("plain")
    with plain.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerows([names, *rows])
    compress = COMPRESSORS.get(path.suffix[1:])
    path.write_bytes(plain.read_bytes() if compress is None else compress(plain.read_bytes()))
    return path


def cells(records: list[Record]) -> list[tuple[str, str]]:
    return [(record.id, record.sequence) for record in records]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_table(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"in{suffix}", [("a", "MKT"), ("b é", "AYI")])
    assert is_table(path)
    records = list(read_records([path]))
    assert cells(records) == [("a", "MKT"), ("b é", "AYI")]
    assert records[1].place == f"{path}, row 2, record 'b é'"


def test_tables_and_fasta_files_in_order(tmp_path: Path) -> None:
    table = written(tmp_path / "in.csv", [("a", "MKT")])
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">b\nAYI\n")
    paths = [table, fasta, table]
    assert [record.id for record in read_records(paths)] == ["a", "b", "a"]
    groups = [group if isinstance(group, list) else list(group.records()) for group in read_groups(paths)]
    assert cells([record for group in groups for record in group]) == cells(list(read_records(paths)))


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        ("Entry,Entry Name,Protein names,Sequence", InputColumns(), ("0", "3")),  # UniProt's export
        ("seq_id,protein_sequence,pH", InputColumns(), ("0", "1")),
        ("name,AA Seq", InputColumns(), ("0", "1")),
        ("id,name,sequence", InputColumns(id="name"), ("1", "2")),
        ("id,light,heavy", InputColumns(sequence="heavy"), ("0", "2")),
    ],
)
def test_columns(tmp_path: Path, header: str, columns: InputColumns, expected: tuple[str, str]) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f"{header}\n{','.join(map(str, range(header.count(',') + 1)))}\n")
    assert cells(list(read_records([path], columns))) == [expected]


@pytest.mark.parametrize(
    ("header", "columns", "named"),
    [
        ("id,name,sequence", InputColumns(), ["2 columns", "--id-column", "id, name, sequence"]),
        ("id,seq,sequence", InputColumns(), ["2 columns", "--sequence-column", "id, seq, sequence"]),
        ("id,sequence,sequence", InputColumns(sequence="sequence"), ["two columns have this name"]),
        ("id,light", InputColumns(), ["--sequence-column", "id, light"]),
        ("id,light", InputColumns(sequence="heavy"), ["--sequence-column heavy", "id, light"]),
        ("exported", InputColumns(), ["--id-column", "exported"]),
    ],
)
def test_columns_that_are_in_doubt(tmp_path: Path, header: str, columns: InputColumns, named: list[str]) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f"{header}\n1,2,3\n")
    with pytest.raises(FastaError, match=r"in\.csv") as caught:
        list(read_records([path], columns))
    assert all(text in str(caught.value) for text in named)


@pytest.mark.parametrize("name", ["in.csv", "in.tsv"])
@pytest.mark.parametrize("sign", [",", "\t", ";"])
def test_delimiters(tmp_path: Path, name: str, sign: str) -> None:
    path = tmp_path / name
    path.write_text(f"id{sign}sequence{sign}note\na{sign}MKT{sign}'1'\n")
    assert cells(list(read_records([path]))) == [("a", "MKT")]


def test_a_table_without_a_known_column(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,light\n")
    with pytest.raises(FastaError) as caught:
        list(read_records([path]))
    check_message("records.column", caught.value, path=path)


@pytest.mark.parametrize("value", ["", " ", "NaN", "nan", "None", "null", "<NA>", "#N/A"])
def test_cells_without_a_sequence_are_records_without_residues(tmp_path: Path, value: str) -> None:
    path = written(tmp_path / "in.csv", [("a", value), ("b", "MKT")])
    assert cells(list(read_records([path]))) == [("a", ""), ("b", "MKT")]


def test_null_and_nan_in_parquet(tmp_path: Path) -> None:
    path = written(tmp_path / "in.parquet", [("a", None), ("b", "MKT")])
    assert cells(list(read_records([path]))) == [("a", ""), ("b", "MKT")]
    parquet.write_table(pa.table({"id": [7, 8], "sequence": pa.array(["MK", "MK"]).dictionary_encode()}), path)
    assert cells(list(read_records([path]))) == [("7", "MK"), ("8", "MK")]
    parquet.write_table(pa.table({"id": [7.0, float("nan")], "sequence": ["MK", "MK"]}), path)
    with pytest.raises(FastaError, match="id holds double"):
        list(read_records([path]))


@pytest.mark.parametrize("value", ["NA", "NULL", "NAN", "NONE"])
def test_a_missing_value_that_spells_residues_is_an_error(tmp_path: Path, value: str) -> None:
    path = written(tmp_path / "in.csv", [("a", "MKT"), ("b", value)])
    with pytest.raises(FastaError, match=f"row 2, record 'b': {value}"):
        list(read_records([path]))
    path = written(tmp_path / "in.csv", [(value, "MKT")])
    assert cells(list(read_records([path]))) == [(value, "MKT")]  # NA is a neuraminidase


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "is empty"),
        ("id,sequence\n", "no rows"),
        ("id,sequence\na,MKT\n,MKT\n", "row 2: a record without an id"),
        ("id,sequence\nNaN,MKT\n", "row 1: a record without an id"),
        ("id,sequence\na\0b,MKT\n", "row 1, .*NUL byte"),
        ("id,sequence\na,MKT\nb\n", "line 3: 1 cell, but the header has 2"),
        ("id,sequence\na,MKT,1\n", "line 2: 3 cells, but the header has 2"),
        ('id,sequence\na,"MKT\nb,MKT\n', "line 3: not a table"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "in.csv"
    path.write_text(content)
    with pytest.raises(FastaError, match=named):
        list(read_records([path]))


def test_paths_and_suffixes(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent.parquet"):
        with pytest.raises(FastaError, match=f"{name}: no such file"):
            list(read_records([tmp_path / name]))
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no Parquet")
    with pytest.raises(FastaError, match=r"in\.parquet"):
        list(read_records([tmp_path / "in.parquet"]))
    (tmp_path / "in.txt").write_text("id,sequence\na,MKT\n")
    with pytest.raises(FastaError, match=r"a table\? give it as a \.csv"):
        list(read_records([tmp_path / "in.txt"]))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_tables_cut_at_every_byte(tmp_path: Path, suffix: str) -> None:
    content = b"id,sequence\n" + b"".join(b"r%d,MKTAYIAK\n" % number for number in range(5))
    whole = COMPRESSORS[suffix](content)
    path = tmp_path / f"in.csv.{suffix}"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        seen: list[Record] = []
        with pytest.raises(FastaError, match=r"in\.csv") as caught:
            seen.extend(read_records([path]))
        assert size == 0 or isinstance(caught.value, DamagedFileError)
        assert cells(seen) == [(f"r{number}", "MKTAYIAK") for number in range(len(seen))]


def outcomes(path: Path, policies: RecordPolicies) -> list[object]:
    """What is embedded and reported of each record, and the class of the error that ends it."""
    results: list[object] = []
    try:
        for encoded, rows, fingerprint in prepare(read_records([path]), MODEL, policies, SeenIds()):
            known = None if encoded is None else (encoded.record[:3], encoded.ids.tolist(), encoded.windows)
            # The details of a duplicate name its place.
            results.append((known, [(row.id, row.what) for row in rows], fingerprint))
    except ProteaError as error:
        results.append(type(error))
    return results


ids = st.text(st.sampled_from("ab|/%@1é"), min_size=1, max_size=3)
letters = st.text(st.sampled_from("ACDMKTXJBU*.-acj 1:é\t"), max_size=12) | st.text(
    st.sampled_from("ACGT-"), max_size=40
)
policies = st.builds(
    RecordPolicies,
    unknown=st.sampled_from(["x", "error", "skip"]),
    gaps=st.sampled_from(["keep", "drop"]),
    duplicates=st.sampled_from(["error", "rename", "skip"]),
)


@given(
    st.lists(st.tuples(ids, letters), min_size=1, max_size=6), policies, st.sampled_from([".csv", ".tsv", ".parquet"])
)
def test_a_table_and_a_fasta_file_give_the_same_embedded_input(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], policies: RecordPolicies, suffix: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    fasta = folder / "same.fasta"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in rows), encoding="utf-8")
    table = written(folder / f"same{suffix}", list(rows))
    assert outcomes(table, policies) == outcomes(fasta, policies)


_MEMORY = """
import sys
from pathlib import Path
from protea.records import read_records
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
next(iter(read_records(sys.argv[1:])))
Path("/proc/self/clear_refs").write_text("5")
before = peak()
print(sum(1 for _ in read_records(sys.argv[1:])), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux measures the memory")
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_not_held_in_memory(tmp_path: Path, suffix: str) -> None:
    digits = str.maketrans("0123456789", "CDEFGHIKLM")
    rows = [(f"r{number}", f"{number:A>2000}".translate(digits)) for number in range(40_000)]
    path = written(tmp_path / f"in{suffix}", list(rows))  # 80 MB
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 40_000
    assert kilobytes < 40_000
