"""The configuration that all families share, and what follows from it: limits, attention maps, cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from protea.alphabet import Alphabet
from protea.errors import CheckpointError

_MAX: Final = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 20,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 20,
    "max_position_embeddings": 1 << 30,
}
"""Far above any model. A damaged number above these gives an error before it can fill the memory."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ABC):
    """A model's configuration; field names are those of Hugging Face's ``config.json``.

    Numbers that are out of range or do not fit together are a ``CheckpointError``.

    Attributes:
        model_type: what ``config.json`` calls the family; related families may share it.
        required: fields that a ``config.json`` must have.
        absent: values of fields that a ``config.json`` leaves out, where they differ from the defaults here.
        vocab_size: rows of the embedding matrix; more than the alphabet's tokens if the matrix is padded.
    """

    model_type: ClassVar[str]
    alphabet: ClassVar[Alphabet]
    required: ClassVar[tuple[str, ...]] = ("num_hidden_layers", "hidden_size", "vocab_size")
    absent: ClassVar[Mapping[str, Any]] = {}

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, largest in _MAX.items():
            value = getattr(self, name, 1)  # some families lack some fields
            if not 1 <= value <= largest:
                raise CheckpointError(f"{name} must be from 1 to {largest:,}, got {value}")

    @property
    @abstractmethod
    def family(self) -> str:
        """The usual name of such models: ``ESM-2``, ``ESM-1v``, ..."""

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """Most tokens that a sequence may have, with BOS and EOS; ``None`` without a limit."""

    @property
    def trained_tokens(self) -> int:
        """Most tokens of a sequence in the training of the published models; a family without a limit overrides it."""
        assert self.max_tokens is not None
        return self.max_tokens

    @property
    @abstractmethod
    def attention_heads(self) -> tuple[int, ...]:
        """Attention maps of each layer; 0 for a layer without attention."""

    @property
    @abstractmethod
    def inference_values(self) -> int:
        """Numbers that a forward pass holds at once for each token."""

    @abstractmethod
    def forward_flops(self, length: float, predicted: float) -> float:
        """Floating-point operations for each token of a forward pass.

        ``length`` is the mean length, over tokens, of a token's sequence; ``predicted`` is the share of tokens that the
        language-model head computes.
        """

    @abstractmethod
    def activation_bytes(self, length: float, *, mixed: bool, recompute: bool, on_cpu: bool) -> int:
        """Bytes that training keeps for each token for the backward pass.

        With ``mixed``, matrix products use 16 bits; with ``recompute``, layers keep only their inputs.
        """
