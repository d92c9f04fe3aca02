"""The notation of variants, and the errors in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import check_message
from protea.alphabet import ESM
from protea.errors import UsageError, VariantError
from protea.score import notation
from protea.score.notation import parse_all
from protea.score.variants import (
    CANONICAL,
    Variant,
    check,
    chosen_places,
    difference,
    explaining_offset,
    scan_cells,
    single_substitutions,
)

SEQUENCE = "MKTAYIAKQR"


def parse(text: str, offset: int = 1) -> Variant:
    return notation.parse(text, SEQUENCE, offset)


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
        ("M1U", "UKTAYIAKQR"),
        ("M1O", "OKTAYIAKQR"),
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
        ("M1J", "^M1J: J .* I or L"),
        ("M1B", "^M1B: B .* D or N"),
        ("M1Z", "^M1Z: Z .* E or Q"),
        ("R10X", "^R10X: X .* stop"),
        ("K2_T3insX", "^K2_T3insX: X "),
        ("K2_T3insA*", r"^K2_T3insA\*: adds a stop"),
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
        ("letter", "M1B"),
        ("old_stop", "R10X"),
    ],
)
def test_wording(key: str, text: str) -> None:
    with pytest.raises(VariantError) as caught:
        check(parse(text), SEQUENCE, ESM)
    check_message(f"variants.{key}", caught.value)


def test_unknown_residues_of_the_wild_type_stay() -> None:
    """They may be replaced, and whole sequences with another length contain them, but none may be added."""
    for wild, mutated in (("MAXKAL", "MAGKAL"), ("MAXKAL", "CAXKALL"), ("MAXKAL", "MAXKAL")):
        check(difference(wild, mutated), wild, ESM)
    for wild, mutated in (("MAGKAL", "MAXKAL"), ("MAXKAL", "CAXXKALL")):
        with pytest.raises(VariantError, match="X stands for"):
            check(difference(wild, mutated), wild, ESM)


def test_positions_of_a_scan() -> None:
    assert list(chosen_places("p", SEQUENCE, None)) == list(range(10))
    assert chosen_places("p", SEQUENCE, "2-4, 9,3") == [1, 2, 3, 8]
    assert chosen_places("p", SEQUENCE, [9, 2]) == [1, 8]
    assert chosen_places("p", SEQUENCE, "101-102,110", 101) == [0, 1, 9]
    assert chosen_places("p", SEQUENCE, "-4--2,0", -4) == [0, 1, 2, 4]
    for positions, message in (
        ("2-11", "11 is outside residues 1 to 10 of p"),
        ("0", "0 is outside"),
        ("1-999999999", "999999999 is outside"),
        ("4-2", "4-2 ends before it begins"),
        ("2,", "'' is neither"),
        ("", "'' is neither"),
        ("A2", "'A2' is neither"),
        ("1e3", "'1e3' is neither"),
    ):
        with pytest.raises(UsageError, match=message):
            chosen_places("p", SEQUENCE, positions)
    with pytest.raises(UsageError) as caught:
        chosen_places("p", SEQUENCE, "2-11")
    check_message("variants.positions", caught.value)
    cells = scan_cells("MK-", [1, 2], range(19))
    assert np.isfinite(cells).sum(1).tolist() == [0, 19, 0]
    assert [new for _, new in single_substitutions("MK-", [1])] == [letter for letter in CANONICAL if letter != "K"]


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
    variant = notation.parse(text, sequence, offset)
    check(variant, sequence, ESM, offset)
    assert variant.is_substitution
    assert variant.apply(sequence) == "".join(new.get(i, letter) for i, letter in enumerate(sequence))


DIFFERENCES = {
    "MTAYIAKQR": "residue 2 deleted",
    "MAYIAKQR": "residues 2 to 3 deleted",
    "MKKTAYIAKQR": "K inserted after residue 2",
    "WWMKTAYIAKQR": "WW inserted before residue 1",
    "MKTAYIAKQRG": "G inserted after residue 10",
    "MKTWWYIAKQR": "residue 4 replaced by WW",
    "MKTWIAKQR": "residues 4 to 5 replaced by W",
    "MKTAYIAKQA": "R10A",
}


@pytest.mark.parametrize("mutated", DIFFERENCES)
def test_differences_have_names(mutated: str) -> None:
    assert difference("MKTAYIAKQR", mutated).name == DIFFERENCES[mutated]


@given(sequences, sequences)
def test_a_difference_leads_from_one_to_the_other(wild: str, mutated: str) -> None:
    if wild == mutated:
        assert difference(wild, mutated).edits == ()
        return
    variant = difference(wild, mutated)
    assert variant.apply(wild) == mutated
    assert variant.is_substitution == (len(wild) == len(mutated))
    if variant.is_substitution:
        assert notation.parse(variant.name, wild).edits == variant.edits


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_is_a_variant_or_an_error(text: str) -> None:
    try:
        variant = parse(text)
        check(variant, SEQUENCE, ESM)
    except VariantError:
        return
    assert set(variant.apply(SEQUENCE)) <= set(ESM.residues)
