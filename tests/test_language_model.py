"""The Python interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import protea
from conftest import CONFIGS, LoadModel
from messages import check_message
from protea.errors import CapabilityError, ProteaWarning, SequenceTooLongError, UnknownResidueError, UsageError
from protea.packing import pack
from references import run_float64

LONG_FAMILIES = ["esm1b", "esm1v", "esm2"]
SEQUENCES = ["MKTAYIAKQR", "G", "ACDEFGHIKLMNPQRSTVWY" * 5]


def test_residue_embeddings_have_a_row_a_residue(load_small: LoadModel) -> None:
    model = load_small("esm2")
    arrays = model.embed(SEQUENCES)
    assert [array.shape for array in arrays] == [(10, 40), (1, 40), (100, 40)]
    for sequence, array in zip(SEQUENCES, arrays, strict=True):
        assert array.dtype == np.float32
        ids = pack([model.alphabet.frame.around(model.alphabet.encode(sequence))]).input_ids
        states, _ = run_float64(model.module, ids)
        np.testing.assert_allclose(array, states[-1][1:-1].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [12, 10_000])
def test_the_budget_changes_nothing_but_memory(load_small: LoadModel, budget: int) -> None:
    model = load_small("esm2")
    for a, b in zip(model.embed(SEQUENCES), model.embed(SEQUENCES, token_budget=budget), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_poolings_see_residues_only(load_small: LoadModel) -> None:
    model = load_small("esm2")
    residues = model.embed(SEQUENCES)
    for pool, function in (("mean", np.mean), ("max", np.max), ("std", np.std)):
        expected = np.stack([function(array, axis=0) for array in residues])
        pooled = model.embed(SEQUENCES, pool=pool)
        assert pooled.shape == (3, 40)
        np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    assert not model.embed(["G"], pool="std").any()
    bos = model.embed(SEQUENCES, pool="bos")
    ids = pack([model.alphabet.frame.around(model.alphabet.encode(SEQUENCES[0]))]).input_ids
    np.testing.assert_allclose(bos[0], run_float64(model.module, ids)[0][-1][0].numpy(), rtol=1e-4, atol=1e-5)


def test_layers_make_a_first_axis(load_small: LoadModel) -> None:
    model = load_small("esm2")
    arrays = model.embed(SEQUENCES, layers=[0, 2, -1])
    assert [array.shape for array in arrays] == [(3, 10, 40), (3, 1, 40), (3, 100, 40)]
    np.testing.assert_array_equal(arrays[0][2], model.embed(SEQUENCES)[0])
    np.testing.assert_array_equal(arrays[0][1], model.embed(SEQUENCES, layers=[-2])[0][0])
    pooled = model.embed(SEQUENCES, layers=[0, -1], pool="mean")
    assert pooled.shape == (3, 2, 40)
    np.testing.assert_allclose(pooled[1, 0], arrays[1][0, 0], rtol=1e-6)
    ids = pack([model.alphabet.frame.around(model.alphabet.encode(SEQUENCES[0]))]).input_ids
    states, _ = run_float64(model.module, ids)
    for got, layer in zip(arrays[0], (0, 2, 3), strict=True):
        np.testing.assert_allclose(got, states[layer][1:-1].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["esm1nv", "esm2nv", *(pytest.param(n, marks=pytest.mark.long) for n in LONG_FAMILIES)]
)
def test_logits_have_a_column_a_token_of_the_alphabet(load_small: LoadModel, name: str) -> None:
    model = load_small(name)
    values = model.logits(["MKT<mask>", "G"])
    assert [value.shape for value in values] == [(4, len(model.alphabet)), (1, len(model.alphabet))]
    assert values[0].dtype == np.float32
    if name != "esm1nv":
        ids = pack([model.alphabet.frame.around(model.alphabet.encode("MKT<mask>"))]).input_ids
        expected = run_float64(model.module, ids)[1][1:-1, :33].numpy()
        np.testing.assert_allclose(values[0], expected, rtol=1e-4, atol=1e-5)


def test_nothing_in_nothing_out(load_small: LoadModel) -> None:
    model = load_small("esm2")
    assert model.embed([]) == []
    assert model.logits([]) == []
    assert model.embed([], pool="mean").shape == (0, 40)
    assert model.embed([], pool="mean", layers=[0, 1]).shape == (0, 2, 40)


def test_a_long_sequence_runs_whole_or_is_truncated_aloud(load_small: LoadModel) -> None:
    rotary, learned = load_small("esm2"), load_small("esm1nv")
    long = "A" * 1030
    assert rotary.embed([long], long="full")[0].shape == (1030, 40)
    with pytest.warns(ProteaWarning, match=r"^sequence 1 .*1022 of 1030"):
        arrays = rotary.embed(["M", long], long="truncate")
    np.testing.assert_allclose(arrays[1], rotary.embed(["A" * 1022])[0], atol=1e-5)
    with pytest.raises(SequenceTooLongError, match=r"^sequence 0: 1030 .* 1022 .*ESM-2 .*full"):
        rotary.embed([long], long="error")
    with pytest.raises(SequenceTooLongError, match=r"^sequence 1: 511 .* 510 .*ESM-1nv (?!.*full)"):
        learned.embed(["M", "A" * 511], long="full")
    assert learned.embed(["A" * 510])[0].shape == (510, 40)


def test_wrong_arguments(load_small: LoadModel) -> None:
    model = load_small("esm2")
    with pytest.raises(UnknownResidueError, match=r"^sequence 1: .*'J' at position 2") as unknown:
        model.embed(["MK", "MJ"])
    check_message("language_model.residue", unknown.value)
    with pytest.raises(UsageError) as empty:
        model.embed(["M", ""])
    check_message("language_model.empty", empty.value)
    with pytest.raises(UsageError, match=r"'median'.*mean, max, std, bos"):
        model.embed(["M"], pool="median")
    with pytest.raises(UsageError, match=r" 4 .*0 to 3.*-4 to -1"):
        model.embed(["M"], layers=[0, 4])
    with pytest.raises(UsageError, match=r"\[3, -1\]"):
        model.embed(["M"], layers=[3, -1])
    with pytest.raises(UsageError, match=r"\[\]"):
        model.embed(["M"], layers=[])
    with pytest.raises(UsageError, match=r"'cut'.*truncate, window, full, error"):
        model.embed(["M"], long="cut")
    with pytest.raises(UsageError) as budget:
        model.embed(["M"], token_budget=0)
    check_message("language_model.budget", budget.value)
    model.module.lm_head = None
    with pytest.raises(CapabilityError, match="logits"):
        model.logits(["M"])


def test_it_tells_what_it_is(load_small: LoadModel) -> None:
    model = load_small("esm1b", dtype="bfloat16")
    assert "ESM-1b, 3 layers, width 40, bfloat16, cpu" in repr(model)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.bfloat16
    assert model.capabilities == {"attention", "contacts", "logits"}
    assert model.config == CONFIGS["esm1b"]
    assert model.embed(["MKT"])[0].dtype == np.float32


def test_saving(load_small: LoadModel, tmp_path: object) -> None:
    model = load_small("esm1v")
    model.save(f"{tmp_path}/saved")
    again = protea.load(f"{tmp_path}/saved", device="cpu", trainable=True)
    np.testing.assert_array_equal(again.embed(["MKT"])[0], model.embed(["MKT"])[0])


def test_generators_are_read_once(load_small: LoadModel) -> None:
    model = load_small("esm2")
    sequences = ["MKTAYIAKQR" * 5, "ACDEFGHIKL" * 5]
    assert model.perplexity(text for text in sequences) == model.perplexity(sequences)
    variants = ["M1A", "K2A"]
    np.testing.assert_array_equal(
        model.score(sequences[0], (text for text in variants)), model.score(sequences[0], variants)
    )


def test_perplexity_has_no_windows(load_small: LoadModel) -> None:
    with pytest.raises(UsageError, match="'window'"):
        load_small("esm2").perplexity(["MKTAYIAKQR" * 200], long="window")
