"""Training of LoRA adapters through the native library, beside peft's own way in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import LoadModel, batch_of
from protea import native
from protea.finetune.adapters import insert
from protea.models.encoder import Encoder
from protea.native.products import supports
from protea.train.optim import parameters_to_train
from protea.transforms import native_linear
from protea.transforms.native_adapters import multiply_adapters_natively
from protea.transforms.native_linear import multiply_natively

pytestmark = [
    pytest.mark.skipif(not supports(torch.float32), reason=f"no native library: {native.reason()}"),
    pytest.mark.usefixtures("_whatever_size"),
]


@pytest.fixture
def _whatever_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_linear, "_LEAST", 1)


def adapted(model: Encoder, *, natively: bool, rank: int = 3, **options: Any) -> Encoder:
    """A model with adapters that change its outputs."""
    insert(model, rank=rank, alpha=8, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 10
    if natively:
        multiply_natively(model)
        multiply_adapters_natively(model)
    return model


def states(model: Encoder) -> Tensor:
    """The last hidden states of two sequences."""
    y: Tensor = model(batch_of(model, "MKTAYIAKQRQISFVKSHFSRQ", "G"))
    return y


def results(model: Encoder) -> dict[str, Tensor]:
    """The last hidden states, and the gradients of all adapters, by name."""
    y = states(model)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    named = parameters_to_train(model)
    found = torch.autograd.grad((y * weights).sum(), list(named.values()))
    return {"": y.detach(), **dict(zip(named, found, strict=True))}


def native_adapters(model: Encoder) -> set[bool]:
    return {type(part).__name__.startswith("Native") for part in model.modules() if hasattr(part, "lora_A")}


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("family", ["esm2", "esm1b", "esm1"])
def test_gradients_are_those_of_float64(family: str, rank: int, load_small: LoadModel) -> None:
    """As nearly as peft's way in float32."""

    def peft(dtype: str) -> dict[str, Tensor]:
        return results(adapted(load_small(family, dtype=dtype).module, natively=False, rank=rank))

    model = adapted(load_small(family).module, natively=True, rank=rank)
    assert native_adapters(model) == {True}
    ours, theirs, truth = results(model), peft("float32"), peft("float64")
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - exact).norm() <= 2 * (theirs[name] - exact).norm() + 2e-6 * exact.norm(), name


def test_without_gradients(load_small: LoadModel) -> None:
    model = adapted(load_small("esm2").module, natively=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.inference_mode():
        first = states(model)
    assert first.equal(results(model)[""])
    assert all(value.equal(before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"dora": True}])
def test_dropout_and_dora_stay_as_they_are(options: dict[str, Any], load_small: LoadModel) -> None:
    assert native_adapters(adapted(load_small("esm2").module, natively=True, **options)) == {False}


def test_other_types_are_multiplied_by_pytorch(load_small: LoadModel) -> None:
    model = adapted(load_small("esm2").module, natively=True)
    expected = results(adapted(load_small("esm2").module, natively=False))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = results(model)
    assert narrow[""].sub(expected[""]).norm() > 1e-4 * expected[""].norm()
    wide = results(model.double())
    assert all((wide[name] - truth).norm() <= 1e-4 * truth.norm() for name, truth in expected.items())


def test_an_adapter_that_is_switched_off(load_small: LoadModel) -> None:
    model = adapted(load_small("esm2").module, natively=True)
    plain = states(load_small("esm2").module)
    for part in model.modules():
        if hasattr(part, "lora_A"):
            part.enable_adapters(False)  # type: ignore[operator]
    assert (states(model) - plain).norm() <= 1e-5 * plain.norm()
