"""A finished model made faster for inference on a CPU, at the price of training.

Applied from outside and in place: linear layers get weights in the order oneDNN multiplies fastest, GELU is computed
while products are still in registers, queries, keys and values come from one product, and rotary pairs lie side by
side, where one complex multiplication rotates them. The numbers stay those of the model to rounding. The model can no
longer be trained, moved or converted, and says so when somebody tries; it can still be saved, since ``unpacked`` gives
every parameter back with its own bits.

Shapes: T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from protea.allocator import keep_freed_memory
from protea.device import native_bfloat16
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.models.layers import SelfAttention, TransformerLayer

_POINTWISE: Final = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""oneDNN's names for what is applied to a product."""

_TYPICAL_ROWS: Final = 4096
"""The batch oneDNN lays weights out for; others run too."""

_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
"""What the fused product is made of, in its order."""


def pack_for_cpu(model: Encoder) -> None:
    """Rebuild the transformer layers of a model in place, if it is on a CPU that multiplies its type and has oneDNN.

    Other layers stay as they are: those of a subclass, without biases, or with a linear layer that was replaced.
    """
    if model.device.type != "cpu":
        return
    keep_freed_memory()
    dtype = model.compute_dtype
    multiplied = dtype == torch.float32 or (dtype == torch.bfloat16 and native_bfloat16(model.device))
    if not multiplied or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    with torch.inference_mode():
        for layer in model.layers:
            if _is_plain(layer):
                _pack(layer)
    if is_packed(model):
        model._apply = _refuse_to_move  # type: ignore[method-assign]
        # Asked before any part of the model is given something.
        model._load_from_state_dict = _refuse_weights  # type: ignore[method-assign,assignment]


def is_packed(model: nn.Module) -> bool:
    """Whether ``pack_for_cpu`` has rebuilt any of a model's layers."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def unpacked(model: Encoder) -> Callable[[str], Tensor]:
    """A function from a parameter's ordinary name to its value, with the bits that it had before ``pack_for_cpu``.

    Of a packed parameter, each call makes a copy. Names that the model never had are an ``AttributeError``.
    """

    def parameter(name: str) -> Tensor:
        owner, _, kind = name.rpartition(".")
        around, _, part = owner.rpartition(".")
        attention = model.get_submodule(around)
        if isinstance(attention, FusedSelfAttention) and part in _PROJECTIONS:
            return attention.unpacked(part, kind)
        module = model.get_submodule(owner)
        return module.unpacked(kind) if isinstance(module, PackedLinear) else model.get_parameter(name)

    return parameter


class PackedLinear(nn.Module):
    """A linear layer, and perhaps GELU, over weights in oneDNN's own order, which are no parameters any more.

    Raises:
        UsageError: it is moved, converted, copied or pickled, its state is asked for or set, or gradients are to go
            through it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: str | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
        self.bias = bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D']``."""
        if x.requires_grad and torch.is_grad_enabled():
            _refuse("trained: no gradients go through it")
        name, algorithm = _POINTWISE[self.activation]
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y

    def unpacked(self, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` in its ordinary order."""
        value: Tensor = {"weight": self.weight.to_dense, "bias": self.bias.clone}[kind]()
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        _refuse_to_move(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> NoReturn:
        _refuse("asked for its state_dict")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> NoReturn:
        _refuse_weights(state_dict, prefix, *others)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        _refuse("copied or pickled")


class FusedSelfAttention(nn.Module):
    """``SelfAttention`` with one product for queries, keys and values, and rotary pairs side by side."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.head_width = attention.head_width
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        order = _pairs_together(q.out_features, self.head_width)
        weight = torch.cat((q.weight[order], k.weight[order], v.weight))
        bias = torch.cat((q.bias[order], k.bias[order], v.bias))
        self.qkv = PackedLinear(weight, bias)
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, scaled and rotated."""
        q, k, v = self.qkv(x).view(len(x), 3, -1, self.head_width).unbind(1)
        scale = self.head_width**-0.5
        if rotary is None:
            return q * scale, k, v
        turn = torch.complex(*rotary)
        return _rotate_pairs(q, turn * scale), _rotate_pairs(k, turn), v

    def unpacked(self, projection: str, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` of one of the three projections, rows in their ordinary order."""
        fused = self.qkv.unpacked(kind).chunk(3)[_PROJECTIONS.index(projection)].clone()
        if projection == "v_proj":
            return fused
        ordinary = torch.empty_like(fused)
        ordinary[_pairs_together(len(fused), self.head_width)] = fused
        return ordinary


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what its packed form does: a subclass, or one without biases, may not."""
    if type(layer) is not TransformerLayer or type(layer.self_attn) is not SelfAttention:
        return False
    attention = layer.self_attn
    products = (*(getattr(attention, name) for name in _PROJECTIONS), attention.out_proj, layer.fc1, layer.fc2)
    return all(type(product) is nn.Linear and product.bias is not None for product in products)


def _pack(layer: nn.Module) -> None:
    assert isinstance(layer, TransformerLayer)

    # An activation that oneDNN has no name for stays where it is.
    activation = layer.activation if layer.activation in _POINTWISE else None
    parts: dict[str, nn.Module] = {
        "self_attn": FusedSelfAttention(layer.self_attn),
        "fc1": PackedLinear(layer.fc1.weight, layer.fc1.bias, activation),
        "fc2": PackedLinear(layer.fc2.weight, layer.fc2.bias),
    }
    for name, part in parts.items():
        setattr(layer, name, part)
    if activation is not None:
        layer.activate = _as_it_is
    layer._apply = _refuse_to_move  # type: ignore[method-assign]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _refuse(what: str) -> NoReturn:
    raise UsageError(
        f"this model is packed for inference on a CPU, and cannot be {what}; load it with protea.load(..., "
        "trainable=True)"
    )


def _refuse_to_move(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
    """In the place of ``_apply``, through which every move and conversion goes.

    Modules are moved one after the other: what holds a packed one refuses too, before any other part of it has gone.
    """
    _refuse("moved or converted")


def _refuse_weights(state_dict: Mapping[str, Any], prefix: str, *others: Any) -> NoReturn:
    _refuse("given other weights")


def _pairs_together(rows: int, width: int) -> Tensor:
    """``[H·K]``: row order that brings entry i of each head's width next to its partner i + K/2.

    Scores do not change if the widths of queries and keys are reordered alike. An odd width has no pairs.
    """
    within = torch.arange(width).view(2, -1).T.flatten() if width % 2 == 0 else torch.arange(width)
    return (torch.arange(0, rows, width)[:, None] + within).flatten()


def _rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate ``[T, H, K]`` by ``[T, 1, K/2]`` complex, in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
