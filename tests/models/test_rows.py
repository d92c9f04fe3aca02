"""The last layer computes chosen rows alone, with the numbers and gradients of all rows; packed models, the bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import CONFIGS, SMALL, disturb
from protea.infer.runner import Job, Result, Runner, Wanted
from protea.models.attention import HeadMaps
from protea.models.carp import CARPConfig
from protea.models.encoder import Encoder
from protea.models.esmc import ESMCConfig
from protea.models.family import EncoderConfig
from protea.models.layers import LayerContext, chooses_rows
from protea.models.registry import build, initial_value
from protea.models.transformer import TransformerLayer
from protea.native.products import supports
from protea.packing import PackedBatch, PackedRows, pack
from protea.transforms.cpu import pack_for_cpu
from protea.transforms.mixed import mix
from protea.transforms.native_linear import multiply_natively
from protea.transforms.training import compile_layers, recompute_layers
from toy_family import Toy, ToyConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CHOOSING: dict[str, EncoderConfig] = {**CONFIGS, "esmc": ESMCConfig(**SMALL)}
OTHERS: dict[str, EncoderConfig] = {
    "carp": CARPConfig(num_hidden_layers=3, hidden_size=40, inner_width=20),
    "toy": ToyConfig(num_hidden_layers=3, hidden_size=40, num_attention_heads=3, head_width=8),
}
LENGTHS = [7, 1, 7, 40, 19]
TOKENS = sum(LENGTHS)
CHOICES = {
    "all": range(TOKENS),
    "one": [33],
    "none": [],
    "every seventh": range(0, TOKENS, 7),
    "one sequence": range(15, 25),
    "first and last": [0, 3, 60, TOKENS - 1],
}


def model_of(family: str, **changes: Any) -> Encoder:
    """A model whose parameters are random and all matter."""
    config = replace({**CHOOSING, **OTHERS}[family], **changes)
    model = Toy(config) if isinstance(config, ToyConfig) else build(config)
    state = {name: initial_value(model, name, 5) * 4 for name, _ in model.named_parameters()}
    model.load_state_dict(state | model.stored_buffers, assign=True)
    disturb(model)
    return model


def packed(lengths: Sequence[int] = LENGTHS) -> PackedBatch:
    draw = np.random.default_rng(0)
    return pack([draw.integers(4, 20, length) for length in lengths])


def rows_of(batch: PackedBatch, chosen: Sequence[int]) -> PackedRows:
    return PackedRows.of(np.array(chosen, dtype=np.int64), batch.cu_seqlens)


def gradients(model: Encoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def check_training(model: Encoder, chosen: Sequence[int], tolerance: float, lengths: Sequence[int] = LENGTHS) -> None:
    """The loss and all gradients are those of the computation of all rows."""
    batch = packed(lengths)
    rows, targets = rows_of(batch, chosen), batch.input_ids[list(chosen)]
    results = []
    for hidden in (model(batch)[rows.index], model(batch, rows=rows)):
        assert hidden.shape == (len(chosen), model.config.hidden_size)
        loss = F.cross_entropy(model.head(hidden), targets, reduction="sum")
        results.append((hidden, loss, gradients(model, loss)))
    (all_rows, expected, whole), (hidden, loss, found) = results
    torch.testing.assert_close(hidden, all_rows, rtol=0, atol=tolerance * 10)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert found.keys() == whole.keys()
    for name, gradient in found.items():
        largest = max(1.0, whole[name].abs().max().item())
        assert (gradient - whole[name]).abs().max() <= tolerance * largest, name


# --- numbers and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("family", [*CHOOSING, *OTHERS])
def test_losses_and_gradients_are_those_of_all_rows(family: str, chosen: Sequence[int]) -> None:
    model = model_of(family)
    check_training(model, chosen, 1e-5)
    if family != "toy":  # which adds a bias in float32
        check_training(model.double(), chosen, 1e-12)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    family=st.sampled_from(["esm2", "esm1"]),
    data=st.data(),
)
def test_any_rows_of_any_sequences(lengths: list[int], family: str, data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, sum(lengths) - 1))))
    check_training(model_of(family).double(), chosen, 1e-12, lengths)


@pytest.mark.parametrize("change", [recompute_layers, multiply_natively], ids=["recomputed", "native"])
@pytest.mark.parametrize("choice", ["every seventh", "none"])
def test_changed_for_training(change: Callable[[Encoder], None], choice: str) -> None:
    model = model_of("esm2", hidden_size=64, num_attention_heads=4, intermediate_size=128)
    change(model)
    check_training(model, CHOICES[choice], 1e-5)


def test_under_autocast() -> None:
    model, batch = model_of("esm2"), packed()
    rows = rows_of(batch, CHOICES["every seventh"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(batch, rows=rows), model(batch)[rows.index], rtol=0.02, atol=0.02)


def test_observers_see_the_call_of_all_tokens() -> None:
    model, batch = model_of("esm2"), packed()
    rows = rows_of(batch, [3, 60])
    seen: list[tuple[int, int]] = []
    states: list[int] = []
    with torch.no_grad():
        model(
            batch,
            lambda _, x: states.append(len(x)),
            lambda number, call: seen.append((number, len(call.q))),
            rows=rows,
        )
    assert seen == [(1, TOKENS), (2, TOKENS), (3, TOKENS)]
    assert states == [TOKENS, TOKENS, TOKENS, 2]


def test_only_the_last_of_some_layers_chooses() -> None:
    model, batch = model_of("esm2"), packed()
    rows = rows_of(batch, [3, 60])
    with torch.no_grad():
        x = model(batch, layers=range(2), rows=rows)
        assert len(x) == TOKENS
        assert torch.equal(model(batch, layers=range(2, 3), x=x, rows=rows), model(batch, rows=rows))


# --- layers that do not choose -------------------------------------------------------------------------------------


class Own(TransformerLayer):
    """A layer of its own forward pass, which does not know of rows."""

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        assert context.rows is None
        return super().forward(x, context)


class Further(Own):
    """A layer derived from one that does not know of rows."""


class Mixin:
    """A forward pass for layers, which does not know of rows."""

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        assert context.rows is None
        return TransformerLayer.forward(self, x, context)  # type: ignore[arg-type]


class Mixed(Mixin, TransformerLayer):
    """A layer that inherits its forward pass from elsewhere."""


class Knowing(TransformerLayer):
    """A layer of its own forward pass that says that it knows."""

    chooses_rows = True

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        assert context.rows is not None
        return super().forward(x, context)


class Doubling(nn.Module):
    """A layer of another kind."""

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("kind", "chooses"),
    [(TransformerLayer, True), (Own, False), (Further, False), (Mixed, False), (Knowing, True), (Doubling, False)],
)
def test_a_layer_says_whether_it_chooses(kind: type[nn.Module], chooses: bool) -> None:
    model, batch = model_of("esm2"), packed()
    last: Any = model.layers[2]
    if issubclass(kind, TransformerLayer):
        last.__class__ = kind
    else:
        model.layers[2] = kind()
    assert chooses_rows(model.layers[2]) is chooses
    rows = rows_of(batch, [3, 60])
    with torch.no_grad():
        found = model(batch, rows=rows)
        last.__class__ = TransformerLayer
        torch.testing.assert_close(found, model(batch)[rows.index], rtol=0, atol=1e-5)


# --- bits of packed models -----------------------------------------------------------------------------------------


@cache
def fast(family: str, mixed: bool, width: int = 64) -> Encoder:
    sizes = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 128}
    model = model_of(family, **sizes)
    model.requires_grad_(requires_grad=False)
    if mixed:
        mix(model)
    pack_for_cpu(model)
    return model


needs_library = pytest.mark.skipif(not supports(torch.float32), reason="no native library")


@needs_library
@pytest.mark.parametrize(
    "mixed", [False, pytest.param(True, marks=pytest.mark.skipif(not supports(torch.bfloat16), reason="no bfloat16"))]
)
@pytest.mark.parametrize("family", ["esm2", "esm1b", "esm1nv", "esm1", "esmc"])
@settings(max_examples=10)
@given(lengths=st.lists(st.one_of(st.integers(1, 20), st.integers(30, 300)), min_size=1, max_size=5), data=st.data())
def test_bits_of_a_row_depend_on_that_row(family: str, mixed: bool, lengths: list[int], data: st.DataObject) -> None:
    """The rows may have any order within their sequences, and some occur twice."""
    model, batch = fast(family, mixed), packed(lengths)
    chosen = [
        row
        for start, end in batch.cu_seqlens.spans()
        for row in data.draw(st.lists(st.integers(start, end - 1), max_size=40))
    ]
    rows = rows_of(batch, chosen)
    threads = data.draw(st.sampled_from([1, 2]))
    torch.set_num_threads(threads)
    with torch.inference_mode():
        assert torch.equal(model(batch, rows=rows), model(batch)[rows.index])
    torch.set_num_threads(1)


@needs_library
def test_bits_where_attention_is_that_of_pytorch() -> None:
    """The library has no heads of width 10; PyTorch computes fewer queries in another order."""
    model, batch = fast("esm2", mixed=False, width=40), packed([300, 20, 55])
    rows = rows_of(batch, [3, 7, 50, 301, 310, 330])
    with torch.inference_mode():
        assert torch.equal(model(batch, rows=rows), model(batch)[rows.index])


@needs_library
def test_logits_are_the_same_whatever_shares_the_pack() -> None:
    """Whoever wants last hidden states makes the pack compute all rows; others get the bits that they get alone."""
    model = fast("esm2", mixed=False)
    draw = np.random.default_rng(2)
    tokens = [draw.integers(4, 20, length).astype(np.uint8) for length in (30, 12, 50, 9)]
    maps: list[tuple[int, int]] = []

    def look(number: int, found: HeadMaps) -> None:
        maps.append((number, len(found.q)))

    asked = [Wanted(places=np.array([5, 2])), Wanted(layers=(1,)), Wanted(places=np.array([], dtype=np.int64))]
    asked.append(Wanted(places=np.arange(9), layers=(2,), watch=lambda: look))
    jobs = [Job(ids, wanted, None, "job") for ids, wanted in zip(tokens, asked, strict=True)]
    computed: list[int] = []
    head = model.lm_head
    assert head is not None
    handle = model.layers[2].register_forward_hook(lambda layer, given, x: computed.append(len(x)))
    try:
        alone = [next(Runner(model, 1).run([job])) for job in jobs]
        assert computed == [2, 12, 50, 9]
        together = list(Runner(model, 1000).run(jobs))
        assert computed[4:] == [11]
        last = Job(tokens[1], Wanted(layers=(3,)), None, "last")
        with_last = list(Runner(model, 1000).run([*jobs, last]))
        assert computed[5:] == [113]
    finally:
        handle.remove()
    (of_last,) = Runner(model, 1000).run([last])
    assert with_last[4].states[3, "tokens"].equal(of_last.states[3, "tokens"])
    assert maps == [(1, 9), (2, 9), (3, 9)] * 3

    def bits(result: Result[None]) -> list[Tensor]:
        return result.checked().values

    for expected, *others in zip(alone, together, with_last[:4], strict=True):
        for other in others:
            assert all(a.equal(b) for a, b in zip(bits(other), bits(expected), strict=True))


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns about PyTorch
def test_another_number_of_rows_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although all packs have one size, the last layer takes any number of rows."""
    compiled: list[tuple[int, ...]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        compiled.append(tuple(inputs[0].shape))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: compile_(function, dynamic=dynamic, backend=backend)
    )
    torch.compiler.reset()
    model, batch = model_of("esm2"), packed()
    compile_layers(model, torch.device("cpu"), fixed=True)
    counts = []
    for number in (10, 12, 40, 7):
        rows = rows_of(batch, range(number))
        model(batch, rows=rows).sum().backward()
        counts.append(len(compiled))
    torch.compiler.reset()
    assert counts[0] > 0
    assert counts == counts[:1] * 4
