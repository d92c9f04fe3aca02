"""Reading FASTA in all its variants, compared with an independent slow reader."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages import check_message
from protea import fasta
from protea.errors import DamagedFileError, FastaError
from protea.fasta import Record, read_blocks, read_fasta, size_of
from protea.records import read_records

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}


def read(path: Path, content: bytes) -> list[Record]:
    path.write_bytes(content)
    return list(read_fasta([path]))


def test_header_is_split_into_id_and_description(tmp_path: Path) -> None:
    records = read(tmp_path / "a.fasta", b">sp|P1|X  human  protein \nMKT\n\nAYI\n> spaced id\nG\n")
    assert [(r.id, r.description, r.sequence) for r in records] == [
        ("sp|P1|X", "human  protein", "MKTAYI"),
        ("spaced", "id", "G"),
    ]
    assert records[1].place == f"{tmp_path / 'a.fasta'}, line 5, record 'spaced'"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_all_line_ends_and_a_byte_order_mark(tmp_path: Path, end: bytes) -> None:
    content = b"\xef\xbb\xbf" + end.join([b">a one", b"MK", b"T", b">b", b"AA"])
    assert [(r.id, r.description, r.sequence) for r in read(tmp_path / "a.fasta", content)] == [
        ("a", "one", "MKT"),
        ("b", "", "AA"),
    ]


def test_nothing_between_line_breaks_is_dropped(tmp_path: Path) -> None:
    """The alphabet judges comments, digits, gaps and control characters; the reader keeps them."""
    (record,) = read(tmp_path / "a.fasta", b">a\nMK\n#AAA\n;C\n1 K\x00-*\n\xc3\xa9\n")
    assert record.sequence == "MK#AAA;C1 K\x00-*Ã©"


def test_headers_in_any_encoding(tmp_path: Path) -> None:
    records = read(tmp_path / "a.fasta", ">a café\nM\n".encode() + ">b café\nM\n".encode("latin-1"))
    assert [record.description for record in records] == ["café", "café"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed(tmp_path: Path, suffix: str) -> None:
    content = b">a\nMKT\n>b\nAAA\n"
    records = read(tmp_path / f"a.fasta.{suffix}", COMPRESSORS[suffix](content))
    assert [record.sequence for record in records] == ["MKT", "AAA"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_data_cut_short_is_an_error_after_the_whole_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.fasta.{suffix}"
    sequences = [bytes(65 + (i * j) % 23 for j in range(60)) for i in range(9000)]
    whole = COMPRESSORS[suffix](b"".join(b">r%d\n%s\n" % row for row in enumerate(sequences)))
    path.write_bytes(whole[: len(whole) // 2])
    seen: list[str] = []
    with pytest.raises(FastaError, match=f"a.fasta.{suffix}.*cut short"):
        seen.extend(record.sequence for record in read_fasta([path]))
    assert seen == [sequence.decode() for sequence in sequences[: len(seen)]]
    assert len(seen) < len(sequences)


@pytest.mark.parametrize("compress", [None, *COMPRESSORS.values()])
def test_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes] | None
) -> None:
    content = b">a\nMKT\n"
    path = tmp_path / "redirected"
    path.write_bytes(compress(content) if compress else content)
    with path.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        (record,) = read_fasta(["-"])
    assert record.sequence == "MKT"
    assert record.place == "standard input, line 1, record 'a'"


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_cut_at_every_byte(tmp_path: Path, suffix: str) -> None:
    """No record survives most of the cuts."""
    whole = COMPRESSORS[suffix](b">a\nMKT\n>b\nAAA\n")
    for size in range(len(whole)):
        path = tmp_path / f"a.fasta.{suffix}"
        path.write_bytes(whole[:size])
        seen: list[str] = []
        with pytest.raises(FastaError, match=rf"a\.fasta\.{suffix}") as caught:
            seen.extend(record.id for record in read_fasta([path]))
        assert size == 0 or isinstance(caught.value, DamagedFileError)
        assert seen in ([], ["a"])


@pytest.mark.parametrize("suffix", COMPRESSORS)
@given(st.data())
def test_compressed_files_with_a_wrong_bit(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    """A file whose decoder notices the damage, in whatever way, ends in an error of ours."""
    whole = bytearray(COMPRESSORS[suffix](b"".join(b">r%d\n%s\n" % (n, b"MKTAYIAKQR"[n:]) for n in range(9)) * 9))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / f"wrong.fasta.{suffix}"
    path.write_bytes(whole)
    with suppress(FastaError):
        list(read_fasta([path]))


def test_a_gzip_file_whose_decoder_has_its_own_exception(tmp_path: Path) -> None:
    """The faster decoders of gzip raise exceptions that are no OSError and no zlib.error."""
    pytest.importorskip("isal")
    whole = bytearray(gzip.compress(b">a\nMKT\n" * 99))
    whole[10] |= 0b110  # a block of a type that does not exist
    with pytest.raises(DamagedFileError, match=r"a\.fasta\.gz"):
        read(tmp_path / "a.fasta.gz", bytes(whole))


DISGUISES = {
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "page": b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n",
    "utf-16": ">a\r\nMKT\r\n".encode("utf-16"),
    "utf-16-be": b"\xfe\xff" + ">a\r\nMKT\r\n".encode("utf-16-be"),
    "utf-16-le-bare": ">a\r\nMKT\r\n".encode("utf-16-le"),
    "utf-16-be-bare": ">a\r\nMKT\r\n".encode("utf-16-be"),
    "zip": b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0",
}


@pytest.mark.parametrize("name", DISGUISES)
def test_files_in_disguise_are_called_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content = DISGUISES[name]
    tables = ["a.csv"] if name not in ("utf-16", "utf-16-be") else []  # with a byte order mark, they are read
    for path in (tmp_path / file for file in ("a.fasta", "a.fasta.gz", "a.parquet", *tables)):
        path.write_bytes(content)
        with pytest.raises(FastaError) as caught:
            list(read_records([path]))
        check_message(f"fasta.disguise.{name}", caught.value, path=path)
    path = tmp_path / "a.fasta.xz"
    path.write_bytes(lzma.compress(content))
    with pytest.raises(FastaError) as caught:
        list(read_records([path]))
    check_message(f"fasta.disguise.{name}", caught.value, path=path)
    with (tmp_path / "a.fasta").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(FastaError) as caught:
            list(read_fasta(["-"]))
    check_message(f"fasta.disguise.{name}", str(caught.value).replace("standard input", "{path}"))


def test_several_files_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b.fasta", "a.fasta")]
    for path in paths:
        path.write_text(f">{path.stem}\nMK\n")
    assert [record.id for record in read_fasta(paths)] == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no records; the file is empty"),
        (b"\n\n", "no records; the file is empty"),
        (b"MKT\n", "line 1: not FASTA: expected '>' and a header, found 'MKT'"),
        (b"\n@read\nACGT\n+\nIIII\n", r"line 2: not FASTA.*FASTQ\?"),
        (b"LOCUS       AB1  35 aa\n", r"line 1: not FASTA.*GenBank.*FASTA"),
        (b"ID   SUMO1_HUMAN  Reviewed;\n", r"not FASTA.*UniProt text\?"),
        (b"HEADER    HYDROLASE\nATOM      1\n", r"not FASTA.*a structure\?"),
        (b"data_1UBQ\n#\n", r"not FASTA.*a structure\?"),
        (b"CLUSTAL W (1.83)\n\na MKT\n", r"not FASTA.*an alignment\?"),
        (b"# STOCKHOLM 1.0\na MKT\n//\n", r"not FASTA.*an alignment\?"),
        (b"IDLE\n", "found 'IDLE'$"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", r"a\.fasta: is a PDF"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not FASTA"),
        (b">\nMKT\n", "line 1: a record without an id"),
        (b">a\0b\nMKT\n", "NUL byte"),
    ],
)
def test_files_that_are_not_fasta(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(FastaError, match=message):
        read(tmp_path / "a.fasta", content)


def test_paths_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FastaError, match=r"absent.fasta: no such file"):
        list(read_fasta([tmp_path / "absent.fasta"]))
    with pytest.raises(FastaError, match="is a folder"):
        list(read_fasta([tmp_path]))


def test_plain_text_named_gz(tmp_path: Path) -> None:
    with pytest.raises(FastaError, match="not compressed as its name says"):
        read(tmp_path / "a.fasta.gz", b">a\nMKT\n")


def test_records_without_residues_come_out_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_bytes(b">a\n>b\nMKT\n>c\n\n")
    assert [(record.id, record.sequence) for record in read_fasta([path])] == [("a", ""), ("b", "MKT"), ("c", "")]


def slow_reading(content: bytes) -> list[tuple[str, str]] | None:
    """Read the format as simply as possible; return ``None`` where an error is expected."""
    lines = [line.strip() for line in content.replace(b"\r", b"\n").split(b"\n")]
    lines = [line for line in lines if line]
    if not lines or not lines[0].startswith(b">"):
        return None
    records: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith(b">"):
            words = line[1:].decode("latin-1").split()
            if not words or b"\0" in line:
                return None
            records.append((words[0], ""))
        else:
            records[-1] = (records[-1][0], records[-1][1] + line.decode("latin-1"))
    return records


pieces = st.sampled_from([b">", b">a", b">b c", b"MKT", b"mk", b"*", b"-", b" ", b"\t", b"\0", b"#x", b";", b"9", b"@"])


@given(st.lists(st.tuples(pieces, st.sampled_from([b"\n", b"\r\n", b"\r", b"", b"\n\n"]))))
def test_equals_the_slow_reading(tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[bytes, bytes]]) -> None:
    content = b"".join(piece + end for piece, end in parts)
    path = tmp_path_factory.getbasetemp() / "fuzz.fasta"
    expected = slow_reading(content)
    if expected is None:
        with pytest.raises(FastaError):
            read(path, content)
    else:
        assert [(record.id, record.sequence) for record in read(path, content)] == expected


def test_paths_that_no_file_system_accepts(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    plain = tmp_path / "plain"
    plain.write_text(">a\nM\n")
    for path in (loop, tmp_path / ("x" * 300), plain / "within"):
        with pytest.raises(FastaError, match=r"(cannot be opened|no such file)"):
            list(read_fasta([path]))


def test_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(FastaError, match="standard input is closed"):
        list(read_fasta(["-"]))


def outcome(path: Path) -> list[Record | str]:
    """The records of a file, and the error after them."""
    records: list[Record | str] = []
    try:
        records.extend(read_fasta([path]))
    except FastaError as error:
        records.append(str(error))
    return records


@given(st.lists(st.tuples(pieces, st.sampled_from([b"\n", b"\r\n", b"\r", b"", b"\n\n"]))), st.integers(1, 20))
def test_blocks_of_any_size_hold_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[bytes, bytes]], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.fasta"
    path.write_bytes(b"".join(piece + end for piece, end in parts))
    expected = outcome(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "_BLOCK", size)
        assert outcome(path) == expected


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_records_before_damage_come_out(tmp_path: Path, suffix: str) -> None:
    content = b"".join(b">r%d\n%s\n" % (n, bytes([65 + n * 7 % 20]) * (n % 90)) for n in range(20_000))
    path = tmp_path / f"in.fasta.{suffix}"
    path.write_bytes(COMPRESSORS[suffix](content)[:-9])
    records: list[Record] = []
    with pytest.raises(DamagedFileError, match="cannot be read to its end"):
        records.extend(read_fasta([path]))
    assert all(int(record.id[1:]) == number for number, record in enumerate(records))
    # How much a decompressor holds back when it fails depends on the format.
    assert len(records) > 19_000


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_blocks_say_how_much_of_the_file_they_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(fasta, "_BLOCK", 1 << 12)
    text = "".join(f">r{number} {number * 7919}\n{'MKTAYIAKQR' * 9}\n" for number in range(2000)).encode()
    packed = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](text)
    paths = [tmp_path / f"one.fasta{suffix}", tmp_path / f"two.fasta{suffix}"]
    for path in paths:
        path.write_bytes(packed)
    taken = [block.consumed for block in read_blocks(paths)]
    assert sum(taken) == size_of(paths) == 2 * len(packed)
    assert min(taken) >= 0
    assert suffix or len(list(filter(None, taken))) > 20
    assert size_of([*paths, "-"]) is None
