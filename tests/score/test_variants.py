"""What users write for variants, and what is wrong with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protea.alphabet import ESM
from protea.errors import VariantError
from protea.score.variants import CANONICAL, check, difference, explaining_offset, parse, parse_all

SEQUENCE = "MKTAYIAKQR"
sequences = st.text(st.sampled_from(CANONICAL), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("M1V", "VKTAYIAKQR"),
        ("M1V:R10K", "VKTAYIAKQK"),
        ("R10K:M1V", "VKTAYIAKQK"),
        ("M1M", SEQUENCE),
        ("K2del", "MTAYIAKQR"),
        ("K2_A4del", "MYIAKQR"),
        ("K2_T3insWW", "MKWWTAYIAKQR"),
        ("K2_A4delinsGGGG", "MGGGGYIAKQR"),
        ("K2delinsGG", "MGGTAYIAKQR"),
        ("K2del:Y5F", "MTAFIAKQR"),
        ("M1X", "XKTAYIAKQR"),
        (" M1V ", "VKTAYIAKQR"),
    ],
)
def test_what_can_be_written(text: str, changed: str) -> None:
    variant = parse(text)
    check(variant, SEQUENCE, ESM)
    assert variant.apply(SEQUENCE) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no variant; write A24V"),
        ("V", "no variant"),
        ("M1", "no variant"),
        ("m1v", "no variant"),
        ("M1V,K2R", "no variant"),
        ("p.Met1Val", "no variant"),
        ("M\uff11V", "no variant"),
        ("M1*", "a stop codon"),
        ("M1V:M1K", "changes residue 1 twice"),
        ("K2_A4del:T3R", "changes residue 3 twice"),
        ("K2_T3insA:K2_T3insG", "changes residue 3 twice"),
        ("K2_A4insGG", "an insertion lies between two neighbours"),
        ("K2insGG", "an insertion lies between two neighbours"),
        ("K2_T3ins", "what is inserted is missing"),
        ("K2delins", "what is inserted is missing"),
        ("K2delGG", "a deletion brings nothing"),
        ("A4_K2del", "ends before it begins"),
        ("M1J", "'J' is not in the ESM alphabet"),
        ("M11V", "position 11 is outside; residues are 1 to 10"),
        ("M0V", "position 0 is outside"),
        ("M-3V", "position -3 is outside"),
        ("K1V", "position 1 holds M, not K"),
        ("K2_A5del", "position 5 holds Y, not A"),
        ("M999999999V", "is outside"),
        ("M" + "9" * 5000 + "V", "no variant"),
        ("m1v", "'m1v': no variant; letters are upper case"),
        ("M1V:nonsense", "'M1V:nonsense': 'nonsense' is no variant"),
        ("M1_R10del", "no residue would be left"),
    ],
)
def test_what_cannot(text: str, message: str) -> None:
    with pytest.raises(VariantError, match=message):
        check(parse(text), SEQUENCE, ESM)


def test_residues_are_counted_from_an_offset() -> None:
    variant = parse("M94V:K95R", 94)
    check(variant, SEQUENCE, ESM, 94)
    assert variant.apply(SEQUENCE) == "VRTAYIAKQR"
    with pytest.raises(VariantError, match="position 1 is outside; residues are 94 to 103"):
        check(parse("M1V", 94), SEQUENCE, ESM, 94)
    check(parse("M-4V", -4), SEQUENCE, ESM, -4)


def test_an_offset_that_would_explain_all_is_named() -> None:
    with pytest.raises(VariantError, match=r"position 21 is outside.*; all 2 would fit with offset=21"):
        parse_all(["M21V", "T23A:Y25W"], SEQUENCE, ESM)
    # One residue may be anywhere; two that are nowhere are explained by nothing.
    assert explaining_offset([parse("K21V")], SEQUENCE, 1) is None
    assert explaining_offset([parse("W21V"), parse("W22V")], SEQUENCE, 1) is None
    assert explaining_offset([parse("M1V"), parse("K2V")], SEQUENCE, 1) is None
    # In a repeat, several would.
    assert explaining_offset([parse("A7V"), parse("A8V")], "AAAAAA", 1) is None


@given(sequences, st.data())
def test_substitutions_there_and_back(sequence: str, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(sequence) - 1), min_size=1, max_size=5, unique=True))
    offset = data.draw(st.integers(-50, 500))
    new = {place: data.draw(st.sampled_from(CANONICAL)) for place in places}
    text = ":".join(f"{sequence[place]}{place + offset}{letter}" for place, letter in new.items())
    variant = parse(text, offset)
    check(variant, sequence, ESM, offset)
    assert variant.is_substitution
    assert variant.apply(sequence) == "".join(new.get(i, letter) for i, letter in enumerate(sequence))


@given(sequences, sequences)
def test_a_difference_leads_from_one_to_the_other(wild: str, mutated: str) -> None:
    if wild == mutated:
        assert difference(wild, mutated).edits == ()
        return
    variant = difference(wild, mutated)
    assert variant.apply(wild) == mutated
    assert variant.is_substitution == (len(wild) == len(mutated))
    if variant.is_substitution:
        assert parse(variant.name).edits == variant.edits


@given(st.text(max_size=40))
def test_any_text_is_a_variant_or_an_error(text: str) -> None:
    try:
        variant = parse(text)
        check(variant, SEQUENCE, ESM)
    except VariantError:
        return
    assert set(variant.apply(SEQUENCE)) <= set(ESM.residues)
