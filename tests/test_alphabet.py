"""Vocabularies compared with the published ones; encoding compared with a slow look-up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from messages import check_message
from protea.alphabet import ESM, ESM1NV, Alphabet
from protea.errors import UnknownResidueError

ALPHABETS = [ESM, ESM1NV]


def test_esm_tokens_are_metas() -> None:
    from references import esm

    theirs = esm.data.Alphabet.from_architecture("ESM-1b")
    assert list(ESM.tokens) == theirs.all_toks
    assert (ESM.bos, ESM.pad, ESM.eos, ESM.unk, ESM.mask) == (
        theirs.cls_idx,
        theirs.padding_idx,
        theirs.eos_idx,
        theirs.unk_idx,
        theirs.mask_idx,
    )


def test_esm1nv_tokens_are_nvidias() -> None:
    """As BioNeMo 1's SentencePiece model numbers them."""
    published = "L5 A6 S7 G8 V9 E10 R11 T12 D13 I14 P15 K16 N17 F18 Q19 Y20 H21 M22 C23 W24 X25 B26 Z27 U28 O29"
    assert ESM1NV.tokens[:5] == ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
    assert {f"{token}{number}" for number, token in enumerate(ESM1NV.tokens) if number > 4} == set(published.split())
    assert (ESM1NV.unk, ESM1NV.bos, ESM1NV.eos, ESM1NV.pad, ESM1NV.mask) == (0, 1, 2, 3, 4)
    assert len(ESM1NV) == 30


@pytest.mark.parametrize("alphabet", ALPHABETS, ids=lambda alphabet: alphabet.name)
@given(data=st.data())
def test_encode_is_a_look_up_and_decode_its_inverse(alphabet: Alphabet, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.sampled_from([*alphabet.residues, "<mask>"])))
    ids = alphabet.encode("".join(tokens))
    assert ids.dtype == np.uint8
    assert ids.tolist() == [alphabet.tokens.index(token) for token in tokens]
    assert alphabet.decode(ids) == "".join(tokens)


@pytest.mark.parametrize("alphabet", ALPHABETS, ids=lambda alphabet: alphabet.name)
@given(text=st.text())
@settings(max_examples=40)
def test_every_text_is_encoded_fully_or_refused(alphabet: Alphabet, text: str) -> None:
    assume("<mask>" not in text)
    bad = next((i for i, letter in enumerate(text) if letter not in alphabet.residues), None)
    if bad is None:
        assert alphabet.decode(alphabet.encode(text)) == text
        return
    with pytest.raises(UnknownResidueError) as caught:
        alphabet.encode(text)
    assert f" {text[bad]!r} at position {bad + 1} " in str(caught.value)


@pytest.mark.parametrize(
    ("sequence", "position", "key"),
    [
        ("MKt", 3, "lower_case"),
        ("MK*", 3, "stop"),
        ("MJK", 2, "letter"),
        ("M K", 2, None),
        ("MK€", 3, None),
        ("M<pad>K", 2, None),
        ("M<mask>K<mask>1", 5, None),
    ],
)
def test_message_names_letter_position_and_fix(sequence: str, position: int, key: str | None) -> None:
    with pytest.raises(UnknownResidueError, match=f" {position} ") as caught:
        ESM.encode(sequence)
    if key is not None:
        check_message(f"alphabet.{key}", caught.value)


def test_decode_refuses_ids_outside() -> None:
    with pytest.raises(IndexError):
        ESM.decode(np.array([4, 33]))
    assert ESM.decode(np.array([0, 20, 2])) == "<cls>M<eos>"
    assert ESM.decode(np.array([], dtype=np.int64)) == ""
