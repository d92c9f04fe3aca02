"""The transform for CPUs keeps the numbers, and refuses what a packed model cannot do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import protea
from conftest import CONFIGS, LoadModel, batch_of, disturb
from messages import check_message
from protea import native
from protea.checkpoints import hf
from protea.checkpoints.checkpoint import like
from protea.device import has_matrix_unit
from protea.errors import UsageError
from protea.models.attention import AttentionCall
from protea.models.encoder import Encoder
from protea.models.layers import LayerContext, rotary_angles
from protea.models.registry import build, initial_value
from protea.models.transformer import SelfAttention, TransformerLayer
from protea.native.products import supports
from protea.transforms import cpu, native_linear
from protea.transforms.cpu import FusedSelfAttention, PackedLinear, is_packed, pack_for_cpu, unpacked
from protea.transforms.mixed import mix

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "G", "ACDEFGHIKLMNPQRSTVWY" * 20, "MK<mask>TXBUZO", "ACDEF" * 3]

needs_library = pytest.mark.skipif(not supports(torch.float32), reason=f"no native library: {native.reason()}")
needs_bfloat16 = pytest.mark.skipif(
    not supports(torch.bfloat16), reason="the native library does not multiply bfloat16 on this processor"
)
takes_bfloat16 = pytest.mark.skipif(
    has_matrix_unit() or not supports(torch.bfloat16), reason="this processor leaves bfloat16 to PyTorch"
)
PRECISIONS = [
    "float32",
    pytest.param("bf16-mixed", marks=needs_bfloat16),
    pytest.param("bfloat16", marks=takes_bfloat16),
]


def small(family: str = "esm2", *, precision: str = "float32", **shape: int) -> Encoder:
    """A model with random weights, also in biases and norms."""
    model = build(replace(CONFIGS[family], **shape))
    weights = {name: initial_value(model, name, 0) for name, _ in model.named_parameters()}
    model.load_state_dict(weights | model.stored_buffers, assign=True)
    disturb(model)
    convert(model, precision)
    return model


def convert(model: Encoder, precision: str) -> None:
    """Let a model in float32 compute in a precision."""
    mix(model) if precision == "bf16-mixed" else model.to(getattr(torch, precision))


def freeze(model: Encoder, *parts: str) -> Encoder:
    """The model, with the parameters frozen whose names begin so."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(parts))
    return model


# --- numbers -----------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("family", CONFIGS)
def test_same_numbers_in_float32(load_small: LoadModel, family: str) -> None:
    plain, packed = load_small(family), load_small(family)
    pack_for_cpu(packed.module)
    assert isinstance(packed.module.layers[0].self_attn, FusedSelfAttention)
    layers = [0, 1, 2, 3]
    for ours, theirs in zip(packed.embed(SEQUENCES, layers=layers), plain.embed(SEQUENCES, layers=layers), strict=True):
        assert np.abs(ours - theirs).max() <= 5e-6 * max(1, np.abs(theirs).max())
    for ours, theirs in zip(packed.logits(SEQUENCES), plain.logits(SEQUENCES), strict=True):
        assert np.abs(ours - theirs).max() <= 5e-6 * max(1, np.abs(theirs).max())


@takes_bfloat16
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_is_nearer_to_float32_than_that_of_pytorch(load_small: LoadModel, family: str) -> None:
    exact, plain, packed = (
        load_small(family),
        load_small(family, dtype="bfloat16"),
        load_small(family, dtype="bfloat16"),
    )
    pack_for_cpu(packed.module)
    assert isinstance(packed.module.layers[0].self_attn, FusedSelfAttention)
    for compute in (lambda model: model.embed(SEQUENCES, layers=[1, -1]), lambda model: model.logits(SEQUENCES)):
        expected, theirs, ours = (np.concatenate([x.reshape(-1) for x in compute(m)]) for m in (exact, plain, packed))
        errors = [np.sqrt(np.mean((x - expected) ** 2)) for x in (ours, theirs)]
        assert errors[0] <= errors[1] <= 0.02 * np.abs(expected).max()


@takes_bfloat16
def test_a_bfloat16_model_keeps_its_type_outside_its_layers(load_small: LoadModel) -> None:
    """Only between plain layers the residual stream is wider."""
    model = small(precision="bfloat16", num_hidden_layers=4)
    model.layers[2] = Shift().to(torch.bfloat16)
    pack_for_cpu(model)
    kinds: list[torch.dtype] = []
    with torch.inference_mode():
        y = model(batch_of(model, "MKTAYIAK", "GD"), on_hidden=lambda _, x: kinds.append(x.dtype))
    assert kinds == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]
    assert y.isfinite().all()
    assert model.compute_dtype == torch.bfloat16


def test_with_a_matrix_unit_bfloat16_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_matrix_unit", lambda: True)
    model = small(precision="bfloat16")
    pack_for_cpu(model)
    assert not is_packed(model)


@needs_library
@pytest.mark.parametrize("family", CONFIGS)
def test_attention_maps_too(family: str) -> None:
    maps: list[list[Tensor]] = []
    for packed in (False, True):
        model = small(family)
        if packed:
            pack_for_cpu(model)
        kept: list[Tensor] = []

        def keep(_: int, call: AttentionCall, kept: list[Tensor] = kept) -> None:
            kept.extend(torch.stack(list(call.maps(sequence))) for sequence in range(2))

        with torch.inference_mode():
            model(batch_of(model, "MKTAYIAK", "GD"), on_attention=keep)
        maps.append(kept)
    assert len(maps[0]) == 6
    for ours, theirs in zip(*maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_sequence_is_the_same_alone_and_in_a_pack(load_small: LoadModel, family: str, precision: str) -> None:
    """To the bit, in every layer, with any number of threads."""
    model = load_small(family)
    convert(model.module, precision)
    pack_for_cpu(model.module)
    layers, threads = [0, 1, 2, 3], torch.get_num_threads()
    expected = model.embed(SEQUENCES, layers=layers)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            for chosen in (*([n] for n in range(len(SEQUENCES))), [2, 0], [3, 1, 4, 0]):
                found = model.embed([SEQUENCES[n] for n in chosen], layers=layers)
                for ours, n in zip(found, chosen, strict=True):
                    assert np.array_equal(ours, expected[n])
    finally:
        torch.set_num_threads(threads)


ODD_SHAPES = [("esm1nv", 15, 3), ("esm1b", 15, 5), ("esm2", 24, 2)]
"""Family, width, heads. Heads of odd width have no rotary pairs."""


@needs_library
@pytest.mark.parametrize(("family", "width", "heads"), ODD_SHAPES)
def test_unusual_head_widths(tmp_path: Path, family: str, width: int, heads: int) -> None:
    shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    hf.write_random(tmp_path / "m", build(replace(CONFIGS[family], **shape)), seed=0, dtype=torch.float32)
    arrays = []
    for packed in (False, True):
        model = protea.load(tmp_path / "m", device="cpu", trainable=True)
        disturb(model.module)
        if packed:
            pack_for_cpu(model.module)
        arrays.append(model.embed(["MKTAYIAKQRQISFVKSHFSRQ", "G"]))
    for ours, theirs in zip(*arrays, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * max(1, np.abs(theirs).max()))


def variant(layer: nn.Module) -> None:
    """A subclass of the layer."""

    class Louder(TransformerLayer):
        def after(self, x: Tensor, y: Tensor) -> Tensor:
            return 2 * super().after(x, y)

    layer.__class__ = Louder


def no_bias(layer: nn.Module) -> None:
    layer.get_submodule("self_attn").q_proj.bias = None  # type: ignore[union-attr]


def wrapped(layer: nn.Module) -> None:
    """A linear layer with an addition, as in LoRA."""

    class Around(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    layer.fc1.__class__ = Around  # type: ignore[assignment]


@needs_library
@pytest.mark.parametrize("change", [variant, no_bias, wrapped])
def test_other_kinds_of_transformer_layers_stay(change: Callable[[nn.Module], None]) -> None:
    model = small("esm2")
    disturb(model)
    change(model.layers[1])
    batch = batch_of(model, "MKTAYIAKQRQISFVKSHFSRQ", "G")
    with torch.inference_mode():
        plain = model(batch)
        pack_for_cpu(model)
        packed = model(batch)
    assert [is_packed(layer) for layer in model.layers] == [True, False, True]
    torch.testing.assert_close(packed, plain, rtol=0, atol=2e-5)


@needs_library
def test_refusing_other_weights_changes_nothing() -> None:
    model = small("esm2")
    before = model.word_embeddings.weight.clone()
    pack_for_cpu(model)
    with pytest.raises(UsageError, match="given other weights"):
        model.load_state_dict({"word_embeddings.weight": torch.zeros_like(before)}, strict=False)
    assert torch.equal(model.word_embeddings.weight, before)


@needs_library
@pytest.mark.parametrize("rotates", [True, False])
def test_heads_whose_widths_do_not_sum_to_the_model_width(rotates: bool) -> None:
    """Three heads of 10 on a width of 24: attention gives the same result."""
    torch.manual_seed(0)
    plain = SelfAttention(24, 3, 10)
    fused = FusedSelfAttention(plain)
    x = torch.randn(7, 24)
    rotary = rotary_angles(torch.arange(7), torch.rand(5)) if rotates else None
    with torch.no_grad():
        (q, k, v), (q2, k2, v2) = plain.project(x, rotary), fused.project(x, rotary)
        assert q.shape == q2.shape == (7, 3, 10)
        # Attention scales what the fused projections return.
        products = (torch.einsum("thw,shw->hts", *pair) for pair in ((q, k), (q2 * 10**-0.5, k2)))
        torch.testing.assert_close(*products, rtol=0, atol=1e-5)
        torch.testing.assert_close(v, v2, rtol=0, atol=1e-5)
        y, y2 = plain.out_proj(v.flatten(-2)), fused.out_proj(v2.flatten(-2), residual=x)
        torch.testing.assert_close(y + x, y2, rtol=0, atol=1e-5)
    for name in ("q_proj", "k_proj"):
        for kind, value in plain.get_submodule(name).named_parameters():
            assert torch.equal(fused.unpacked(name, kind), value)


@pytest.mark.parametrize("precision", ["float16", "float64"])
def test_models_in_other_types_stay(precision: str) -> None:
    model = small(precision=precision)
    pack_for_cpu(model)
    assert not is_packed(model)
    model.to(torch.float32)


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
def test_without_the_library_a_model_stays(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "supports", lambda dtype: False)
    model = small(precision=precision)
    before = dict(model.named_modules())
    pack_for_cpu(model)
    assert not is_packed(model)
    assert dict(model.named_modules()) == before
    if precision == "float32":
        model.to(torch.float64)


class Shift(nn.Module):
    """A layer that is no transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(40, 40)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        return x + self.shift(x)


@needs_library
def test_other_layers_stay() -> None:
    model = small()
    torch.manual_seed(0)
    model.layers[1] = shift = Shift()
    model.layers[2].self_attn = mine = nn.Identity()
    before = dict(shift.named_parameters())
    pack_for_cpu(model)
    assert is_packed(model)
    assert [type(layer.self_attn) for layer in (model.layers[0], model.layers[2])] == [FusedSelfAttention, nn.Identity]
    assert model.layers[1] is shift
    assert model.layers[2].self_attn is mine
    assert not is_packed(shift)
    assert not is_packed(model.layers[2])
    assert all(value is before[name] for name, value in shift.named_parameters())
    assert unpacked(model)("layers.1.shift.weight") is shift.shift.weight


@needs_library
def test_layers_with_another_activation_stay() -> None:
    model = small()
    for layer in model.layers:
        layer.activation, layer.activate = "silu", F.silu
    pack_for_cpu(model)
    assert not is_packed(model)


# --- saving, and refusals ----------------------------------------------------------------------------------------


def set_any_bits(model: Encoder) -> dict[str, Tensor]:
    """Give every parameter random bits, which may be NaN, and return copies."""
    generator = torch.Generator().manual_seed(3)
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    kept = {}
    for name, parameter in model.named_parameters():
        kind = kinds[parameter.dtype]
        limits = torch.iinfo(kind)
        bits = torch.randint(limits.min, limits.max, parameter.shape, generator=generator, dtype=kind)
        parameter.data = bits.view(parameter.dtype)
        kept[name] = bits
    return kept


@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("family", "width", "heads"), [*((family, 40, 5) for family in CONFIGS), *ODD_SHAPES, ("esm2", 320, 20)]
)
def test_every_bit_comes_back(family: str, width: int, heads: int, precision: str) -> None:
    model = small(
        family, precision=precision, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
    )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    kept = set_any_bits(model)
    parameter = unpacked(model)
    for name, bits in kept.items():
        assert torch.equal(parameter(name).view(bits.dtype), bits), "before it is packed"
    pack_for_cpu(model)
    assert is_packed(model)
    assert len(dict(model.named_parameters())) < len(kept)
    for name, bits in kept.items():
        value = parameter(name)
        assert value.is_contiguous()
        assert value.dtype == dtypes[name]
        assert torch.equal(value.view(bits.dtype), bits), name
    with pytest.raises(AttributeError):
        parameter("layers.0.self_attn.r_proj.weight")


@needs_library
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_model_can_be_saved(family: str, tmp_path: Path) -> None:
    model = small(family)
    buffers = dict(model.stored_buffers)
    hf.save(model, tmp_path / "before")
    pack_for_cpu(model)
    assert {name: id(value) for name, value in model.stored_buffers.items()} == {
        name: id(value) for name, value in buffers.items()
    }
    hf.write(tmp_path / "after", like(model), unpacked(model), model.compute_dtype)
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name


@needs_library
@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("moved or converted", lambda model: model.to("cpu")),
        ("moved or converted", lambda model: model.half()),
        ("moved or converted", lambda model: model.layers[0].double()),
        ("moved or converted", lambda model: nn.ModuleList([model]).half()),
        ("asked for its state_dict", lambda model: model.state_dict()),
        ("given other weights", lambda model: model.load_state_dict({}, strict=False)),
        ("copied or pickled", copy.deepcopy),
        ("copied or pickled", lambda model: torch.save(model, io.BytesIO())),
        ("trained", lambda model: model(batch_of(model, "MKTAYIAK"))),
        ("trained", lambda model: freeze(model, "word_embeddings")(batch_of(model, "MKTAYIAK"))),
        (
            "trained",
            lambda model: freeze(model, "layers", "word", "emb").lm_head(torch.ones(3, 40), torch.ones(33, 40)),
        ),
    ],
)
def test_refusals(what: str, call: Callable[[Encoder], object]) -> None:
    model = small()
    pack_for_cpu(model)
    batch = batch_of(model, "MKTAYIAK")
    with torch.no_grad():
        before = model(batch)
    with pytest.raises(UsageError, match=rf"{what}.*trainable=True") as caught:
        call(model)
    if what == "moved or converted":
        check_message("transforms.packed", caught.value)
    # No part has changed.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(batch), before)


@needs_library
def test_inputs_with_gradients_are_refused() -> None:
    """Frozen weights and modes without gradients are allowed; an input that requires gradients is not."""
    model = small()
    pack_for_cpu(model)
    batch = batch_of(model, "MKTAYIAK")
    with torch.inference_mode():
        expected = model(batch)
    model.requires_grad_(False)
    assert torch.equal(model(batch), expected)
    linear = model.layers[0].fc1
    assert isinstance(linear, PackedLinear)
    x = torch.randn(3, 40, requires_grad=True)
    with torch.no_grad():
        linear(x)
    with pytest.raises(UsageError, match="cannot be trained"):
        linear(x)


@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_that_remain_can_change(precision: str) -> None:
    """No part of a packed model computes with a copy of what is still a parameter."""
    plain, packed = small(precision=precision), small(precision=precision)
    pack_for_cpu(packed)
    names = [name for name, _ in packed.named_parameters()]
    assert "word_embeddings.weight" in names
    assert "lm_head.layer_norm.weight" in names
    for name in names:
        logits = []
        for model in (plain, packed):
            with torch.no_grad():
                model.get_parameter(name).data.mul_(1.5).add_(0.1)
                x = model(batch_of(model, "MKTAYIAK"))
                logits.append(model.lm_head(x, model.get_parameter("word_embeddings.weight")))
        assert (logits[0] - logits[1]).norm() <= (1e-5 if precision == "float32" else 0.02) * logits[0].norm(), name


def _kind(part: nn.Module) -> type:
    """The class of a part; a class that trains through the library counts as the class that it replaces."""
    return TransformerLayer if isinstance(part, TransformerLayer) else type(part)


@needs_library
@pytest.mark.parametrize("family", ["esm2", "esm1b"])
def test_a_trained_model_is_packed_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that train through the library hold weights like others."""
    monkeypatch.setattr(native_linear, "_LEAST", 1)
    trained, fresh = small(family), small(family)
    native_linear.multiply_natively(trained)
    batch = batch_of(fresh, *SEQUENCES[:3])
    outputs = []
    for model in (trained, fresh):
        pack_for_cpu(model)
        assert is_packed(model)
        with torch.no_grad():
            outputs.append(model(batch))
    assert [_kind(part) for part in trained.modules()] == [_kind(part) for part in fresh.modules()]
    assert torch.equal(*outputs)


@needs_library
def test_packing_twice_has_no_further_effect() -> None:
    model = small()
    pack_for_cpu(model)
    parts = dict(model.named_modules())
    pack_for_cpu(model)
    assert dict(model.named_modules()) == parts
