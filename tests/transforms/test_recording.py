"""Models that PyTorch traces, exports or compiles, with the native library and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import LoadModel, batch_of
from protea import native
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.native.products import supports
from protea.packing import PackedBatch
from protea.transforms import native_linear
from protea.transforms.cpu import pack_for_cpu

SEQUENCES = ("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "G", "ACDEFGHIKLMNPQRSTVWY" * 20)

needs_library = pytest.mark.skipif(not supports(torch.float32), reason=f"no native library: {native.reason()}")


class Traceable(nn.Module):
    """A model that takes and gives tensors."""

    def __init__(self, model: Encoder, batch: PackedBatch) -> None:
        super().__init__()
        self.model, self.cu_seqlens = model, batch.cu_seqlens

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.model(PackedBatch(ids, self.cu_seqlens))
        return x


def traced(module: nn.Module, ids: Tensor) -> Any:
    return torch.jit.trace(module, (ids,), check_trace=False)


def exported(module: nn.Module, ids: Tensor) -> Any:
    return torch.export.export(module, (ids,)).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("record", [traced, exported])
@pytest.mark.parametrize("natively", [False, True])
def test_what_pytorch_records_is_pytorchs(
    record: Callable[[nn.Module, Tensor], Any], natively: bool, load_small: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record does not hold what the library does: its results would be memory that nobody has written."""
    model = load_small("esm2").module.eval().requires_grad_(False)
    monkeypatch.setattr(native_linear, "_LEAST", 1)
    if natively:
        native_linear.multiply_natively(model)
    batch, other = batch_of(model, "MKTAYIAK", "ACD"), batch_of(model, "MKWWYIAK", "AYD")
    module = Traceable(model, batch)
    recorded = record(module, batch.input_ids)
    for given in (batch, other):
        assert (recorded(given.input_ids) - module(given.input_ids)).abs().max() < 1e-5


@needs_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("record", [traced, exported])
def test_a_packed_model_cannot_be_recorded(record: Callable[[nn.Module, Tensor], Any], load_small: LoadModel) -> None:
    model = load_small("esm2").module
    pack_for_cpu(model)
    batch = batch_of(model, "MKTAYIAK")
    with torch.no_grad(), pytest.raises(UsageError, match=r"cannot record .*trainable=True"):
        record(Traceable(model, batch), batch.input_ids)


@needs_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [False, True])
def test_tensors_without_memory_are_refused(packed: bool, load_small: LoadModel) -> None:
    model = load_small("esm2").module
    if packed:
        pack_for_cpu(model)
    batch = batch_of(model, "MKTAYIAK")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), pytest.raises(TypeError, match="FakeTensor"):
        model(batch)


@needs_library
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_model_gives_the_same(packed: bool, load_small: LoadModel) -> None:
    model = load_small("esm2").module
    if packed:
        pack_for_cpu(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for sequences in (SEQUENCES[:1], SEQUENCES[:3]):
            batch = batch_of(model, *sequences)
            assert (compiled(batch) - model(batch)).abs().max() < 1e-5
