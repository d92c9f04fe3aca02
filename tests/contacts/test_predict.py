"""Contacts and attention beside transformers and Meta's package, with random regressions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import protea
from conftest import LoadModel
from protea.contacts import predict as contacts
from protea.errors import CapabilityError, SequenceTooLongError, UnknownResidueError, UsageError
from protea.models.attention import HeadMaps
from references import load_transformers, to_fair_esm

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQX", "MKTAYIA", "M" * 40]


@pytest.fixture
def load(load_small: LoadModel, one_thread: None) -> Callable[[str], protea.LanguageModel]:
    """A small model whose regression weighs every head, and whose attention is far from even."""

    def sharp(name: str) -> protea.LanguageModel:
        model = load_small(name)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for layer in model.module.layers:
                layer.self_attn.q_proj.weight.mul_(8)
                layer.self_attn.k_proj.weight.mul_(8)
            head = model.module.contact_head
            if head is not None:
                head.regression.weight.copy_(torch.randn(head.regression.weight.shape, generator=generator) * 20)
                head.regression.bias.fill_(-0.5)
        return model

    return sharp


def test_transformers_agrees(load: Callable[[str], protea.LanguageModel], tmp_path: Path) -> None:
    model = load("esm2")
    model.save(tmp_path / "model")
    theirs = load_transformers(tmp_path / "model")
    for sequence in SEQUENCES:
        ids = torch.tensor([[0, *model.alphabet.encode(sequence).tolist(), 2]])
        with torch.inference_mode():
            expected = theirs.esm.predict_contacts(ids, torch.ones_like(ids))[0].numpy()
        found = model.contacts(sequence)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert float(expected.std()) > 0.01  # or nothing was compared


@pytest.mark.parametrize("name", ["esm2", "esm1b"])
def test_metas_package_agrees(load: Callable[[str], protea.LanguageModel], name: str) -> None:
    model = load(name)
    theirs = to_fair_esm(model.module)
    for sequence in SEQUENCES:
        ids = torch.tensor([[0, *model.alphabet.encode(sequence).tolist(), 2]])
        with torch.inference_mode():
            expected = theirs(ids, return_contacts=True)["contacts"][0].numpy()
        np.testing.assert_allclose(model.contacts(sequence), expected, rtol=0, atol=2e-5)


def test_maps_are_symmetric_probabilities(load: Callable[[str], protea.LanguageModel]) -> None:
    model = load("esm2")
    for sequence in SEQUENCES:
        probabilities = model.contacts(sequence)
        np.testing.assert_allclose(probabilities, probabilities.T, rtol=0, atol=1e-6)
        assert (probabilities >= 0).all()
        assert (probabilities <= 1).all()


def corrected(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """``[H, L, L]`` by the definition, in float64."""
    both = maps.astype(np.float64) + maps.transpose(0, 2, 1)
    rows, columns = both.sum(2, keepdims=True), both.sum(1, keepdims=True)
    return np.asarray(both - rows * columns / both.sum((1, 2), keepdims=True))


@pytest.mark.parametrize("name", ["esm2", "esm1nv"])
def test_features_are_what_the_regression_weighs(load: Callable[[str], protea.LanguageModel], name: str) -> None:
    model = load(name)
    sequence = SEQUENCES[0]
    maps = model.attention(sequence, layers=[1, 2, 3])[:, :, 1:-1, 1:-1]
    expected = np.concatenate([corrected(layer) for layer in maps])
    pairs = torch.triu_indices(len(sequence), len(sequence), 6)
    found = contacts.features(model.module, model.alphabet.encode(sequence), (pairs[0], pairs[1]))
    assert found.shape == (pairs.shape[1], 15)
    np.testing.assert_allclose(found, expected[:, pairs[0], pairs[1]].T, rtol=0, atol=1e-6)
    head = model.module.contact_head
    if head is not None:
        logits = found @ head.regression.weight[0].detach().numpy() + head.regression.bias.item()
        ours = model.contacts(sequence)[pairs[0], pairs[1]]
        np.testing.assert_allclose(ours, 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-5)


def test_attention_is_that_of_transformers(load: Callable[[str], protea.LanguageModel], tmp_path: Path) -> None:
    model = load("esm2")
    model.save(tmp_path / "model")
    theirs = load_transformers(tmp_path / "model")
    ids = torch.tensor([[0, *model.alphabet.encode(SEQUENCES[0]).tolist(), 2]])
    with torch.inference_mode():
        expected = theirs(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
    found = model.attention(SEQUENCES[0], layers=[3, 1])
    assert found.shape == (2, 5, 36, 36)
    np.testing.assert_allclose(found[0], expected[2][0].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[0][0].numpy(), rtol=0, atol=1e-5)
    some = model.attention(SEQUENCES[0], layers=[-1], heads=[4, 0])
    np.testing.assert_array_equal(some[0], found[0][[4, 0]])
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_a_map_is_computed_when_the_one_before_is_gone(
    load: Callable[[str], protea.LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none that nobody asked for."""
    import weakref

    model = load("esm2")
    made: list[weakref.ref[torch.Tensor]] = []
    compute = HeadMaps.__getitem__

    def watched(self: HeadMaps, head: int) -> torch.Tensor:
        # The loop that asks for this one still holds the last.
        assert sum(one() is not None for one in made) <= 1
        found = compute(self, head)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(HeadMaps, "__getitem__", watched)
    model.contacts(SEQUENCES[0])
    assert len(made) == 3 * 5
    made.clear()
    model.attention(SEQUENCES[0], layers=[2, -2, 1], heads=[4])
    assert len(made) == 3


def test_what_is_wrong_is_said(load: Callable[[str], protea.LanguageModel]) -> None:
    model = load("esm2")
    for layers, heads in (([0], None), ([4], None), ([-4], None), ([], None), ([1], [5]), ([1], [-1]), ([1], [])):
        with pytest.raises(UsageError, match=r"attention is in layers 1 to 3|heads are 0 to 4"):
            model.attention("MKT", layers=layers, heads=heads)
    with pytest.raises(UsageError, match=r"or -3 to -1; got \[-4\]"):
        model.attention("MKT", layers=[-4])
    with pytest.raises(UnknownResidueError):
        model.contacts("MJ")
    with pytest.raises(UsageError, match="at least one residue"):
        model.contacts("")
    with pytest.raises(UsageError, match="list"):
        model.contacts(["MKT"])  # type: ignore[arg-type]
    with pytest.raises(CapabilityError, match="no contacts"):
        load("esm1nv").contacts("MKT")
    with pytest.raises(SequenceTooLongError):
        load("esm1b").contacts("M" * 1023)
