"""What becomes of records that cannot be taken as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import CONFIGS
from protea.alphabet import ESM
from protea.embed.prepare import EncodedRecord, RecordPolicies, SeenIds, prepare
from protea.embed.stores import file_name, store_name
from protea.errors import FastaError, ProteaError, SequenceTooLongError, UnknownResidueError
from protea.fasta import Record
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.models.registry import build

MODELS = {name: build(CONFIGS[name]) for name in ("esm2", "esm1b", "esm1nv")}


def record(sequence: str, record_id: str = "r") -> Record:
    return Record(record_id, "", sequence, f"x.fasta, line 1, record {record_id!r}")


def one(sequence: str, model: str = "esm2", **policies: str) -> tuple[EncodedRecord | None, tuple[ReportRow, ...]]:
    (item,) = prepare([record(sequence)], MODELS[model], RecordPolicies(**policies), SeenIds())  # type: ignore[arg-type]
    return item.encoded, item.rows


def text(encoded: EncodedRecord | None, model: Encoder = MODELS["esm2"]) -> str | None:
    return None if encoded is None else model.alphabet.decode(encoded.ids)


@pytest.mark.parametrize(
    ("sequence", "becomes", "detail"),
    [
        ("mkTa", "MKTA", "3 lower-case letters changed to upper case"),
        ("MKT*", "MKT", "stop removed at the end"),
        ("MKT**", "MKT", "stops removed at the end"),
        ("MK*T", "MKXT", "replaced by X: * at 3"),
        ("MJTJ", "MXTX", "replaced by X: J at 2, 4"),
        ("M" + "J" * 9, "M" + "X" * 9, "replaced by X: J at 2, 3, 4, 5, 6 and 4 more"),
        ("MKT AYI\tA", "MKTAYIA", "2 blanks removed"),
        ("k j", "KX", "1 blank removed; 2 lower-case letters changed to upper case; replaced by X: J at 2"),
        ("m<mask>k", "M<mask>K", "2 lower-case letters changed to upper case"),
    ],
)
def test_changes_are_reported(sequence: str, becomes: str, detail: str) -> None:
    encoded, notes = one(sequence)
    assert text(encoded) == becomes
    assert notes == (ReportRow("r", "altered", detail),)


@pytest.mark.parametrize("sequence", ["MKT", "XBUZO", "M<mask>K"])
def test_what_the_alphabet_has_stays_as_it_is(sequence: str) -> None:
    encoded, notes = one(sequence)
    assert text(encoded) == sequence
    assert notes == ()


def test_an_alphabet_without_gaps() -> None:
    encoded, notes = one("M-K.T", "esm1nv")
    assert text(encoded, MODELS["esm1nv"]) == "MXKXT"
    assert notes == (
        ReportRow("r", "altered", "replaced by X: - at 2; . at 4"),
        ReportRow("r", "gapped", "2 gaps, which count as residues"),
    )


def test_gaps_and_nucleotides_are_reported_though_the_alphabet_has_them() -> None:
    encoded, notes = one("M-K.T")
    assert text(encoded) == "M-K.T"
    assert notes == (ReportRow("r", "gapped", "2 gaps, which count as residues"),)
    encoded, notes = one("M-K.T", gaps="drop")
    assert text(encoded) == "MKT"
    assert notes == (ReportRow("r", "altered", "2 gaps removed"),)
    encoded, notes = one("ATGGCCAAGCTTACGATAGCA")
    assert text(encoded) == "ATGGCCAAGCTTACGATAGCA"
    assert [(row.id, row.what) for row in notes] == [("r", "nucleotides")]


@pytest.mark.parametrize("sequence", ["", " ", "*", "**", "\t*"])
def test_nothing_left_is_skipped(sequence: str) -> None:
    encoded, notes = one(sequence)
    assert encoded is None
    assert notes == (ReportRow("r", "skipped", "no residues"),)
    with pytest.raises(FastaError, match="record 'r': no residues"):
        one(sequence, unknown="error")


@pytest.mark.parametrize(
    ("letter", "shown"), [("1", "1"), ("\0", r"\\x00"), ("é", "é"), ("\xa0", r"\\xa0"), ("!", "!")]
)
def test_damage_is_never_replaced(letter: str, shown: str) -> None:
    with pytest.raises(UnknownResidueError, match=f"not a residue: {shown} at 3; .* --unknown skip"):
        one(f"MK{letter}T")
    with pytest.raises(UnknownResidueError, match=f"not a residue: {shown} at 3"):
        one(f"MK{letter}T", unknown="error")
    encoded, notes = one(f"MK{letter}T", unknown="skip")
    assert encoded is None
    assert notes[0].what == "skipped"
    assert notes[0].detail.startswith("not in the alphabet: ")


def test_unknown_letters_refused_or_skipped() -> None:
    with pytest.raises(UnknownResidueError, match=r"record 'r': .* J at 2"):
        one("MJT", unknown="error")
    assert one("MJT", unknown="skip") == (None, (ReportRow("r", "skipped", "not in the alphabet: J at 2"),))
    assert text(one("mkt", unknown="error")[0]) == "MKT"


def test_long_sequences() -> None:
    sequence = "ACDEFGHIKL" * 120
    encoded, notes = one(sequence)
    assert encoded is not None
    assert text(encoded) == sequence[:1022]
    assert encoded.truncated_from == 1200
    assert notes == (ReportRow("r", "truncated", "first 1022 of 1200 residues"),)
    encoded, notes = one(sequence, long="window")
    assert encoded is not None
    assert encoded.windows == ((0, 1022), (178, 1200))
    assert notes == (ReportRow("r", "windowed", "1200 residues in 2 windows of 1022"),)
    encoded, notes = one(sequence, long="full")
    assert encoded is not None
    assert (encoded.windows, notes) == (((0, 1200),), ())
    for model, policy in (("esm2", "error"), ("esm1b", "full"), ("esm1nv", "full"), ("esm1nv", "error")):
        with pytest.raises(SequenceTooLongError, match=r"record 'r': 1200 residues .* (1022|510) .* ESM-"):
            one(sequence, model, long=policy)
    encoded, _ = one(sequence, "esm1nv")
    assert encoded is not None
    assert len(encoded.ids) == 510


def test_duplicates() -> None:
    records = [record("M", name) for name in ("a", "a", "a_2", "a", "a/b", "a%2Fb", "b")]
    with pytest.raises(FastaError, match=r"record 'a': .* --duplicates rename"):
        list(prepare(records, MODELS["esm2"], RecordPolicies(), SeenIds()))

    def names(policy: str) -> list[str | None]:
        items = prepare(records, MODELS["esm2"], RecordPolicies(duplicates=policy), SeenIds())  # type: ignore[arg-type]
        return [item.encoded.record.id if item.encoded else None for item in items]

    assert names("skip") == ["a", None, "a_2", None, "a/b", None, "b"]
    # Read once only, a later record may find its name given away; it is then renamed, and said to be.
    assert names("rename") == ["a", "a_2", "a_2_2", "a_3", "a/b", "a%2Fb_2", "b"]


def slow_reading(sequence: str, unknown: str) -> str | None:
    """The rules of the documentation, a letter at a time; ``None`` for a skipped record, "error" for a refused one."""
    letters = [letter for letter in sequence if letter not in " \t\v\f"]
    letters = [chr(ord(letter) - 32) if "a" <= letter <= "z" else letter for letter in letters]
    while letters and letters[-1] == "*":
        letters.pop()
    if not letters:
        return "error" if unknown == "error" else None
    known = set("LAGVSERTIDPKQNFYMHWCXBUZO.-")
    strange = [letter for letter in letters if letter not in known]
    if not strange:
        return "".join(letters)
    if unknown == "skip":
        return None
    if unknown == "error" or any(letter not in "ABCDEFGHIJKLMNOPQRSTUVWXYZ*" for letter in strange):
        return "error"
    return "".join(letter if letter in known else "X" for letter in letters)


@given(
    st.text(alphabet=st.sampled_from("ACDMKTXJBUZO*.-acj 1\t\0é"), max_size=12), st.sampled_from(["x", "error", "skip"])
)
def test_against_a_slow_reading(sequence: str, unknown: str) -> None:
    expected = slow_reading(sequence, unknown)
    try:
        encoded, notes = one(sequence, unknown=unknown)
    except ProteaError:
        assert expected == "error"
        return
    assert text(encoded) == expected
    assert bool(notes) == (expected != sequence or bool({"-", "."} & set(sequence)))


def test_names(tmp_path: Path) -> None:
    assert store_name("a/b//c") == "a%2Fb%2F%2Fc"
    assert store_name(".") == "%2E"
    assert store_name("..") == ".."
    assert store_name("a@max") == "a%40max"
    assert store_name("a@maximum") == "a@maximum"
    for name in ("a/b", ".", "..", "../x", "x" * 5000, "ü\x1b[31m", "CON", "a b", "~", "-", "sp|P1|X"):
        path = tmp_path / f"{file_name(name)}.pt"
        path.write_text(name)
        assert path.resolve().parent == tmp_path.resolve()
    assert len(list(tmp_path.iterdir())) == 11
    assert file_name("x" * 5000) != file_name("x" * 5001)


def test_fingerprints_depend_on_everything_before() -> None:
    def fingerprints(*records: Record) -> list[bytes]:
        return [item.fingerprint for item in prepare(records, MODELS["esm2"], RecordPolicies(), SeenIds())]

    a, b = record("M", "a"), record("K", "b")
    first, second = fingerprints(a, b)
    assert fingerprints(a) == [first]
    assert fingerprints(a, record("M", "b"))[1] != second
    assert fingerprints(record("K", "a"), b)[1] != second
    assert fingerprints(a._replace(description="x"), b)[0] != first
    assert ESM.encode("M").dtype == "uint8"


def test_renaming_many_is_not_quadratic() -> None:
    class Counting(SeenIds):
        asked = 0

        def free(self, name: str) -> bool:
            self.asked += 1
            return super().free(name)

    ids = Counting()
    records = [record("M", "prot")] * 500
    items = list(prepare(records, MODELS["esm2"], RecordPolicies(duplicates="rename"), ids))
    assert [item.encoded.record.id for item in items if item.encoded][-1] == "prot_500"
    assert ids.asked < 1000
