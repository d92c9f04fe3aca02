"""The one policy for letters outside the alphabet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages import check_message
from protea.alphabet import ESM, ESM1NV, Alphabet
from protea.errors import FastaError, UnknownResidueError
from protea.fasta import Record
from protea.letters import Doubts, Gaps, ReportRow, clean, doubtful


def record(sequence: str) -> Record:
    return Record("p1", "", sequence, "in.fasta, line 3, record 'p1'")


@pytest.mark.parametrize(
    ("sequence", "cleaned", "letters", "detail"),
    [
        ("MKTX", "MKTX", 0, None),
        ("mkT", "MKT", 2, "2 lower-case letters changed to upper case"),
        ("MK T\tA", "MKTA", 2, "2 blanks removed"),
        ("MKT**", "MKT", 2, "stops removed at the end"),
        ("MJ*T", "MXXT", 2, "replaced by X: * at 3; J at 2"),
        (
            "mk j*",
            "MKX",
            6,
            "1 blank removed; 3 lower-case letters changed to upper case; stop removed at the end; "
            "replaced by X: J at 3",
        ),
    ],
)
def test_changes_are_counted_and_reported(sequence: str, cleaned: str, letters: int, detail: str | None) -> None:
    result = clean(record(sequence), ESM, "x")
    assert result.sequence == cleaned
    assert result.letters == letters
    assert result.rows == (() if detail is None else (ReportRow("p1", "altered", detail),))


@pytest.mark.parametrize(
    ("sequence", "unknown", "key"),
    [
        ("MJTJ", "error", "letters.unknown"),
        ("MK1T", "x", "letters.damage"),
        ("MK1T", "error", "letters.damage"),
        ("MK<mask>T", "x", "letters.mask"),
        ("MKTA:MKT:AY", "x", "letters.chains"),
        ("MKTA/MKT", "error", "letters.chains-slash"),
    ],
)
def test_refused_letters(sequence: str, unknown: str, key: str) -> None:
    with pytest.raises(UnknownResidueError, match="line 3, record 'p1'") as caught:
        clean(record(sequence), ESM, unknown)  # type: ignore[arg-type]
    check_message(key, caught.value)


@pytest.mark.parametrize("sequence", ["", "*", " "])
def test_no_residues(sequence: str) -> None:
    assert clean(record(sequence), ESM, "x") == (None, (ReportRow("p1", "skipped", "no residues"),), 0)
    with pytest.raises(FastaError, match="p1") as caught:
        clean(record(sequence), ESM, "error")
    check_message("letters.no-residues", caught.value)


def test_masks_are_positions_where_they_are_allowed() -> None:
    assert clean(record("mk<mask>t"), ESM, "x", masks=True).sequence == "MK<mask>T"
    assert clean(record("MK<mask>1"), ESM, "skip", masks=True).rows == (
        ReportRow("p1", "skipped", "not in the alphabet: 1 at 4"),
    )


def kinds(sequence: str, gaps: Gaps = "keep", alphabet: Alphabet = ESM) -> tuple[str | None, dict[str, str]]:
    """The cleaned sequence, and the details by the kind of row."""
    cleaned = clean(record(sequence), alphabet, "x", gaps)
    return cleaned.sequence, {row.what: row.detail for row in cleaned.rows}


DNA = "ATGGCCAAGCTTACGATAGC"


def test_gaps_are_kept_or_dropped_and_reported() -> None:
    aligned = "M-Kt.A*-"
    assert kinds(aligned) == (
        "M-KT.AX-",
        {
            "altered": "1 lower-case letters changed to upper case; replaced by X: * at 7",
            "gapped": "3 gaps, which count as residues",
        },
    )
    detail = "3 gaps removed; 1 lower-case letters changed to upper case; stop removed at the end"
    assert kinds(aligned, "drop") == ("MKTA", {"altered": detail})
    assert kinds("--.", "drop") == (None, {"skipped": "no residues"})
    assert kinds("M-K") == ("M-K", {"gapped": "1 gap, which counts as a residue"})
    assert kinds("M-K", alphabet=ESM1NV)[1].keys() == {"altered", "gapped"}
    assert kinds("M-K", "drop", ESM1NV) == ("MK", {"altered": "1 gap removed"})


@pytest.mark.parametrize(
    ("sequence", "is_said"),
    [
        (DNA, True),
        (DNA.lower(), True),
        (DNA.replace("T", "U"), True),
        (f"{DNA}NNNN", True),
        (f"{DNA[:9]}---{DNA[9:]}", True),
        (f"{DNA[:9]} {DNA[9:]}", True),
        (DNA[:-1], False),  # peptides of such letters exist
        (f"{DNA[:-1]}---", False),
        (f"{DNA}L", False),
        (f"{DNA}M", True),  # A or C
        (f"{DNA}P", False),
        ("A" * 40, False),  # poly-alanine
        ("GAGAGA" * 9, False),  # silk
        ("AAT" * 20 + "G", True),
        ("ACGTRYACGTNNACGTSWKM" * 2, True),  # IUPAC's ambiguous letters
        ("ACGURYSWKMBDHVN" * 5, True),
        ("acgtryacgtnnacgtswkm--" * 2, True),
        ("ACGTRYACGTNNACGTSWKM", False),  # 16 letters are clear
        ("ATGTRYATGTNNATGTSWKM" * 2, False),  # without C: a peptide could be so
        ("ACGTRYACGTNNACGTSWKME" * 2, False),
    ],
)
def test_nucleotides_are_said(sequence: str, is_said: bool) -> None:
    cleaned, rows = kinds(sequence)
    assert ("nucleotides" in rows) == is_said
    # Else the alphabet would take it without a report.
    assert doubtful(sequence) or not is_said or not set(sequence) <= set(ESM.residues)
    if is_said:
        assert cleaned is not None
        assert len(cleaned) == len(sequence.replace(" ", ""))


def test_doubts_are_a_line_a_kind() -> None:
    doubts = Doubts()
    assert doubts.lines() == []
    for name, sequence in (("p1", "MKT"), ("p2", "M-K"), ("p3", DNA), ("p4", "M.K"), ("p5", f"{DNA}-")):
        doubts.add(clean(Record(name, "", sequence, name), ESM, "x").rows)
    nucleotides, gapped = doubts.lines()
    check_message("letters.nucleotides", nucleotides)
    check_message("letters.gapped", gapped)


@given(
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=40)
    | st.text(st.sampled_from("MK-.*a")),
    st.sampled_from([ESM, ESM1NV]),
    st.sampled_from(["keep", "drop"]),
)
def test_every_change_has_a_row_and_the_result_fits(sequence: str, alphabet: object, gaps: str) -> None:
    result = clean(record(sequence), alphabet, "skip", gaps)  # type: ignore[arg-type]
    whats = [row.what for row in result.rows]
    if result.sequence is None:
        assert whats == ["skipped"]
    else:
        assert set(result.sequence) <= set(alphabet.residues)  # type: ignore[attr-defined]
        assert ("altered" not in whats) == (result.sequence == sequence) == (result.letters == 0)
        assert ("gapped" in whats) == ("-" in result.sequence or "." in result.sequence)
