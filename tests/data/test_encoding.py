from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protea.alphabet import ESM, ESM1NV, Alphabet
from protea.data.build_settings import BuildSettings
from protea.data.encoding import Counts, Reader, grouped
from protea.data.token_table import Table
from protea.errors import DataError, FastaError, UnknownResidueError
from protea.fasta import Record, read_blocks, read_fasta
from protea.progress import SILENT, Progress
from protea.records import read_groups


def read(
    folder: Path, *sequences: str, alphabet: Alphabet = ESM, description: str = "", **policies: object
) -> tuple[Counts, list[str], str]:
    """The counts, the sequences taken, and the report."""
    records = [Record(f"r{n}", description, text, f"f, line {n}, record 'r{n}'") for n, text in enumerate(sequences)]
    reader = Reader(alphabet, BuildSettings(output=folder, **policies), SILENT)  # type: ignore[arg-type]
    counts = reader.table([records], folder)
    tokens = [row for _, batch in Table(folder).batches() for row in batch.column("tokens").to_pylist()]
    return (
        counts,
        [alphabet.decode(np.frombuffer(row, np.uint8)) for row in tokens],
        (folder / "report.tsv").read_text(),
    )


def test_plain_sequences_are_taken_as_they_are(tmp_path: Path) -> None:
    counts, taken, report = read(tmp_path, "MKTAYIAK", "GDGTQDNLSGAEKAXBUZO")
    assert taken == ["MKTAYIAK", "GDGTQDNLSGAEKAXBUZO"]
    assert (counts.records, counts.kept, counts.residues, counts.altered_records) == (2, 2, 27, 0)
    assert report == ""


def test_gaps_and_nucleotides_are_reported_and_told(tmp_path: Path) -> None:
    """As records, and as the blocks of a file, which are taken as they are where nothing is to be said."""
    dna = "ATGGCCAAGCTTACGATAGC"
    sequences = ["MKTAYIAK", "M-K.", dna, "MKT"]
    counts, taken, report = read(tmp_path, *sequences)
    assert taken == sequences
    assert counts.altered_records == 0
    assert [line.split("\t")[:2] for line in report.splitlines()] == [["r1", "gapped"], ["r2", "nucleotides"]]
    assert read(tmp_path, *sequences, gaps="drop")[1] == ["MKTAYIAK", "MK", dna, "MKT"]
    notes: list[str] = []

    class Told(Progress):
        def note(self, message: str) -> None:
            notes.append(message)

    path = tmp_path / "in.fasta"
    path.write_text("".join(f">r{n} x\n{text[:9]}\n{text[9:]}\n" for n, text in enumerate(sequences)))
    Reader(ESM, BuildSettings(output=tmp_path), Told()).table(read_blocks([path]), tmp_path)
    assert (tmp_path / "report.tsv").read_text() == report
    assert [note.split(":")[0] for note in notes] == [
        "DNA or RNA, read as amino acids",
        "gaps, which count as residues",
    ]


def test_a_table_is_read_as_fasta_is(tmp_path: Path) -> None:
    path = tmp_path / "in.tsv"
    path.write_text("Entry\tSequence\na\tMKTA\nb\tmk\n")
    counts = Reader(ESM, BuildSettings(output=tmp_path), SILENT).table(read_groups([path]), tmp_path)
    assert (counts.kept, counts.residues, counts.altered_records) == (2, 6, 1)


def test_odd_letters_are_corrected_and_reported(tmp_path: Path) -> None:
    counts, taken, report = read(tmp_path, "mkTA", "MK TA", "MKTA**", "MKJA*T", "MKTA")
    assert taken == ["MKTA", "MKTA", "MKTA", "MKXAXT", "MKTA"]
    assert (counts.altered_records, counts.altered_letters) == (4, 2 + 1 + 2 + 2)
    assert report.splitlines() == [
        "r0\taltered\t2 lower-case letters changed to upper case",
        "r1\taltered\t1 blank removed",
        "r2\taltered\tstops removed at the end",
        "r3\taltered\treplaced by X: * at 5; J at 3",
    ]


def test_gaps_are_letters_of_one_alphabet_alone(tmp_path: Path) -> None:
    assert read(tmp_path, "MK-A.T", alphabet=ESM1NV)[1] == ["MKXAXT"]


def test_skipped_records_are_reported(tmp_path: Path) -> None:
    counts, taken, report = read(
        tmp_path, "", "MK", "MKTAY", "MKTAYIAKQR", "MKT1", "MKJT", min_length=3, max_length=8, unknown="skip"
    )
    assert taken == ["MKTAY"]
    numbers = asdict(counts)
    assert sum(value for name, value in numbers.items() if name.startswith("skipped")) == 5
    assert (counts.skipped_empty, counts.skipped_short, counts.skipped_long, counts.skipped_unknown) == (1, 1, 1, 2)
    assert {line.split("\t")[2] for line in report.splitlines()} == {
        "no residues",
        "2 residues, below 3",
        "10 residues, over 8",
        "not in the alphabet: 1 at 4",
        "not in the alphabet: J at 3",
    }
    assert len(Table(tmp_path).left_out) == 5


def test_records_are_skipped_by_header(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 record .*1 by header"):
        read(tmp_path, "MKTA", description="X Tax=synthetic construct", leave_out="Tax=synthetic")
    assert read(tmp_path, "MKTA", description="X Tax=Homo", leave_out="Tax=synthetic")[0].kept == 1


def test_letters_that_no_policy_allows(tmp_path: Path) -> None:
    with pytest.raises(UnknownResidueError, match=r"f, line 1, record 'r1': .* 1 at 2, 4;"):
        read(tmp_path, "MK", "M1K1")
    with pytest.raises(UnknownResidueError, match=r"record 'r0': .*ESM.*: J at 2"):
        read(tmp_path, "MJ", unknown="error")
    with pytest.raises(FastaError, match="record 'r0'"):
        read(tmp_path, "", unknown="error")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.text("ACDXJ*- mé1", max_size=12), min_size=1, max_size=12), st.integers(1, 4))
def test_every_record_is_kept_or_counted(tmp_path: Path, sequences: list[str], least: int) -> None:
    try:
        counts, taken, _ = read(tmp_path, *sequences, unknown="skip", min_length=least)
    except DataError:
        return
    numbers = asdict(counts)
    left = sum(value for name, value in numbers.items() if name.startswith("skipped"))
    assert counts.records == len(sequences) == counts.kept + left
    assert counts.residues == sum(map(len, taken))
    assert len(Table(tmp_path).left_out) == left
    assert all(set(text) <= set(ESM.residues) for text in taken)


lines = st.lists(
    st.tuples(
        st.sampled_from(["r", "é", "r x", "r\tx", "\x1cr", "r >", ""]),
        st.lists(st.sampled_from(["MKT", "MkT", "M K", "MJ", "M*", "", "M1", " MK", "MK "]), max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(lines, st.integers(1, 4), st.sampled_from([None, 5]))
def test_blocks_are_read_as_records_are(
    tmp_path: Path, parts: list[tuple[str, list[str]]], least: int, most: int | None
) -> None:
    """Plain blocks are encoded at once; the files are the same."""
    path = tmp_path / "in.fasta"
    path.write_text(
        "".join(f">{head}{n}\n" + "".join(f"{row}\n" for row in rows) for n, (head, rows) in enumerate(parts))
    )
    outcomes = []
    for groups in (grouped(read_fasta([path])), read_blocks([path])):
        policies = BuildSettings(output=tmp_path, unknown="skip", min_length=least, max_length=most)
        reader = Reader(ESM, policies, SILENT)
        try:
            counts = asdict(reader.table(groups, tmp_path))
        except (DataError, FastaError) as error:
            outcomes.append(str(error))
            continue
        rows = pa.Table.from_batches(batch for _, batch in Table(tmp_path).batches()).to_pydict()
        files = [(tmp_path / name).read_bytes() for name in ("ids.index", "ids.left_out", "report.tsv")]
        outcomes.append((counts, rows, files))
    assert outcomes[0] == outcomes[1]
