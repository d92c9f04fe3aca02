"""Training through the native library's products, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import CONFIGS, LoadModel, batch_of
from protea import native
from protea.models.encoder import Encoder
from protea.native.products import supports
from protea.transforms import native_linear
from protea.transforms.native_linear import multiply_natively
from protea.transforms.native_products import NativeLinear

needs_library = pytest.mark.skipif(not supports(torch.float32), reason=f"no native library: {native.reason()}")


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The result, and the gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@needs_library
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (100, 64), (65, 67), (1280, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_float64(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    for rows in (1, 31, 150):
        layer = nn.Linear(inputs, outputs, bias=bias)
        x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
        ways = [x, torch.randn(inputs, rows).T, torch.randn(rows, inputs + 3)[:, 3:]]
        for given in ways:
            double = nn.Linear(inputs, outputs, bias=bias).double()
            double.load_state_dict(layer.state_dict())
            exact = gradients(double, given.double(), dy.double())
            layer.__class__ = NativeLinear
            for ours, truth in zip(gradients(layer, given, dy), exact, strict=True):
                assert ours.dtype == torch.float32
                assert (ours - truth).norm() <= 1e-6 * truth.norm()


@needs_library
def test_what_the_library_does_not_multiply_is_pytorchs() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    x = torch.randn(3, 2, 64)
    expected, narrow = layer(x), nn.functional.linear(x.half(), layer.weight.half(), layer.bias.half())
    layer.__class__ = NativeLinear
    assert layer(x).equal(expected)
    with torch.autocast("cpu", torch.float16):
        assert layer(x[0]).equal(narrow[0])
    assert layer.double()(x.double()).dtype == torch.float64


@needs_library
def test_only_what_has_to_be_computed_is() -> None:
    """Frozen weights, and inputs without gradients."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(5, 64)
    layer.__class__ = NativeLinear
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad
    with torch.inference_mode():
        layer(x)


def loss(model: Encoder) -> Tensor:
    return model(batch_of(model, "MKTAYIAKQRQISFVKSHFSRQ", "G")).square().mean()


@needs_library
@pytest.mark.parametrize("family", CONFIGS)
def test_a_whole_model(family: str, load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_linear, "_LEAST", 1)
    results = []
    for dtype, natively in (("float32", True), ("float64", False)):
        model = load_small(family, dtype=dtype).module.requires_grad_(True)
        names = [name for name, _ in model.named_parameters()]
        if natively:
            multiply_natively(model)
            linears = [part for part in model.layers.modules() if isinstance(part, nn.Linear)]
            assert {type(part) for part in linears} == {NativeLinear}
            assert [name for name, _ in model.named_parameters()] == names
        loss(model).backward()
        results.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
    ours, truth = results
    assert (ours - truth).norm() <= 1e-5 * truth.norm()


def test_models_that_stay(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers, and every layer without the library."""
    for least in (64, 1):
        model = load_small("esm2").module
        multiply_natively(model)
        assert not any(isinstance(part, NativeLinear) for part in model.modules() if min_size(part) < least)
        monkeypatch.setattr(native_linear, "supports", lambda dtype: False)
        monkeypatch.setattr(native_linear, "_LEAST", 1)
    assert not any(isinstance(part, NativeLinear) for part in model.modules())


def min_size(part: nn.Module) -> int:
    return min(part.in_features, part.out_features) if isinstance(part, nn.Linear) else 0
