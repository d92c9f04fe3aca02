"""Names of variants as HGVS, MaveDB and older tables write them."""

from __future__ import annotations

import random

import pytest
from biotite.sequence import ProteinSequence
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import check_message
from protea.alphabet import ESM
from protea.errors import VariantError
from protea.score.notation import parse
from protea.score.variants import CANONICAL, check

SEQUENCE = "MKTAYIAKQR"


def mutant(text: str, wild: str = SEQUENCE) -> str:
    variant = parse(text, wild)
    check(variant, wild, ESM)
    return variant.apply(wild)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("p.Lys2Cys", "MCTAYIAKQR"),
        ("p.(Lys2Cys)", "MCTAYIAKQR"),
        ("p.K2C", "MCTAYIAKQR"),
        ("Lys2Cys", "MCTAYIAKQR"),
        ("NP_000537.3:p.Lys2Cys", "MCTAYIAKQR"),
        ("NP_000537.3(TP53):p.(Lys2Cys)", "MCTAYIAKQR"),
        ("TP53:p.K2C", "MCTAYIAKQR"),
        ("p.Lys2Sec", "MUTAYIAKQR"),
        ("p.[Lys2Cys;Thr3Asp]", "MCDAYIAKQR"),
        ("p.[(Lys2Cys);(Thr3Asp)]", "MCDAYIAKQR"),
        ("p.[(Lys2Cys;Thr3Asp)]", "MCDAYIAKQR"),
        ("p.[Lys2=;Thr3Asp]", "MKDAYIAKQR"),
        ("p.Lys2Cys:p.Thr3Asp", "MCDAYIAKQR"),
        ("p.(Lys2Cys):p.(Thr3Asp)", "MCDAYIAKQR"),
        ("K2C:p.Thr3Asp", "MCDAYIAKQR"),  # K2C is no name of a reference sequence, but these are:
        ("F9:p.Thr3Asp", "MKDAYIAKQR"),
        ("P04637:p.Thr3Asp", "MKDAYIAKQR"),
        ("Q9Y6K9:p.Thr3Asp", "MKDAYIAKQR"),
        ("sp|P04637|P53_HUMAN:p.Thr3Asp", "MKDAYIAKQR"),
        ("p.Lys2_Ala4del", "MYIAKQR"),
        ("p.(Lys2_Ala4del)", "MYIAKQR"),
        ("p.Lys2del", "MTAYIAKQR"),
        ("p.Lys2_Thr3insGlyLeu", "MKGLTAYIAKQR"),
        ("p.Lys2_Ala4delinsGlyLeuTrp", "MGLWYIAKQR"),
        ("p.Lys2delinsGlyLeu", "MGLTAYIAKQR"),
        ("p.Lys2dup", "MKKTAYIAKQR"),
        ("p.Lys2_Ala4dup", "MKTAKTAYIAKQR"),
        ("K2_A4dup", "MKTAKTAYIAKQR"),
        ("p.Lys2=", SEQUENCE),
        ("p.(Lys2=)", SEQUENCE),
        ("p.Lys2_Ala4=", SEQUENCE),
        ("K2=", SEQUENCE),
        ("p.=", SEQUENCE),
        ("p.(=)", SEQUENCE),
        ("=", SEQUENCE),
        ("_wt", SEQUENCE),
        ("_sy", SEQUENCE),
    ],
)
def test_what_can_be_scored(text: str, changed: str) -> None:
    assert mutant(text) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p.Arg10Ter", "p.Arg10Ter: adds a stop codon"),
        ("p.R10*", "adds a stop codon"),
        ("p.Lys2_Thr3insGlyTer", "adds a stop codon"),
        ("p.Ter11Gln", "changes the stop codon"),
        ("*11Q", "changes the stop codon"),
        ("p.Arg10fs", "frameshift"),
        ("p.Lys2ProfsTer23", "frameshift"),
        ("p.(Lys2Profs*23)", "frameshift"),
        ("K2Pfs*3", "frameshift"),
        ("p.Met1ext-5", "extension"),
        ("p.Ter11GlnextTer17", "extension"),
        ("p.?", "p.?: the effect on the protein is not known"),
        ("p.(?)", "not known"),
        ("p.Met1?", "not known"),
        ("p.0", "p.0: no protein"),
        ("p.0?", "p.0?: perhaps no protein"),
        ("c.76A>C", "DNA"),
        ("NM_004006.2:c.76A>C", "DNA"),
        ("p.Arg10Xaa", "X stands for"),
        ("p.Lys2Asx", "B stands for"),
        ("p.Thr2Cys", "position 2 holds K, not T"),
        ("p.Lys2_Ala5del", "position 5 holds Y, not A"),
        ("p.Lys20dup", "position 20 is outside"),
        ("p.Ala4_Lys2dup", "ends before"),
        ("p.Lys2delLys", "adds no residues"),
        ("p.Lys2dupLys", "not a variant"),
        ("p.[Lys2Cys];[Thr3Asp]", "not a variant"),  # on two copies of the gene
        ("p.(Lys2Cys)(;)(Thr3Asp)", "not a variant"),  # unknown whether on the same copy
        ("p.Lys2[10]", "not a variant"),
        ("p.Lys2_Thr3insX[34]", "not a variant"),
        ("p.Lys2_Thr3Cys", "not a variant"),
        ("K2C_T3D:p.Ala4Gly", "not a variant"),
        ("K2C(x):p.Thr3Asp", "not a variant"),
        ("K2C,T3D:p.Ala4Gly", "not a variant"),
        ("p.Foo2Bar", "not a variant"),
        ("LYS2CYS", "not a variant"),
        ("p.", "not a variant"),
        ("p.[]", "not a variant"),
        ("p.[;]", "not a variant"),
        ("K2C:", "not a variant"),
        ("0", "not a variant"),
        ("offset", "not a variant"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(VariantError) as caught:
        mutant(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(("key", "text"), [("frameshift", "p.Arg10fs"), ("unknown_effect", "p.?"), ("dna", "c.76A>C")])
def test_wording(key: str, text: str) -> None:
    with pytest.raises(VariantError) as caught:
        mutant(text)
    check_message(f"notation.{key}", caught.value)


def three(letters: str) -> str:
    """The names that biotite gives."""
    return "".join(ProteinSequence.convert_letter_1to3(letter).title() for letter in letters)


residues = st.text(st.sampled_from(CANONICAL), min_size=1, max_size=4)


@settings(max_examples=100)
@given(st.text(st.sampled_from(CANONICAL), min_size=2, max_size=30), residues, st.booleans(), st.integers(0, 2**32))
def test_changes_written_in_both_ways(wild: str, new: str, predicted: bool, seed: int) -> None:
    rng = random.Random(seed)
    start = rng.randrange(len(wild) - 1)
    end = rng.randrange(start + 1, len(wild))
    first, last = (wild[start], start + 1), (wild[end], end + 1)
    one, many = f"{first[0]}{first[1]}", f"{first[0]}{first[1]}_{last[0]}{last[1]}"
    one_3, many_3 = f"{three(first[0])}{first[1]}", f"{three(first[0])}{first[1]}_{three(last[0])}{last[1]}"
    gap = f"{one}_{wild[start + 1]}{start + 2}"
    gap_3 = f"{one_3}_{three(wild[start + 1])}{start + 2}"
    for plain, hgvs, changed in (
        (f"{one}{new[0]}", f"{one_3}{three(new[0])}", wild[:start] + new[0] + wild[start + 1 :]),
        (f"{many}delins{new}", f"{many_3}delins{three(new)}", wild[:start] + new + wild[end + 1 :]),
        (f"{gap}ins{new}", f"{gap_3}ins{three(new)}", wild[: start + 1] + new + wild[start + 1 :]),
        (f"{many}dup", f"{many_3}dup", wild[: end + 1] + wild[start : end + 1] + wild[end + 1 :]),
        (f"{one}del", f"{one_3}del", wild[:start] + wild[start + 1 :]),
    ):
        assert mutant(plain, wild) == changed
        assert mutant(f"p.({hgvs})" if predicted else f"p.{hgvs}", wild) == changed
        assert mutant(f"NP_1.2:p.{hgvs}", wild) == changed


PIECES = (
    *("p.", "(", ")", "[", "]", ";", ":", "_", "=", "?", "*", "M1", "Met1", "K2", "Lys2", "Ala4", "del", "ins", "dup"),
    *("delins", "fs", "ext", "Ter", "Gly", "W", "X", "-", "0", "99999999999", "NP_1.2", "_wt", " ", "\u00e9", "\n"),
)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
def test_any_pieces_are_a_variant_or_an_error(text: str) -> None:
    try:
        changed = mutant(text)
    except VariantError:
        return
    assert set(changed) <= set(ESM.residues)
