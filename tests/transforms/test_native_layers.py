"""Parts of layers that train in one piece through the native library, beside float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import LoadModel, batch_of
from protea import native
from protea.models.encoder import Encoder
from protea.models.layers import rotary_angles, rotate
from protea.models.transformer import SelfAttention
from protea.native import rotation
from protea.native.products import Packed, linear, supports
from protea.transforms import native_layers, native_linear
from protea.transforms.native_layers import NativeAttention, NativeLayer
from protea.transforms.native_products import NativeLinear

needs_library = pytest.mark.skipif(not supports(torch.float32), reason=f"no native library: {native.reason()}")
SEQUENCES = ("MKTAYIAKQRQISFVKSHFSRQ", "G", "MKLVEEVA")
TYPES = [torch.float32, torch.bfloat16]


def natively(model: Encoder, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    monkeypatch.setattr(native_linear, "_LEAST", 1)
    native_linear.multiply_natively(model)
    return model


def gradients(model: Encoder, kind: torch.dtype) -> dict[str, Tensor]:
    """Gradients by the names of parameters, of products in a type."""
    batch = batch_of(model, *SEQUENCES)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        loss = model(batch).double().square().mean()
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@needs_library
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("width", [8, 16, 24, 40])
def test_rotation_is_that_of_float64(kind: torch.dtype, width: int) -> None:
    if not supports(kind):
        pytest.skip(f"no {kind}")
    torch.manual_seed(0)
    for rows in (0, 1, 300):
        x = torch.randn(rows, 3, 5, width).to(kind)[:, 1]
        angles = rotary_angles(torch.arange(rows), torch.rand(width // 2))
        exact = rotate(x.double() * 0.3, *(a.double() for a in angles))
        error = 1e-6 if kind == torch.float32 else 2**-8
        y = rotation.rotate(x, *angles, 0.3)
        assert y.dtype == kind
        assert ((y.double() - exact).abs() <= error * (1 + exact.abs())).all()
        back = rotation.rotate(exact.to(kind), *angles, back=True)
        assert ((back.double() - 0.3 * x.double()).abs() <= 2 * error * (1 + exact.abs().amax() if rows else 1)).all()
        if rows:
            x[0, 0, 0] = torch.nan
            rotation.rotate(x, *angles, out=x)
            assert x[0, 0].isnan().sum() == 2
            assert not x[1:].isnan().any()


@needs_library
def test_the_slope_of_gelu_is_that_of_float64() -> None:
    x = torch.cat((torch.linspace(-45, 45, 4001), torch.linspace(-3, 3, 4001), torch.tensor([3e38, -3e38, 0.0])))
    double = x.double().requires_grad_()
    F.gelu(double).sum().backward()
    one, inner = torch.ones(len(x), 1), x[:, None].contiguous()
    kept = torch.empty_like(inner)
    y = linear(inner, Packed.of(torch.ones(1, 1)), activation="gelu", before=kept)
    assert kept.equal(inner)
    assert (y[:-3, 0] - F.gelu(double)[:-3]).abs().max() <= 3e-6
    slope = linear(one, Packed.of(torch.ones(1, 1)), activation="gelu_slope", before=inner)[:, 0]
    assert double.grad is not None
    assert (slope[:-3] - double.grad[:-3]).abs().max() <= 3e-7
    assert slope[-3:].round(decimals=6).tolist() == [1.0, 0.0, 0.5]
    nan = linear(one[:1], Packed.of(torch.ones(1, 1)), activation="gelu_slope", before=torch.full((1, 1), torch.nan))
    assert nan.isnan().all()


@needs_library
@pytest.mark.parametrize("family", ["esm2", "esm1b"])
@pytest.mark.parametrize("kind", TYPES)
def test_gradients_are_those_of_float64(
    family: str, kind: torch.dtype, load_small: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supports(kind):
        pytest.skip(f"no {kind}")
    exact = gradients(load_small(family, dtype="float64").module.requires_grad_(True), torch.float32)
    plain = gradients(load_small(family).module.requires_grad_(True), kind)
    ours = gradients(natively(load_small(family).module.requires_grad_(True), monkeypatch), kind)
    assert ours.keys() == exact.keys()
    if kind == torch.float32:
        for name, truth in exact.items():
            if truth.norm() > 1e-9:  # those of keys' biases are 0
                assert (ours[name] - truth).norm() <= 2e-5 * truth.norm(), name
    else:
        errors = [
            torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm() for found in (ours, plain)
        ]
        assert errors[0] <= 1.2 * errors[1]


@needs_library
def test_parts_are_computed_in_one_piece_only_where_nothing_else_sees_them(
    load_small: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = natively(load_small("esm2").module.requires_grad_(True), monkeypatch)
    assert {type(layer) for layer in model.layers} == {NativeLayer}
    assert {type(layer.self_attn) for layer in model.layers} == {NativeAttention}
    calls: list[str] = []
    for kind in ("_Projection", "_FeedForward"):
        function = getattr(native_layers, kind)
        monkeypatch.setattr(function, "apply", lambda *a, k=kind, f=function.apply: (calls.append(k), f(*a))[1])
    expected = model(batch_of(model, *SEQUENCES)).detach()
    layers = len(model.layers)
    assert sorted(calls) == ["_FeedForward"] * layers + ["_Projection"] * layers
    calls.clear()
    changed: Any = copy.deepcopy(model)
    seen: list[Tensor] = []
    changed.layers[0].fc1.register_forward_hook(lambda part, given, y: seen.append(y))
    changed.layers[0].self_attn.k_proj = nn.Sequential(changed.layers[0].self_attn.k_proj)
    again = changed(batch_of(changed, *SEQUENCES)).detach()
    assert len(calls) == 2 * layers - 2
    assert len(seen) == 1
    assert (again - expected).norm() <= 1e-5 * expected.norm()
    calls.clear()
    other: Any = copy.deepcopy(model)
    own = other.layers[0].fc1.forward
    other.layers[0].fc1.forward = lambda x: (seen.append(x), own(x))[1]
    other(batch_of(other, *SEQUENCES))
    assert len(calls) == 2 * layers - 1
    assert len(seen) == 2
    calls.clear()
    with nn.modules.module.register_module_forward_hook(lambda part, given, y: None):
        model(batch_of(model, *SEQUENCES))
    assert not calls


@needs_library
@pytest.mark.parametrize("kind", TYPES)
def test_frozen_parameters_get_no_gradients(kind: torch.dtype) -> None:
    if not supports(kind):
        pytest.skip(f"no {kind}")
    torch.manual_seed(0)
    attention = SelfAttention(64, 4, 16)
    attention.__class__ = NativeAttention
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        part.__class__ = NativeLinear
    attention.requires_grad_(False)
    attention.k_proj.weight.requires_grad_()
    attention.v_proj.bias.requires_grad_()
    x, angles = torch.randn(9, 64), rotary_angles(torch.arange(9), torch.rand(8))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        q, k, v = attention.project(x, angles)
    assert {y.dtype for y in (q, k, v)} == {kind}
    (k.sum() + v.sum()).backward()
    assert [name for name, p in attention.named_parameters() if p.grad is not None] == ["k_proj.weight", "v_proj.bias"]
    assert attention.v_proj.bias.grad is not None
    assert (attention.v_proj.bias.grad == 9).all()
