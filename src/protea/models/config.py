"""What a model of any family is configured by, and what follows from that: limits, attention maps, cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from protea.alphabet import Alphabet
from protea.errors import CheckpointError

LARGEST: Final = {
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
    """What every family is configured by; field names are those of Hugging Face's ``config.json``.

    Attributes:
        model_type: what ``config.json`` calls the family, or several related ones.
        alphabet: the tokens that the models know.
        required: fields that a ``config.json`` must have.
        absent: values of fields that a ``config.json`` leaves out, where they are not the defaults here.
        num_hidden_layers: layers.
        hidden_size: model width D.
        vocab_size: rows of the embedding matrix; more than the alphabet's tokens where it is padded.

    Raises:
        CheckpointError: a number is out of range, or the numbers do not fit together.
    """

    model_type: ClassVar[str]
    alphabet: ClassVar[Alphabet]
    required: ClassVar[tuple[str, ...]] = ("num_hidden_layers", "hidden_size", "vocab_size")
    absent: ClassVar[Mapping[str, Any]] = {}

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name, 1)  # not every family has all of them
            if not 1 <= value <= largest:
                raise CheckpointError(f"{name} must be from 1 to {largest:,}, got {value}")

    @property
    @abstractmethod
    def family(self) -> str:
        """What the field calls such models: ``ESM-2``, ``ESM-1v``, ..."""

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """Tokens a sequence may have, those of its frame included; ``None`` without a limit."""

    @property
    @abstractmethod
    def trained_tokens(self) -> int:
        """Tokens that the published models saw at a time in training, those of the frame included."""

    @property
    @abstractmethod
    def attention_heads(self) -> tuple[int, ...]:
        """Attention maps of each layer; 0 for a layer without attention."""

    @property
    @abstractmethod
    def inference_values(self) -> int:
        """Numbers that a forward pass holds for a token at once."""

    @abstractmethod
    def forward_flops(self, length: float, predicted: float) -> float:
        """Floating-point operations of a token in a forward pass.

        Args:
            length: mean length of the sequence that a token is in, in tokens.
            predicted: share of tokens that the language-model head sees.
        """

    @abstractmethod
    def activation_bytes(self, length: float, *, mixed: bool, recompute: bool, on_cpu: bool) -> int:
        """Bytes that a token keeps in training for the backward pass.

        Args:
            length: mean length of the sequence that a token is in, in tokens.
            mixed: products are in 16 bits.
            recompute: layers keep only their inputs.
            on_cpu: trained on a CPU.
        """
