"""The one policy for letters outside the alphabet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages import check_message
from protea.alphabet import ESM, ESM1NV
from protea.errors import FastaError, UnknownResidueError
from protea.fasta import Record
from protea.letters import ReportRow, clean


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
        ("mk j*", "MKX", 6, None),
    ],
)
def test_changes_are_counted_and_reported(sequence: str, cleaned: str, letters: int, detail: str | None) -> None:
    result = clean(record(sequence), ESM, "x")
    assert result.sequence == cleaned
    assert result.letters == letters
    if detail is not None:
        assert result.row == ReportRow("p1", "altered", detail)
    assert (result.row is None) == (letters == 0)


@pytest.mark.parametrize(
    ("sequence", "unknown", "key"),
    [
        ("MJTJ", "error", "letters.unknown"),
        ("MK1T", "x", "letters.damage"),
        ("MK1T", "error", "letters.damage"),
        ("MK<mask>T", "x", "letters.mask"),
    ],
)
def test_refused_letters(sequence: str, unknown: str, key: str) -> None:
    with pytest.raises(UnknownResidueError, match="line 3, record 'p1'") as caught:
        clean(record(sequence), ESM, unknown)  # type: ignore[arg-type]
    check_message(key, caught.value)


@pytest.mark.parametrize("sequence", ["", "*", " "])
def test_no_residues(sequence: str) -> None:
    assert clean(record(sequence), ESM, "x") == (None, ReportRow("p1", "skipped", "no residues"), 0)
    with pytest.raises(FastaError, match="p1") as caught:
        clean(record(sequence), ESM, "error")
    check_message("letters.no-residues", caught.value)


def test_masks_are_positions_where_they_are_allowed() -> None:
    assert clean(record("mk<mask>t"), ESM, "x", masks=True).sequence == "MK<mask>T"
    assert clean(record("MK<mask>1"), ESM, "skip", masks=True).row == ReportRow(
        "p1", "skipped", "not in the alphabet: 1 at 4"
    )


@given(
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=40), st.sampled_from([ESM, ESM1NV])
)
def test_every_change_has_a_row_and_the_result_fits(sequence: str, alphabet: object) -> None:
    result = clean(record(sequence), alphabet, "skip")  # type: ignore[arg-type]
    if result.sequence is None:
        assert result.row is not None
        assert result.row.what == "skipped"
    else:
        assert set(result.sequence) <= set(alphabet.residues)  # type: ignore[attr-defined]
        assert (result.row is None) == (result.sequence == sequence) == (result.letters == 0)
