"""The notation of variants, and the errors in it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import check_message
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
def test_variants_change_a_sequence(text: str, changed: str) -> None:
    variant = parse(text)
    check(variant, SEQUENCE, ESM)
    assert variant.apply(SEQUENCE) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^'': "),
        ("V", "^'V': "),
        ("M1", "^'M1': "),
        ("m1v", "^'m1v': "),
        ("M1V,K2R", "^'M1V,K2R': "),
        ("p.Met1Val", "^'p.Met1Val': "),
        ("M\uff11V", "^'M\uff11V': "),
        ("M1*", r"^M1\*: "),
        ("M1V:M1K", "^M1V:M1K: .* 1 "),
        ("K2_A4del:T3R", "^K2_A4del:T3R: .* 3 "),
        ("K2_T3insA:K2_T3insG", "^K2_T3insA:K2_T3insG: .* 3 "),
        ("K2_A4insGG", "^K2_A4insGG: .* A24_G25insKL"),
        ("K2insGG", "^K2insGG: .* A24_G25insKL"),
        ("K2_T3ins", "^K2_T3ins: "),
        ("K2delins", "^K2delins: "),
        ("K2delGG", "^K2delGG: .* GG"),
        ("A4_K2del", "^A4_K2del: "),
        ("M1J", "^M1J: 'J' .* ESM"),
        ("M11V", "^M11V: .* 11 .* 1 to 10"),
        ("M0V", "^M0V: .* 0 "),
        ("M-3V", "^M-3V: .* -3 "),
        ("K1V", "^K1V: .* 1 .*M.*K"),
        ("K2_A5del", "^K2_A5del: .* 5 .*Y.*A"),
        ("M999999999V", "^M999999999V: .* 999999999 "),
        ("M" + "9" * 5000 + "V", "^'M9{59}…': "),
        ("M1V:nonsense", "^'M1V:nonsense': 'nonsense' "),
        ("M1_R10del", "^M1_R10del: "),
    ],
)
def test_texts_that_are_not_variants(text: str, message: str) -> None:
    with pytest.raises(VariantError, match=message):
        check(parse(text), SEQUENCE, ESM)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("notation", "M1"),
        ("lower", "m1v"),
        ("part", "M1V:nonsense"),
        ("stop", "M1*"),
        ("twice", "M1V:M1K"),
        ("insertion", "K2insGG"),
        ("outside", "M11V"),
        ("residue", "K1V"),
        ("letter", "M1J"),
    ],
)
def test_wording(key: str, text: str) -> None:
    with pytest.raises(VariantError) as caught:
        check(parse(text), SEQUENCE, ESM)
    check_message(f"variants.{key}", caught.value)


def test_residues_are_counted_from_an_offset() -> None:
    variant = parse("M94V:K95R", 94)
    check(variant, SEQUENCE, ESM, 94)
    assert variant.apply(SEQUENCE) == "VRTAYIAKQR"
    with pytest.raises(VariantError, match=r"^M1V: .* 1 .* 94 to 103"):
        check(parse("M1V", 94), SEQUENCE, ESM, 94)
    check(parse("M-4V", -4), SEQUENCE, ESM, -4)


def test_the_offset_at_which_all_variants_fit_is_named() -> None:
    with pytest.raises(VariantError, match=r"^M21V: .* 21 .* 2 .*offset=21$"):
        parse_all(["M21V", "T23A:Y25W"], SEQUENCE, ESM)
    # A single residue could be anywhere; no offset explains two residues that the protein lacks.
    assert explaining_offset([parse("K21V")], SEQUENCE, 1) is None
    assert explaining_offset([parse("W21V"), parse("W22V")], SEQUENCE, 1) is None
    assert explaining_offset([parse("M1V"), parse("K2V")], SEQUENCE, 1) is None
    # In a repeat, several offsets fit.
    assert explaining_offset([parse("A7V"), parse("A8V")], "AAAAAA", 1) is None


@settings(max_examples=40)
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


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_is_a_variant_or_an_error(text: str) -> None:
    try:
        variant = parse(text)
        check(variant, SEQUENCE, ESM)
    except VariantError:
        return
    assert set(variant.apply(SEQUENCE)) <= set(ESM.residues)
