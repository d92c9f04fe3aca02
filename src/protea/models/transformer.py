"""The transformer that most families share: pre-norm blocks, a final norm, a tied head.

A family adds its positions, in the embedding or as rotary angles in the context. Parameter names are those of Meta's
``esm`` package, which LoRA users and converters know: ``self_attn.q_proj``, ``fc1``, ``final_layer_norm`` and so on.

Shapes: T tokens, D model width, H heads, K head width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.errors import CheckpointError
from protea.models.attention import AttentionCall, attend
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.layers import (
    ContactHead,
    LanguageModelHead,
    LayerContext,
    Rotary,
    blank_embedding,
    inverse_frequencies,
    rotary_angles,
    rotate,
)
from protea.packing import PackedBatch

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(EncoderConfig):
    """The configuration that these families share.

    Attributes:
        linear_bias: whether the linear layers of the blocks have biases.
        query_scale: what queries are multiplied by, where it is not K^-1/2.
        norm_type: the class of the norms.
    """

    linear_bias: ClassVar[bool] = True
    query_scale: ClassVar[float | None] = None
    norm_type: ClassVar[type[nn.LayerNorm] | type[nn.RMSNorm]] = nn.LayerNorm
    required: ClassVar[tuple[str, ...]] = (
        *("num_hidden_layers", "hidden_size", "num_attention_heads"),
        *("intermediate_size", "vocab_size"),
    )
    # The defaults of transformers' class, which apply to a file without these keys; published models differ.
    absent: ClassVar[Mapping[str, Any]] = {
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }

    num_attention_heads: int
    intermediate_size: int
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 < self.layer_norm_eps <= 1:
            raise CheckpointError(f"layer_norm_eps must be above 0 and at most 1, got {self.layer_norm_eps}")
        if self.inner_width != self.hidden_size and type(self).head_width is TransformerConfig.head_width:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @property
    def activation(self) -> str:
        """The activation of the blocks, a name in ``ACTIVATIONS``."""
        return "gelu"

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def inner_width(self) -> int:
        """Width of all heads together."""
        return self.num_attention_heads * self.head_width

    @property
    def attention_heads(self) -> tuple[int, ...]:
        """The same number in each layer."""
        return (self.num_attention_heads,) * self.num_hidden_layers

    @property
    def inference_values(self) -> int:
        """Ten of width D: x, its norm, q, k, v, rotated q and k, ...; the wide layer before and after activation."""
        return 4 * self.hidden_size + 6 * self.inner_width + 2 * self.intermediate_size

    def forward_flops(self, length: float, predicted: float) -> float:
        """2 · layers · (4·D·I + 2·D·F) + 4 · layers · L · I + 2 · (D² + V·D) · predicted.

        I is the width of all heads, D in most families, and F the width of fc1.
        """
        width, inner, layers = self.hidden_size, self.inner_width, self.num_hidden_layers
        matrices = layers * (4 * width * inner + 2 * width * self.intermediate_size)
        head = width**2 + width * self.vocab_size
        return 2 * matrices + 4 * layers * length * inner + 2 * head * predicted

    def chosen_flops(self, length: float) -> float:
        """A layer without the products that give queries, keys and values."""
        return self.forward_flops(length, 0.0) / self.num_hidden_layers - 6 * self.hidden_size * self.inner_width

    def activation_bytes(self, length: float, *, mixed: bool, recompute: bool, on_cpu: bool) -> int:
        """Bytes that PyTorch keeps in each layer.

        In float32: x before both norms. In the type of the products: both norms' outputs, q, k, v, attention's output
        twice, the wide layer before and after its activation, and what dropout needs; mixed precision adds casts.
        Attention with dropout on a CPU also keeps its probabilities three times.
        """
        width, layers = self.hidden_size, self.num_hidden_layers
        before = 4 * width + (2 * 5 if mixed else 4 * 4) * width
        layer = before + self.chosen_bytes(length, mixed=mixed, on_cpu=on_cpu)
        return 4 * width * layers + layer if recompute else layer * layers

    def chosen_bytes(self, length: float, *, mixed: bool, on_cpu: bool) -> int:
        """All but x before the first norm, its output, q, k and v."""
        width, ffn = self.hidden_size, self.intermediate_size
        products = (4 if mixed else 3) * width + 2 * ffn + (2 * width if self.hidden_dropout_prob else 0)
        has_probabilities = self.attention_probs_dropout_prob and on_cpu
        probabilities = 4 * 3 * self.num_attention_heads * round(length) if has_probabilities else 0
        return 4 * width + (2 if mixed else 4) * products + probabilities


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(TransformerConfig):
    """The configuration of families with rotary positions, of base ``rope_theta``."""

    rope_theta: float = 10000.0

    max_tokens = None  # rotary positions have no limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width % 2:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} makes heads "
                f"{self.head_width} wide; rotary positions need an even width"
            )
        if not 1 <= self.rope_theta <= 1e12:
            raise CheckpointError(f"rope_theta must be from 1 to 1e12, got {self.rope_theta}")


class SelfAttention(nn.Module):
    """Projections of multi-head attention. The query is scaled before any rotation, as in Meta's code."""

    def __init__(
        self, width: int, heads: int, head_width: int, *, bias: bool = True, scale: float | None = None
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.head_width, self.scale = head_width, head_width**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, inner, bias=bias)
        self.v_proj = nn.Linear(width, inner, bias=bias)
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, scaled and rotated."""
        # H is not stored: a shard of the weights has fewer heads.
        shape = (-1, self.head_width)
        q, k, v = (project(x).unflatten(-1, shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q = q * self.scale
        return (q, k, v) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary), v)


class TransformerLayer(nn.Module):
    """Pre-norm block: attention and feed-forward network, each after a norm and with a residual connection."""

    tokenwise: ClassVar[tuple[str, ...]] = ("before", "after")
    """Methods that work token by token. A compiler speeds up these, but not attention."""

    chooses_rows = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Whoever has another `forward`, be it inherited, must say so again.
        nearest = next(base for base in cls.__mro__ if {"forward", "chooses_rows"} & vars(base).keys())
        cls.chooses_rows = bool(vars(nearest).get("chooses_rows", False))

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, eps, bias = config.hidden_size, config.layer_norm_eps, config.linear_bias
        self.activation = config.activation
        self.activate = ACTIVATIONS[config.activation]
        self.dropout, self.attention_dropout = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        self.self_attn_layer_norm = config.norm_type(width, eps=eps)
        self.self_attn = SelfAttention(
            width, config.num_attention_heads, config.head_width, bias=bias, scale=config.query_scale
        )
        self.final_layer_norm = config.norm_type(width, eps=eps)
        self.fc1 = nn.Linear(width, config.intermediate_size, bias=bias)
        self.fc2 = nn.Linear(config.intermediate_size, width, bias=bias)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        """``[T, D]`` to ``[T, D]``, or to the rows ``[R, D]`` of the context."""
        call = self.call(*self.before(x, context.rotary), context)
        if context.on_attention is not None:
            context.on_attention(call)
        return self.after(context.chosen(x), attend(call, context.rows).flatten(-2))

    def call(self, q: Tensor, k: Tensor, v: Tensor, context: LayerContext) -> AttentionCall:
        """The call of attention; a family may add keys and values to it."""
        dropout = self.attention_dropout if self.training else 0.0
        cu = context.cu_seqlens
        return AttentionCall(q, k, v, cu, cu, bias=context.bias, relative=context.relative, dropout=dropout)

    def before(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """The part before attention: ``[T, D]`` to queries, keys and values ``[T, H, K]``."""
        return self.self_attn.project(self.self_attn_layer_norm(x), rotary)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The part after attention, from the layer's input and attention's output, both ``[T, D]``."""
        x = x + self._drop(self.self_attn.out_proj(y))
        return x + self._drop(self.feed_forward(self.final_layer_norm(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Two linear layers with the activation between them, ``[T, D]`` to ``[T, D]``."""
        y: Tensor = self.fc2(self.activate(self.fc1(x)))
        return y

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer(Encoder):
    """The model without its positions."""

    has_contact_head: ClassVar[bool] = True
    zero_padding: ClassVar[bool] = True
    """Whether the embedding of padding is 0 initially."""

    layer_type: ClassVar[type[TransformerLayer]] = TransformerLayer

    config: TransformerConfig
    emb_layer_norm_after: nn.Module

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.word_embeddings = blank_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.num_hidden_layers))
        self.emb_layer_norm_after = config.norm_type(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, config.layer_norm_eps)
        if self.has_contact_head:
            self.contact_head = ContactHead(sum(config.attention_heads))

    def context(self, batch: PackedBatch) -> LayerContext:
        """The boundaries of the sequences."""
        return LayerContext(batch.cu_seqlens)

    def final(self, x: Tensor) -> Tensor:
        """The norm after the last layer, ``[T, D]``."""
        normed: Tensor = self.emb_layer_norm_after(x)
        return normed

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]``."""
        self.require("logits")
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(x, self.word_embeddings.weight)
        return logits

    def initial_parameter(self, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
        """BERT's initialisation: norms 1, biases 0, other weights normal(0, std), padding rows of embeddings 0."""
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "layer_norm" in name:
            return torch.ones(shape)
        values, std = np.empty(shape, dtype=np.float32), self.initial_std(name)
        # The last bits of float64 draws may depend on the machine's logarithm; rounding to float32 removes them.
        for row in values:
            row[:] = std * generator.standard_normal(row.shape)
        if self.zero_padding and "_embeddings." in name:
            values[self.alphabet.pad] = 0.0
        return torch.from_numpy(values)

    def initial_std(self, name: str) -> float:
        """The standard deviation of a weight's initial values."""
        return self.config.initializer_range


class RotaryTransformer(Transformer):
    """The model with rotary positions, whose base is ``config.rope_theta``.

    ``inv_freq`` is a buffer because published checkpoints carry it, rounded to float16. It has values from the start,
    even on the meta device, so that no model runs without rotary frequencies.
    """

    config: RotaryConfig
    inv_freq: Tensor

    def __init__(self, config: RotaryConfig) -> None:
        super().__init__(config)
        self.register_buffer("inv_freq", inverse_frequencies(config.head_width, config.rope_theta))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move ``inv_freq`` between devices with the rest, but never round it to a narrower type."""
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def buffer_origin(self, name: str) -> str:
        """The base of the rotary frequencies."""
        return f" from rope_theta {self.config.rope_theta:g}"

    def context(self, batch: PackedBatch) -> LayerContext:
        """Boundaries and rotary angles."""
        return LayerContext(batch.cu_seqlens, rotary=rotary_angles(batch.positions(), self.inv_freq))
