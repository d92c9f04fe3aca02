"""Makes a finished model faster for inference on a CPU; afterwards nobody can train, move or convert it.

Linear layers get weights in the order that oneDNN multiplies fastest, with GELU computed in the same operation. One
product gives queries, keys and values, in an order that puts rotary pairs side by side, so that one complex
multiplication rotates them. Numbers stay the same to rounding. The model can still be saved: ``unpacked`` returns every
parameter with its original bits.

Shapes: T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from protea.device import keep_freed_memory, native_bfloat16
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.models.layers import Rotary, rotate
from protea.models.transformer import SelfAttention, TransformerLayer
from protea.transforms.mixed import PRODUCTS, MixedSelfAttention, NarrowLinear, WideLinear

# oneDNN's names for operations on the output of a product.
_POINTWISE: Final = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}
_TYPICAL_ROWS: Final = 4096  # oneDNN chooses the order of weights for this batch size; other sizes also run
_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
_LINEARS: Final = (nn.Linear, NarrowLinear, WideLinear)


def pack_for_cpu(model: Encoder) -> None:
    """Rebuild the transformer layers of a model in place, if a CPU multiplies its dtype and PyTorch has oneDNN.

    Layers that compute otherwise, or with a linear layer that was replaced, stay as they are.
    """
    if model.device.type != "cpu":
        return
    keep_freed_memory()
    dtype = PRODUCTS if model.mixed else model.compute_dtype
    multiplied = dtype == torch.float32 or (dtype == torch.bfloat16 and native_bfloat16(model.device))
    if not multiplied or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    with torch.inference_mode():
        for layer in model.layers:
            if _is_plain(layer):
                _pack(layer)
    if is_packed(model):
        model._apply = _refuse_to_move  # type: ignore[method-assign]
        # PyTorch calls this before it loads weights into any part of the model.
        model._load_from_state_dict = _refuse_weights  # type: ignore[method-assign]


def is_packed(model: nn.Module) -> bool:
    """Whether ``pack_for_cpu`` has rebuilt any layer of a model."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def unpacked(model: Encoder) -> Callable[[str], Tensor]:
    """A function from a parameter's original name to its value, with the bits that it had before ``pack_for_cpu``.

    It copies packed parameters, and raises ``AttributeError`` for names that the model never had.
    """

    def parameter(name: str) -> Tensor:
        owner, _, kind = name.rpartition(".")
        outer, _, part = owner.rpartition(".")
        attention = model.get_submodule(outer)
        if isinstance(attention, FusedSelfAttention) and part in _PROJECTIONS:
            return attention.unpacked(part, kind)
        module = model.get_submodule(owner)
        return module.unpacked(kind) if isinstance(module, PackedLinear) else model.get_parameter(name)

    return parameter


def _refusing(what: str) -> Any:
    """A method that refuses something which packed weights do not support."""

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise UsageError(
            f"this model is packed for inference on a CPU, and cannot be {what}; load it with protea.load(..., "
            "trainable=True)"
        )

    return refuse


# For the model and its packed layers. Modules move one by one, so the model refuses before any part has moved.
_refuse_to_move = _refusing("moved or converted")
_refuse_weights = _refusing("given other weights")


class PackedLinear(nn.Module):
    """A linear layer, optionally with GELU; its weights are not parameters, and in oneDNN's own order."""

    _apply = _refuse_to_move
    _save_to_state_dict = _refusing("asked for its state_dict")
    _load_from_state_dict = _refuse_weights
    __reduce_ex__ = _refusing("copied or pickled")

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
        self.bias = None if bias is None else bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D']``."""
        if x.requires_grad and torch.is_grad_enabled():
            _refusing("trained: it has no gradients")()
        name, algorithm = _POINTWISE[self.activation]
        x = x.to(self.weight.dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y

    def wide(self, x: Tensor) -> Tensor:
        """The same in float32, from two products: a second one returns what rounding took from the first."""
        rounded: Tensor = self(x)
        x = x.to(self.weight.dtype)
        rest: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, rounded, self.weight, self.bias, "sub")
        return rounded.float() + rest

    def unpacked(self, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` in its original order."""
        value: Tensor | None = self.weight.to_dense() if kind == "weight" else self.bias
        if value is None:
            raise AttributeError(kind)
        return value.clone()


class FusedSelfAttention(nn.Module):
    """``SelfAttention`` with one product for queries, keys and values; if ``paired``, rotary pairs are side by side."""

    def __init__(self, attention: SelfAttention, *, paired: bool = True) -> None:
        super().__init__()
        self.head_width, self.scale = attention.head_width, attention.scale
        self.mixed = isinstance(attention, MixedSelfAttention)
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.paired = paired
        self.order = _pairs_together(q.out_features, self.head_width) if paired else torch.arange(q.out_features)
        order = self.order
        weight = torch.cat((q.weight[order], k.weight[order], v.weight))
        bias = None if q.bias is None else torch.cat((q.bias[order], k.bias[order], v.bias))
        self.qkv = PackedLinear(weight, bias)
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, scaled and rotated."""
        projected = self.qkv.wide(x) if self.mixed else self.qkv(x)
        q, k, v = projected.view(len(x), 3, -1, self.head_width).unbind(1)
        if rotary is None:
            return q * self.scale, k, v
        if not self.paired:
            return rotate(q * self.scale, *rotary), rotate(k, *rotary), v
        turn = torch.complex(*rotary)
        return _rotate_pairs(q, turn * self.scale), _rotate_pairs(k, turn), v

    def unpacked(self, projection: str, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` of a projection in its original order."""
        fused = self.qkv.unpacked(kind).chunk(3)[_PROJECTIONS.index(projection)].clone()
        if projection == "v_proj":
            return fused
        original = torch.empty_like(fused)
        original[self.order] = fused
        return original


def _is_plain(layer: nn.Module) -> bool:
    """Whether the packed form computes the same as a layer."""
    if not isinstance(layer, TransformerLayer) or type(layer.self_attn) not in (SelfAttention, MixedSelfAttention):
        return False
    if any(getattr(type(layer), part) is not getattr(TransformerLayer, part) for part in TransformerLayer.tokenwise):
        return False
    attention = layer.self_attn
    linears = (*(getattr(attention, name) for name in _PROJECTIONS), attention.out_proj, layer.fc1, layer.fc2)
    if len({getattr(attention, name).bias is None for name in _PROJECTIONS}) > 1:
        return False
    return layer.activation in _POINTWISE and all(type(x) in _LINEARS for x in linears)


def _pack(layer: Any) -> None:
    # A layer that changes keys before attention needs them in their own order.
    layer.self_attn = FusedSelfAttention(layer.self_attn, paired=type(layer).call is TransformerLayer.call)
    layer.fc1 = PackedLinear(layer.fc1.weight, layer.fc1.bias, layer.activation)
    layer.fc2 = PackedLinear(layer.fc2.weight, layer.fc2.bias)
    layer.activate = lambda x: x  # fc1 includes the activation
    layer._apply = _refuse_to_move


def _pairs_together(rows: int, width: int) -> Tensor:
    """``[H·K]``: the order of rows that puts row i of each head next to its rotary partner i + K/2.

    Scores stay the same if queries and keys have the same order. An odd width has no pairs.
    """
    within = torch.arange(width).view(2, -1).T.flatten() if width % 2 == 0 else torch.arange(width)
    return (torch.arange(0, rows, width)[:, None] + within).flatten()


def _rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate ``[T, H, K]`` by ``[T, 1, K/2]`` complex, in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
