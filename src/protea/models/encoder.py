"""What every model of the family is: an embedding, a stack of layers, a final norm, heads, and one driver.

A family adds its positions by implementing ``embed_tokens`` and ``context``; ``Encoder.forward`` runs them, the
layers and ``final``, and is the only forward pass there is. Hidden states and attention maps are handed to observers
as they arise, so that a caller keeps what it needs and nothing else stays in memory.

Shapes: T tokens, D model width, H heads, V vocabulary rows, L length of one sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Final

import numpy as np
from torch import Tensor, nn

from protea.alphabet import Alphabet
from protea.errors import CapabilityError, CheckpointError, SequenceTooLongError
from protea.models.attention_maps import AttentionMaps
from protea.models.layers import AnyContactHead, ContactHead, LanguageModelHead, TransformerLayer, blank_embedding
from protea.packing import CuSeqlens, PackedBatch

HiddenObserver = Callable[[int, Tensor], None]
"""Called with a layer number and its ``[T, D]`` output: 0 is the embedding, the last comes after ``final``."""

AttentionObserver = Callable[[int, AttentionMaps], None]
"""Called with a layer number, from 1, and one ``[H, L, L]`` tensor a sequence."""


_LARGEST: Final = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 20,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 20,
    "max_position_embeddings": 1 << 30,
}
"""Far above any model, and low enough that a damaged number is named at once instead of filling memory."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ABC):
    """What all families are configured by; the names are those of Hugging Face's ``config.json``.

    Raises:
        CheckpointError: if a number is out of range, or the numbers do not fit together.
    """

    model_type: ClassVar[str]
    alphabet: ClassVar[Alphabet]

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise CheckpointError(f"{name} must be from 1 to {largest:,}, got {getattr(self, name)}")
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
    @abstractmethod
    def family(self) -> str:
        """What the field calls such models: ``ESM-2``, ``ESM-1v``, ..."""

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LayerContext:
    """What a layer needs beside its input.

    Attributes:
        cu_seqlens: where each sequence begins and ends.
        rotary: cosine and sine of the rotary angles, ``[T, 1, K/2]`` float32 each, for models that rotate.
        on_attention: receives the layer's attention maps, if somebody asked for them.
    """

    cu_seqlens: CuSeqlens
    rotary: tuple[Tensor, Tensor] | None = None
    on_attention: Callable[[AttentionMaps], None] | None = None


class Encoder(nn.Module, ABC):
    """A masked protein language model over packed sequences: what all families share."""

    lm_head: LanguageModelHead | None
    contact_head: AnyContactHead | None

    def __init__(self, config: EncoderConfig, *, activation: str, contact_head: bool) -> None:
        super().__init__()
        self.config = config
        self.alphabet = config.alphabet
        self.word_embeddings = blank_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.hidden_size,
                config.num_attention_heads,
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
        self.contact_head = ContactHead(config.num_hidden_layers, config.num_attention_heads) if contact_head else None

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """Tokens a sequence may have, BOS and EOS included; ``None`` without a limit."""

    @property
    @abstractmethod
    def trained_tokens(self) -> int:
        """Tokens the published models saw at a time in training, BOS and EOS included."""

    @abstractmethod
    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Input embeddings ``[T, D]``."""

    @abstractmethod
    def context(self, batch: PackedBatch) -> LayerContext:
        """What the layers need to know about this batch."""

    @abstractmethod
    def initial_parameter(self, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
        """The published initialisation of one parameter, float32 on the CPU."""

    def final(self, x: Tensor) -> Tensor:
        """The norm after the last layer, ``[T, D]``."""
        normed: Tensor = self.emb_layer_norm_after(x)
        return normed

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]`` from the final hidden states.

        Raises:
            CapabilityError: if the checkpoint came without a language-model head.
        """
        self.require("logits")
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(x, self.word_embeddings.weight)
        return logits

    def forward(
        self,
        batch: PackedBatch,
        on_hidden: HiddenObserver | None = None,
        on_attention: AttentionObserver | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            batch: the tokens.
            on_hidden: receives every hidden state as it arises.
            on_attention: receives every layer's attention maps, which are computed as it looks at them.

        Returns:
            The last hidden state after the final norm, ``[T, D]``.

        Raises:
            SequenceTooLongError: if a sequence has more tokens than the model has positions.
        """
        if self.max_tokens is not None and batch.max_length > self.max_tokens:
            raise SequenceTooLongError(
                f"a sequence of {batch.max_length} tokens exceeds the {self.max_tokens} positions of this "
                f"{self.config.family} model"
            )
        context = self.context(batch)
        x = self.embed_tokens(batch)
        for number, layer in enumerate(self.layers, start=1):
            if on_hidden is not None:
                on_hidden(number - 1, x)
            if on_attention is not None:
                context = replace(context, on_attention=partial(on_attention, number))
            x = layer(x, context)
        x = self.final(x)
        if on_hidden is not None:
            on_hidden(len(self.layers), x)
        return x

    @property
    def capabilities(self) -> frozenset[str]:
        """What this model can do beyond embedding: ``attention``, ``logits``, ``contacts``."""
        heads = {"logits": self.lm_head, "contacts": self.contact_head}
        return frozenset({"attention", *(name for name, head in heads.items() if head is not None)})

    def require(self, capability: str) -> None:
        """Check for a capability.

        Raises:
            CapabilityError: if the model lacks it, with the way out.
        """
        if capability not in self.capabilities:
            way_out = {
                "logits": "load a checkpoint saved with its language-model head (lm_head.*)",
                "contacts": "load a checkpoint with a contact head, or fit one: protea fit-contacts",
            }[capability]
            raise CapabilityError(f"this {self.config.family} model has no {capability}; {way_out}")
