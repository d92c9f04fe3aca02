"""ESM C (EvolutionaryScale 2024): pre-norm transformers with rotary positions, SwiGLU and norms of queries and keys.

They follow ``esm/models/esmc.py`` and ``esm/layers`` of EvolutionaryScale's esm 3. Linear layers of the blocks have no
bias, queries and keys are normed over their full width before they are rotated, and what a block adds is divided by
√(layers / 36).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor, nn
from torch.nn import functional as F

from protea.alphabet import ESM, Alphabet
from protea.errors import CheckpointError
from protea.models.family import Keys, Published, Shapes, StoredAs
from protea.models.layers import Rotary, rotate
from protea.models.transformer import (
    RotaryConfig,
    RotaryTransformer,
    SelfAttention,
    TransformerConfig,
    TransformerLayer,
)
from protea.packing import PackedBatch

ALPHABET: Final = Alphabet(
    name="ESM C", tokens=(*ESM.tokens[:31], "|", "<mask>"), bos=ESM.bos, pad=ESM.pad, eos=ESM.eos, unk=ESM.unk, mask=32
)
"""ESM's tokens, with the break between two chains in the unused place; the embedding matrix has 64 rows."""

_HEAD_WIDTH: Final = 64
"""All published models have this value; their files do not state it."""

_USUAL_LAYERS: Final = 36


@dataclass(frozen=True, kw_only=True)
class ESMCConfig(RotaryConfig):
    """Configuration of an ESM C model; ``intermediate_size`` is the width after SwiGLU."""

    model_type: ClassVar[str] = "esmc"
    alphabet: ClassVar[Alphabet] = ALPHABET
    linear_bias: ClassVar[bool] = False

    vocab_size: int = 64

    family = "ESM C"
    trained_tokens = 2048
    activation = "swiglu"

    def forward_flops(self, length: float, predicted: float) -> float:
        """As of other transformers, with a first matrix of the network that is twice as wide."""
        gate = 2 * self.num_hidden_layers * self.hidden_size * self.intermediate_size
        return super().forward_flops(length, predicted) + gate


def _size(layers: int, width: int) -> ESMCConfig:
    ffn = math.ceil(width * 8 / 3 / 256) * 256
    return ESMCConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // _HEAD_WIDTH, intermediate_size=ffn
    )


SIZES: Final = {"300m": _size(30, 960), "600m": _size(36, 1152)}

_BLOCK: Final = "transformer.blocks.{}"
_QKV: Final = tuple(f"layers.{{}}.self_attn.{part}_proj.*" for part in "qkv")
_FILES: Final[Keys] = {
    "word_embeddings.*": "embed.*",
    "layers.{}.self_attn_layer_norm.*": f"{_BLOCK}.attn.layernorm_qkv.0.*",
    **dict.fromkeys(_QKV, f"{_BLOCK}.attn.layernorm_qkv.1.*"),
    "layers.{}.self_attn.q_layer_norm.*": f"{_BLOCK}.attn.q_ln.*",
    "layers.{}.self_attn.k_layer_norm.*": f"{_BLOCK}.attn.k_ln.*",
    "layers.{}.self_attn.out_proj.*": f"{_BLOCK}.attn.out_proj.*",
    "layers.{}.final_layer_norm.*": f"{_BLOCK}.ffn.0.*",
    "layers.{}.fc1.*": f"{_BLOCK}.ffn.1.*",
    "layers.{}.fc2.*": f"{_BLOCK}.ffn.3.*",
    "emb_layer_norm_after.*": "transformer.norm.*",
    "lm_head.dense.*": "sequence_head.0.*",
    "lm_head.layer_norm.*": "sequence_head.2.*",
    "lm_head.out.*": "sequence_head.3.*",
}


def _from_file(described: Mapping[str, Any], sizes: dict[str, Any], shapes: Shapes) -> ESMCConfig:
    rows, width = shapes["word_embeddings.weight"]
    if width % _HEAD_WIDTH:
        raise CheckpointError(f"width {width} is no multiple of {_HEAD_WIDTH}, the width of an attention head")
    return ESMCConfig(
        **sizes,
        hidden_size=width,
        num_attention_heads=width // _HEAD_WIDTH,
        intermediate_size=shapes["layers.0.fc2.weight"][1],
        vocab_size=rows,
    )


def _unsupported(config: ESMCConfig) -> str | None:
    if config.head_width != _HEAD_WIDTH or config.layer_norm_eps != 1e-5 or config.rope_theta != 10_000:
        return f"its files state no heads, epsilon or base; they mean heads {_HEAD_WIDTH} wide, 1e-05 and 10,000"
    return None


_STORED: Final = {
    "hf": StoredAs(
        keys={name: f"esmc.{name}" for name in _FILES}, config=lambda described, sizes, shapes: ESMCConfig(**sizes)
    ),
    "evolutionaryscale": StoredAs(keys=_FILES, config=_from_file, unsupported=_unsupported),
}


class NormedSelfAttention(SelfAttention):
    """``SelfAttention`` with norms of all queries and of all keys, over the width of all heads."""

    def __init__(self, width: int, heads: int, head_width: int, *, layer_norm_eps: float) -> None:
        super().__init__(width, heads, head_width, bias=False)
        self.q_layer_norm = nn.LayerNorm(heads * head_width, eps=layer_norm_eps, bias=False)
        self.k_layer_norm = nn.LayerNorm(heads * head_width, eps=layer_norm_eps, bias=False)

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, normed, scaled and rotated."""
        assert rotary is not None
        projected = (self.q_layer_norm(self.q_proj(x)), self.k_layer_norm(self.k_proj(x)), self.v_proj(x))
        q, k, v = (y.unflatten(-1, (-1, self.head_width)) for y in projected)
        return rotate(q * self.scale, *rotary), rotate(k, *rotary), v


class SwiGLULayer(TransformerLayer):
    """A block whose network has SwiGLU, and whose additions are divided by √(layers / 36)."""

    replaceable = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.divisor = math.sqrt(config.num_hidden_layers / _USUAL_LAYERS)
        self.self_attn = NormedSelfAttention(
            config.hidden_size, config.num_attention_heads, config.head_width, layer_norm_eps=config.layer_norm_eps
        )
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The part after attention, from the layer's input and attention's output, both ``[T, D]``."""
        x = x + self._drop(self.self_attn.out_proj(y)) / self.divisor
        inner = self.activate(self.fc1(self.final_layer_norm(x)))
        return x + self._drop(self.fc2(inner)) / self.divisor


class RegressionHead(nn.Module):
    """Dense, GELU, norm, and an output matrix of its own."""

    def __init__(self, width: int, vocab_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.out = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, V]``."""
        logits: Tensor = self.out(self.layer_norm(F.gelu(self.dense(x))))
        return logits


def _published(size: str, licence: str, *, restriction: str = "") -> Published:
    repository = f"https://huggingface.co/EvolutionaryScale/esmc-{size}-2024-12"
    return Published(
        name=f"esmc_{size}",
        config=SIZES[size],
        publisher="EvolutionaryScale",
        licence=licence,
        restriction=restriction,
        format="evolutionaryscale",
        elsewhere=f"{repository} (data/weights/esmc_{size}_2024_12_v0.pth)",
    )


class ESMC(RotaryTransformer):
    """ESM C."""

    config_type = ESMCConfig
    stored = _STORED
    published = (
        _published("300m", "LicenseRef-Cambrian-Open"),
        _published("600m", "LicenseRef-Cambrian-Non-Commercial", restriction="not for commercial use"),
    )
    layer_type = SwiGLULayer
    has_contact_head = zero_padding = False

    config: ESMCConfig

    def __init__(self, config: ESMCConfig) -> None:
        super().__init__(config)
        self.emb_layer_norm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.lm_head = RegressionHead(config.hidden_size, config.vocab_size, config.layer_norm_eps)

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings, ``[T, D]``."""
        x: Tensor = self.word_embeddings(batch.input_ids)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]``."""
        self.require("logits")
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(x)
        return logits
