"""The transformer that ESM-1b, ESM-1v, ESM-2 and ESM-1nv have in common: pre-norm blocks, a final norm, a tied head.

A family adds its positions: in the embedding, or as rotary angles in the context.

Shapes: T tokens, D model width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from protea.errors import CheckpointError
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.models.heads import ContactHead, LanguageModelHead
from protea.models.layers import TransformerLayer, blank_embedding


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(EncoderConfig):
    """What these families are configured by beside what every family is."""

    required: ClassVar[tuple[str, ...]] = (
        *("num_hidden_layers", "hidden_size", "num_attention_heads"),
        *("intermediate_size", "vocab_size"),
    )
    # Where a file leaves a key out, the defaults of transformers' class apply, not the published models' values.
    absent: ClassVar[Mapping[str, Any]] = {
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }

    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
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
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_heads(self) -> tuple[int, ...]:
        """As many in each layer."""
        return (self.num_attention_heads,) * self.num_hidden_layers

    @property
    def inference_values(self) -> int:
        """Hidden state, its norm, q, k, v, two of them rotated, attention's output; the wide layer before and after."""
        return 10 * self.hidden_size + 2 * self.intermediate_size

    def forward_flops(self, length: float, predicted: float) -> float:
        """2 · layers · (4·D² + 2·D·F) + 4 · layers · L · D + 2 · (D² + V·D) · predicted share, F the wide layer."""
        width, layers = self.hidden_size, self.num_hidden_layers
        matrices = layers * (4 * width**2 + 2 * width * self.intermediate_size)
        head = width**2 + width * self.vocab_size
        return 2 * matrices + 4 * layers * length * width + 2 * head * predicted

    def activation_bytes(self, length: float, *, mixed: bool, recompute: bool, on_cpu: bool) -> int:
        """What the layers keep.

        A layer keeps the residual stream before both norms; what its products take, which is cast for each of them
        where they are narrow: the norms' outputs and attention's; queries, keys and values, and attention's output once
        more; the wide layer before and after its activation. Dropout keeps what it multiplied with, and on a CPU
        attention then keeps its probabilities, three times.
        """
        width, ffn = self.hidden_size, self.intermediate_size
        products = (9 if mixed else 7) * width + 2 * ffn + (2 * width if self.hidden_dropout_prob else 0)
        layer = 4 * 2 * width + (2 if mixed else 4) * products
        if self.attention_probs_dropout_prob and on_cpu:
            layer += 4 * 3 * self.num_attention_heads * round(length)
        layers = self.num_hidden_layers
        return 4 * width * layers + layer if recompute else layer * layers


class Transformer(Encoder):
    """The model without its positions.

    Args:
        config: of the family.
        activation: of the blocks, by its name in ``ACTIVATIONS``.
        contact_head: whether the published models have one.
    """

    config: TransformerConfig
    lm_head: LanguageModelHead | None

    def __init__(self, config: TransformerConfig, *, activation: str, contact_head: bool) -> None:
        super().__init__(config)
        self.word_embeddings = blank_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.head_width,
                config.intermediate_size,
                activation=activation,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
                layer_norm_eps=config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.emb_layer_norm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, config.layer_norm_eps)
        if contact_head:
            self.contact_head = ContactHead(sum(config.attention_heads))

    def final(self, x: Tensor) -> Tensor:
        """The norm after the last layer, ``[T, D]``."""
        normed: Tensor = self.emb_layer_norm_after(x)
        return normed

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]``, by the word embeddings as output matrix.

        Raises:
            CapabilityError: the checkpoint came without a language-model head.
        """
        self.require("logits")
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(x, self.word_embeddings.weight)
        return logits
