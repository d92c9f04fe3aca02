"""Compilation and recomputation of layers, including a layer that no family has."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CONFIGS
from messages import check_message
from protea.errors import DeviceError
from protea.models.encoder import Encoder
from protea.models.layers import LayerContext
from protea.models.registry import build, initial_value
from protea.packing import PackedBatch, pack
from protea.transforms.training import compile_layers, recompute_layers


class Noisy(nn.Module):
    """A layer without attention or token-wise methods that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 40)
        self.calls = 0

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        self.calls += 1
        assert context.cu_seqlens.max_length == 10
        return x + nn.functional.dropout(self.linear(x).tanh(), 0.5)


def mixed(seed: int = 0) -> Encoder:
    """ESM-2 whose second layer is of another kind."""
    model = build(replace(CONFIGS["esm2"], num_hidden_layers=2))
    weights = {name: initial_value(model, name, seed) for name, _ in model.named_parameters()}
    model.load_state_dict(weights | model.stored_buffers, assign=True)
    torch.manual_seed(seed)
    model.layers.insert(1, Noisy())
    return model


def batch() -> PackedBatch:
    frame = CONFIGS["esm2"].alphabet.frame
    return pack([frame.around(CONFIGS["esm2"].alphabet.encode("MKTAYIAK"))])


def gradients(model: Encoder) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model(batch()).square().mean().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_recomputing_any_layer_changes_nothing() -> None:
    """The second pass draws the same random numbers."""
    plain, again = mixed(), mixed()
    recompute_layers(again)
    expected, recomputed = gradients(plain), gradients(again)
    assert recomputed.keys() == expected.keys()
    assert "layers.1.linear.weight" in recomputed
    assert all(torch.equal(gradient, expected[name]) for name, gradient in recomputed.items())
    assert (plain.layers[1].calls, again.layers[1].calls) == (1, 2)


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns about PyTorch
def test_only_tokenwise_methods_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_(function: Any, *, dynamic: bool) -> Any:
        assert dynamic
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    model = mixed()
    expected = [method for layer in (model.layers[0], model.layers[2]) for method in (layer.before, layer.after)]
    compile_layers(model, torch.device("cpu"))
    assert compiled == expected


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    from torch._inductor import config

    # Not by monkeypatch, which would remove the setting permanently.
    with (
        config.patch({"cpp.cxx": ("/nowhere/c++",)}),
        pytest.raises(DeviceError) as caught,
    ):
        compile_layers(mixed(), torch.device("cpu"))
    check_message("transforms.no_compiler", caught.value)
