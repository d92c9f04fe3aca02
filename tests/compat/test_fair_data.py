"""The alphabet, batches and FASTA files of protea.compat.esm beside fair-esm's."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st

import protea.compat.esm as ours
from protea.errors import CapabilityError, FastaError, UnknownResidueError, UsageError
from references import esm

ARCHITECTURES = ["ESM-1", "protein_bert_base", "ESM-1b", "roberta_large"]
ATTRIBUTES = [
    *("standard_toks", "prepend_toks", "append_toks", "prepend_bos", "append_eos", "use_msa", "all_toks"),
    *("tok_to_idx", "unk_idx", "padding_idx", "cls_idx", "mask_idx", "eos_idx", "all_special_tokens"),
    "unique_no_split_tokens",
]
PIECES = st.sampled_from(
    [*"ACDLXBUZO.-acJ*19<>_ \t\n", "<mask>", "<pad>", "<cls>", "<eos>", "<null_1>", "<sep>", "<mas", "JJ", "mask>"]
)


def pair(architecture: str) -> tuple[ours.Alphabet, esm.Alphabet]:
    return ours.Alphabet.from_architecture(architecture), esm.Alphabet.from_architecture(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alphabets_are_fair_esms(architecture: str) -> None:
    mine, theirs = pair(architecture)
    for name in ATTRIBUTES:
        assert getattr(mine, name) == getattr(theirs, name), name
    assert len(mine) == len(theirs)
    assert mine.to_dict() == theirs.to_dict()
    for token in [*theirs.all_toks, "J", "", "<nothing>"]:
        assert mine.get_idx(token) == theirs.get_idx(token)
    assert [mine.get_tok(i) for i in range(len(mine))] == theirs.all_toks


def test_alphabets_of_ones_own() -> None:
    arguments = (list(string.ascii_uppercase), ["<a>", "<pad>", "<eos>", "<unk>"], ["<cls>", "<mask>"], True, True)
    mine, theirs = ours.Alphabet(*arguments), esm.Alphabet(*arguments)
    for name in ATTRIBUTES:
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.encode("PROTEIN<mask>") == theirs.encode("PROTEIN<mask>")


@pytest.mark.parametrize("architecture", ["ESM-1", "ESM-1b"])
@given(pieces=st.lists(PIECES, max_size=12))
def test_texts_become_the_same_tokens(architecture: str, pieces: list[str]) -> None:
    mine, theirs = pair(architecture)
    text = "".join(pieces)
    assert mine.tokenize(text) == theirs.tokenize(text)
    if set(theirs.tokenize(text)) <= set(theirs.all_toks):
        assert mine.encode(text) == theirs.encode(text)
        return
    with pytest.raises(KeyError):
        theirs.encode(text)
    with pytest.raises(UnknownResidueError, match="not in the alphabet"):
        mine.encode(text)


@pytest.mark.parametrize(("text", "advice"), [("MKtay", "upper case"), ("m", "upper case"), ("MK*", "write X")])
def test_the_advice_for_unknown_letters(text: str, advice: str) -> None:
    mine, _ = pair("ESM-1b")
    with pytest.raises(UnknownResidueError, match=advice):
        mine.encode(text)


@pytest.mark.parametrize("architecture", ["ESM-1", "ESM-1b"])
@given(
    texts=st.lists(st.text("ACDEFGHIKLMNPQRSTVWYX ", max_size=20), min_size=1, max_size=5),
    truncation=st.none() | st.integers(1, 9),
)
def test_batches_are_fair_esms(architecture: str, texts: list[str], truncation: int | None) -> None:
    mine, theirs = pair(architecture)
    batch = [(str(number), text) for number, text in enumerate(texts)]
    labels, strs, tokens = mine.get_batch_converter(truncation)(batch)
    expected = theirs.get_batch_converter(truncation)(batch)
    assert (labels, strs) == (expected[0], expected[1])
    assert torch.equal(tokens, expected[2])
    assert tokens.dtype == expected[2].dtype


def test_sequences_of_biopython_come_back() -> None:
    batch = [("a", Seq("MKTA"))]
    mine, theirs = pair("ESM-1b")
    labels, strs, tokens = mine.get_batch_converter()(batch)  # type: ignore[arg-type]
    assert (labels, strs) == (["a"], [batch[0][1]])
    assert torch.equal(tokens, theirs.get_batch_converter()([("a", "MKTA")])[2])


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        ([], ["empty"]),
        (["MKT", "MK"], ["entry 0", "'MKT'"]),
        ([("a", "MKT"), ("b",)], ["entry 1"]),
        ([("a", None)], ["entry 0"]),
        ([("a", b"MKT")], ["entry 0"]),
        ([("a", "MKT"), ("b", "MKJT")], ["'b'", "'J'", "letter 3", "X"]),
        ([("b", "MK<mask>j")], ["'j'", "letter 9"]),
        ([("b", "MKt")], ["upper case"]),
    ],
)
def test_mistakes_in_a_batch_are_named(batch: list[tuple[str, str]], parts: list[str]) -> None:
    convert = ours.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    with pytest.raises((UsageError, UnknownResidueError)) as caught:
        convert(batch)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_fasta_files(tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text(">a first protein|x\nMKTAY\nIAK\n\n>b\nMK<mask>\n>c/1\nM-kT.A\n")
    mine, theirs = ours.FastaBatchedDataset.from_file(path), esm.FastaBatchedDataset.from_file(path)
    assert len(mine) == len(theirs) == 3
    assert [mine[i] for i in range(3)] == [theirs[i] for i in range(3)]
    assert list(torch.utils.data.DataLoader(mine, collate_fn=list)) == [[theirs[i]] for i in range(3)]  # type: ignore[arg-type]
    for options in ({}, {"keep_gaps": False}, {"keep_insertions": False}, {"to_upper": True, "keep_gaps": False}):
        expected = list(esm.data.read_fasta(path, **options))
        assert list(ours.data.read_fasta(path, **options)) == expected
    path.write_text(">a\nMK\n>a\nMT\n")
    with pytest.raises(FastaError, match="'a'"):
        ours.FastaBatchedDataset.from_file(path)
    with pytest.raises(FastaError, match="no such file"):
        ours.FastaBatchedDataset.from_file(tmp_path / "absent.fasta")


@given(
    lengths=st.lists(st.integers(0, 30), max_size=12),
    budget=st.integers(1, 100),
    extra=st.integers(0, 3),
)
def test_batches_of_a_data_set(lengths: list[int], budget: int, extra: int) -> None:
    texts = ["M" * length for length in lengths]
    mine, theirs = ours.FastaBatchedDataset(texts, texts), esm.FastaBatchedDataset(texts, texts)
    assert mine.get_batch_indices(budget, extra) == theirs.get_batch_indices(budget, extra)


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 6, 6)])
def test_functions_for_contacts(shape: tuple[int, ...]) -> None:
    from esm.modules import apc, symmetrize

    x = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.modules.symmetrize(x), symmetrize(x))
    torch.testing.assert_close(ours.modules.apc(x), apc(x.clone()))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ours.Alphabet.from_architecture("msa_transformer"), "MSA Transformer"),
        (lambda: ours.Alphabet.from_architecture("invariant_gvp"), "ESM-IF1"),
        (lambda: ours.Alphabet(["A"], use_msa=True), "MSA Transformer"),
        (lambda: ours.data.MSABatchConverter, "MSA Transformer"),
        (lambda: ours.data.ESMStructuralSplitDataset, "ESMStructuralSplitDataset"),
        (lambda: ours.modules.TransformerLayer, "TransformerLayer"),
        (ours.MSATransformer, "MSA Transformer"),
        (lambda: ours.inverse_folding, "ESM-IF1"),
        (ours.pretrained.esmfold_v1, "ESMFold"),
        (ours.pretrained.esm_msa1b_t12_100M_UR50S, "MSA Transformer"),
        (ours.pretrained.esm_if1_gvp4_t16_142M_UR50, "ESM-IF1"),
        (lambda: ours.pretrained.load_model_and_alphabet("esm_msa1b_t12_100M_UR50S"), "MSA Transformer"),
        (lambda: ours.pretrained.load_model_and_alphabet("weights/esm_if1_gvp4_t16_142M_UR50.pt"), "ESM-IF1"),
        (lambda: ours.pretrained.load_regression_hub("esm2_t6_8M_UR50D"), "load_regression_hub"),
    ],
)
def test_what_is_absent_says_so(make: object, named: str) -> None:
    with pytest.raises(CapabilityError, match=named):
        make()  # type: ignore[operator]


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="ESM-1b"):
        ours.Alphabet.from_architecture("ESM-9")
    for module in (ours, ours.data, ours.modules, ours.pretrained):
        assert not hasattr(module, "nothing_of_the_kind")
