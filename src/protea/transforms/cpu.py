"""Makes a finished model faster for inference on a CPU; afterwards nobody can train, move or convert it.

The layers compute through Protea's native library, with weights in the order that it multiplies fastest. It computes
norms, activations, rotations and residuals together with the products beside them. One product gives queries, keys and
values, in an order that puts rotary pairs side by side. Numbers stay the same to rounding; in ``bf16-mixed`` products
alone are narrow, and what they return is float32. The model can still be saved: ``unpacked`` returns every parameter
with its original bits. Without the library the model stays as it is.

Shapes: T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from protea.device import keep_freed_memory
from protea.errors import UsageError
from protea.models.attention import AttentionCall, attend
from protea.models.encoder import Encoder
from protea.models.layers import LayerContext, Rotary
from protea.models.transformer import ACTIVATIONS, SelfAttention, TransformerLayer
from protea.native.products import Packed, Turn, linear, supports
from protea.transforms.mixed import PRODUCTS, MixedSelfAttention, NarrowLinear, WideLinear

_QK: Final = ("q_proj", "k_proj")
_LINEARS: Final = (nn.Linear, NarrowLinear, WideLinear)


def pack_for_cpu(model: Encoder) -> None:
    """Rebuild the transformer layers of a model in place, if the native library has the model's types.

    Other layers stay: those of a subclass, without biases, or with a linear layer that was replaced.
    """
    if model.device.type != "cpu":
        return
    keep_freed_memory()
    if model.compute_dtype != torch.float32 or not supports(PRODUCTS if model.mixed else torch.float32):
        return
    with torch.inference_mode():
        for number, layer in enumerate(model.layers):
            if _is_plain(layer):
                model.layers[number] = PackedLayer(layer)
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
        if isinstance(attention, FusedSelfAttention) and part in _QK:
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
    """A linear layer, optionally with an activation; its weights are not parameters, and in the library's order."""

    _apply = _refuse_to_move
    _save_to_state_dict = _refusing("asked for its state_dict")
    _load_from_state_dict = _refuse_weights
    __reduce_ex__ = _refusing("copied or pickled")

    def __init__(self, weight: Tensor, bias: Tensor, activation: str | None = None) -> None:
        super().__init__()
        self.weight = Packed.of(weight)
        self.bias = bias.detach()
        self._wide_bias = self.bias.float()
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        *,
        norm: nn.LayerNorm | None = None,
        turn: Turn | None = None,
        turned: int = 0,
        residual: Tensor | None = None,
        narrow: bool = False,
    ) -> Tensor:
        """``[T, D]`` to ``[T, D']``; the options are those of ``protea.native.products.linear``."""
        if x.requires_grad and torch.is_grad_enabled():
            _refusing("trained: it has no gradients")()
        return linear(
            x,
            self.weight,
            self._wide_bias,
            norm=norm,
            turn=turn,
            turned=turned,
            activation=self.activation,
            residual=residual,
            narrow=narrow,
        )

    def unpacked(self, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` in its original order and type."""
        if kind == "weight":
            return self.weight.unpacked()
        return {"bias": self.bias}[kind].clone()


class FusedSelfAttention(nn.Module):
    """``SelfAttention`` with one product for queries and keys, whose rotary pairs lie side by side.

    Values may have narrower weights than queries and keys.
    """

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.head_width = attention.head_width
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        order = _pairs_together(q.out_features, self.head_width)
        weights, biases = (q.weight[order], k.weight[order]), (q.bias[order], k.bias[order])
        self.qk_proj = PackedLinear(torch.cat(weights), torch.cat(biases))
        self.v_proj = PackedLinear(v.weight, v.bias)
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def project(
        self, x: Tensor, rotary: Rotary | None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]``, normed first, to queries, keys and values ``[T, H, K]``, rotated but not scaled."""
        turn = None if rotary is None else _turn(*rotary)
        turned = 0 if turn is None else self.qk_proj.weight.shape[0]
        rotated = self.qk_proj(x, norm=norm, turn=turn, turned=turned)
        q, k = rotated.view(len(x), 2, -1, self.head_width).unbind(1)
        return q, k, self.v_proj(x, norm=norm).view(len(x), -1, self.head_width)

    def unpacked(self, projection: str, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` of the query's or the key's projection in its original order."""
        fused = self.qk_proj.unpacked(kind).chunk(2)[_QK.index(projection)]
        original = torch.empty_like(fused)
        original[_pairs_together(len(fused), self.head_width)] = fused
        return original


class PackedLayer(nn.Module):
    """``TransformerLayer`` through the native library."""

    _apply = _refuse_to_move

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn_layer_norm, self.final_layer_norm = layer.self_attn_layer_norm, layer.final_layer_norm
        self.self_attn = FusedSelfAttention(layer.self_attn)
        self.fc1 = PackedLinear(layer.fc1.weight, layer.fc1.bias, layer.activation)
        self.fc2 = PackedLinear(layer.fc2.weight, layer.fc2.bias)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        """``[T, D]`` to ``[T, D]``, float32."""
        q, k, v = self.self_attn.project(x, context.rotary, self.self_attn_layer_norm)
        scale = self.self_attn.head_width**-0.5
        call = AttentionCall(q, k, v, context.cu_seqlens, context.cu_seqlens, scale=scale, bias=context.bias)
        if context.on_attention is not None:
            context.on_attention(call)
        x = self.self_attn.out_proj(attend(call).flatten(-2), residual=x)
        inner = self.fc1(x, norm=self.final_layer_norm, narrow=True)
        y: Tensor = self.fc2(inner, residual=x)
        return y


@lru_cache(maxsize=1)
def _turn(cosine: Tensor, sine: Tensor) -> Turn:
    """The angles of a pack, which all its layers share."""
    return Turn.of(cosine, sine)


def _is_plain(layer: nn.Module) -> bool:
    """Whether the packed form computes the same as a layer."""
    if type(layer) is not TransformerLayer or type(layer.self_attn) not in (SelfAttention, MixedSelfAttention):
        return False
    attention = layer.self_attn
    linears = (*(getattr(attention, name) for name in _QK), attention.v_proj, attention.out_proj, layer.fc1, layer.fc2)
    return layer.activation in ACTIVATIONS and all(type(x) in _LINEARS and x.bias is not None for x in linears)


def _pairs_together(rows: int, width: int) -> Tensor:
    """``[H·K]``: the order of rows that puts row i of each head next to its rotary partner i + K/2.

    Scores stay the same if queries and keys have the same order. An odd width has no pairs.
    """
    within = torch.arange(width).view(2, -1).T.flatten() if width % 2 == 0 else torch.arange(width)
    return (torch.arange(0, rows, width)[:, None] + within).flatten()
