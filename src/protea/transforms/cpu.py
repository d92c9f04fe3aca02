"""Makes a finished model faster for inference on a CPU; afterwards nobody can train, move or convert it.

The layers compute through Protea's native library, with weights in the order that it multiplies fastest. It computes
norms, activations, rotations and residuals together with the products beside them. One product gives queries, keys and
values, in an order that puts rotary pairs side by side. Of layers that compute otherwise, but allow it, only the linear
layers and convolutions are replaced. Numbers stay the same to rounding; in ``bf16-mixed`` products alone are narrow,
and what they return is float32. The model can still be saved, unless its products are in int8: ``unpacked`` returns
every parameter with its original bits. Without the library the model stays as it is.

Shapes: T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from protea.device import has_matrix_unit, keep_freed_memory
from protea.errors import UsageError
from protea.models.attention import attend
from protea.models.convolution import Convolution, ConvolutionContext
from protea.models.encoder import Encoder
from protea.models.layers import LanguageModelHead, LayerContext, Rotary, is_replaceable, kind_of, rotate
from protea.models.transformer import ACTIVATIONS, SelfAttention, TransformerLayer
from protea.native.products import Packed, Turn, linear, supports
from protea.progress import SILENT, Progress
from protea.transforms.mixed import PRODUCTS, NarrowLinear, WideLinear, mixed_attention

_QK: Final = ("q_proj", "k_proj")
_LINEARS: Final = (nn.Linear, NarrowLinear, WideLinear)

Norm = nn.LayerNorm | nn.RMSNorm


def pack_for_cpu(model: Encoder, progress: Progress = SILENT) -> None:
    """Rebuild the layers of a model in place, if the native library has the model's types.

    Layers that are neither plain transformer layers nor replaceable, or had a part replaced, stay as they are.
    """
    if model.device.type != "cpu":
        return
    keep_freed_memory()
    narrow = model.compute_dtype == torch.bfloat16
    products = torch.int8 if model.quantized else PRODUCTS if model.mixed else model.compute_dtype
    if not supports(products) or (narrow and has_matrix_unit()):
        return
    progress.begin("preparing layers", len(model.layers))
    with torch.inference_mode():
        plain = [is_plain(layer) for layer in model.layers]
        inside = supports(torch.bfloat16) if model.quantized else narrow
        for layer, is_packable, followed in zip(model.layers, plain, [*plain[1:], False], strict=True):
            if is_packable:
                _pack(layer, inside, rounded=narrow and not followed, quantized=model.quantized)
            elif is_replaceable(layer):
                _pack_parts(layer, narrow)
            progress.advance()
        if is_packed(model) and type(model.lm_head) is LanguageModelHead:
            model.lm_head = PackedHead(model.lm_head)
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
        if isinstance(module, (PackedLinear, PackedConvolution)):
            return module.unpacked(kind)
        return model.get_parameter(name)

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
_refuse_to_train = _refusing("trained: it has no gradients")


def _refuse_gradients(*given: Tensor | None) -> None:
    """Refuse to compute what PyTorch should record for a backward pass."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        _refuse_to_train()


class PackedLinear(nn.Module):
    """A linear layer, optionally with an activation; its weights are not parameters, and in the library's order.

    It returns float32, or the type of its weights if it is ``narrow``.
    """

    _apply = _refuse_to_move
    _save_to_state_dict = _refusing("asked for its state_dict")
    _load_from_state_dict = _refuse_weights
    __reduce_ex__ = _refusing("copied or pickled")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
        *,
        narrow: bool = False,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.weight = Packed.of(weight, torch.int8 if quantized else None)
        self.bias = None if bias is None else bias.detach()
        self._wide_bias = None if bias is None else bias.detach().float()
        self.activation, self.narrow = activation, narrow

    def forward(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        turn: Turn | None = None,
        turned: int = 0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``[T, D]`` to ``[T, D']``; the options are those of ``protea.native.products.linear``."""
        _refuse_gradients(x, residual, *(() if norm is None else norm.parameters()))
        return linear(
            x,
            self.weight,
            self._wide_bias,
            norm=norm,
            turn=turn,
            turned=turned,
            activation=self.activation,
            residual=residual,
            narrow=self.narrow,
        )

    def unpacked(self, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` in its original order and type."""
        value = self.weight.unpacked() if kind == "weight" else self.bias
        if value is None:
            raise AttributeError(kind)
        return value.clone()


class PackedConvolution(nn.Module):
    """``Convolution`` with a packed weight for each place of the kernel, added up sequence by sequence."""

    def __init__(self, convolution: Convolution, *, narrow: bool = False) -> None:
        super().__init__()
        self.narrow = narrow
        self.reads, self.middle = convolution.reads, len(convolution.reads) // 2
        self.places = [
            PackedLinear(convolution.weight[..., place], convolution.bias if place == self.middle else None)
            for place in range(len(self.reads))
        ]
        # As a module, too, so that the model is known to be packed.
        self.parts = nn.ModuleList(self.places)

    def forward(self, x: Tensor, context: ConvolutionContext) -> Tensor:
        """``[T, I]`` to ``[T, I]``."""
        x = (x if context.kept is None else x * context.kept).to(self.places[0].weight.dtype)
        y: Tensor = self.places[self.middle](x)
        for place, distance in zip(self.places, self.reads, strict=True):
            if distance:
                linear(x, place.weight, residual=y, out=y, distance=distance, cu=context.cu_seqlens)
        return y.to(x.dtype) if self.narrow else y

    def unpacked(self, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` in its original order and type."""
        if kind == "bias":
            return self.places[self.middle].unpacked(kind)
        return torch.stack([place.unpacked(kind) for place in self.places], dim=-1)


class FusedSelfAttention(nn.Module):
    """``SelfAttention`` with one product for queries and keys; if ``paired``, rotary pairs lie side by side.

    Values may have narrower weights than queries and keys.
    """

    def __init__(
        self, attention: SelfAttention, *, paired: bool = True, narrow: bool = False, quantized: bool = False
    ) -> None:
        super().__init__()
        self.head_width, self.scale, self.paired = attention.head_width, attention.scale, paired
        q, k = attention.q_proj, attention.k_proj
        rows = q.out_features
        self.order = _pairs_together(rows, self.head_width) if paired else torch.arange(rows)
        bias = None if q.bias is None else torch.cat((q.bias[self.order], k.bias[self.order]))
        types: Any = {"narrow": narrow, "quantized": quantized}
        self.qk_proj = PackedLinear(torch.cat((q.weight[self.order], k.weight[self.order])), bias, **types)
        self.v_proj = PackedLinear(attention.v_proj.weight, attention.v_proj.bias, **types)
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias, quantized=quantized)

    def project(self, x: Tensor, rotary: Rotary | None, norm: Norm | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]``, normed first, to queries, keys and values ``[T, H, K]``, rotated but not scaled."""
        turn = None if rotary is None or not self.paired else _turn(*rotary)
        turned = 0 if turn is None else self.qk_proj.weight.shape[0]
        q, k = self.qk_proj(x, norm=norm, turn=turn, turned=turned).view(len(x), 2, -1, self.head_width).unbind(1)
        if rotary is not None and turn is None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, self.v_proj(x, norm=norm).view(len(x), -1, self.head_width)

    def unpacked(self, projection: str, kind: str) -> Tensor:
        """A copy of ``weight`` or ``bias`` of the query's or the key's projection in its original order."""
        fused = self.qk_proj.unpacked(kind).chunk(2)[_QK.index(projection)]
        original = torch.empty_like(fused)
        original[self.order] = fused
        return original


class PackedHead(nn.Module):
    """``LanguageModelHead`` through the native library, so that logits too have the same bits in every pack."""

    def __init__(self, head: LanguageModelHead) -> None:
        super().__init__()
        self.dense = PackedLinear(head.dense.weight, head.dense.bias, "gelu")
        self.layer_norm, self.bias = head.layer_norm, head.bias

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, V]``."""
        _refuse_gradients(word_embeddings, self.bias, *self.layer_norm.parameters())
        # Packed for each call, because they are a parameter that can change; they are few.
        return linear(self.dense(x), Packed.of(word_embeddings), self.bias.float(), norm=self.layer_norm)


@lru_cache(maxsize=1)
def _turn(cosine: Tensor, sine: Tensor) -> Turn:
    """The angles of a pack, which all its layers share."""
    return Turn.of(cosine, sine)


def is_plain(layer: nn.Module) -> bool:
    """Whether the packed form computes the same as a layer."""
    if not isinstance(layer, TransformerLayer) or kind_of(layer.self_attn) not in (
        SelfAttention,
        mixed_attention(SelfAttention),
    ):
        return False
    own = (*TransformerLayer.tokenwise, "forward")
    if any(getattr(type(layer), part) is not getattr(TransformerLayer, part) for part in own):
        return False
    attention = layer.self_attn
    linears = (*(getattr(attention, name) for name in _QK), attention.v_proj, attention.out_proj, layer.fc1, layer.fc2)
    norms = (layer.self_attn_layer_norm, layer.final_layer_norm)
    return (
        layer.activation in ACTIVATIONS
        and all(kind_of(x) in _LINEARS for x in linears)
        and (attention.q_proj.bias is None) == (attention.k_proj.bias is None)
        and all(type(norm) in (nn.LayerNorm, nn.RMSNorm) for norm in norms)
    )


def _pack(layer: Any, narrow: bool, *, rounded: bool, quantized: bool) -> None:
    """Replace the parts of a plain layer.

    ``narrow`` says that queries, keys and values are bfloat16, ``rounded`` that the layer's result is, ``quantized``
    that its products are in int8.
    """
    # A layer that changes keys before attention needs them in their own order.
    paired = type(layer).call is TransformerLayer.call
    layer.self_attn = FusedSelfAttention(layer.self_attn, paired=paired, narrow=narrow, quantized=quantized)
    layer.fc1 = PackedLinear(layer.fc1.weight, layer.fc1.bias, layer.activation, narrow=True, quantized=quantized)
    layer.fc2 = PackedLinear(layer.fc2.weight, layer.fc2.bias, narrow=rounded, quantized=quantized)
    layer.forward = partial(_forward, layer)
    layer._apply = _refuse_to_move


def _pack_parts(layer: nn.Module, narrow: bool) -> None:
    """Replace the linear layers and convolutions of a layer that calls them."""
    for owner in list(layer.modules()):
        for name, part in list(owner.named_children()):
            if isinstance(part, nn.Linear) and kind_of(part) in _LINEARS:
                setattr(owner, name, PackedLinear(part.weight, part.bias, narrow=narrow))
            elif isinstance(part, Convolution):
                setattr(owner, name, PackedConvolution(part, narrow=narrow))
    layer._apply = _refuse_to_move  # type: ignore[method-assign]


def _forward(layer: Any, x: Tensor, context: LayerContext) -> Tensor:
    """``TransformerLayer.forward`` with norms, activation and residuals inside the products.

    Within the layer, the residual stream is float32.
    """
    q, k, v = layer.self_attn.project(x, context.rotary, layer.self_attn_layer_norm)
    call = replace(layer.call(q, k, v, context), scale=layer.self_attn.scale)
    if context.on_attention is not None:
        context.on_attention(call)
    x = layer.self_attn.out_proj(attend(call, context.rows).flatten(-2), residual=context.chosen(x).float())
    inner = layer.fc1(x, norm=layer.final_layer_norm)
    y: Tensor = layer.fc2(inner, residual=x)
    return y


def _pairs_together(rows: int, width: int) -> Tensor:
    """``[H·K]``: the order of rows that puts row i of each head next to its rotary partner i + K/2.

    Scores stay the same if queries and keys have the same order. An odd width has no pairs.
    """
    within = torch.arange(width).view(2, -1).T.flatten() if width % 2 == 0 else torch.arange(width)
    return (torch.arange(0, rows, width)[:, None] + within).flatten()
