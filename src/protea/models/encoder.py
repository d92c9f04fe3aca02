"""What every model is: an embedding, a stack of layers, what comes after them, perhaps heads, and one driver.

A family supplies ``embed_tokens``, ``context``, its ``layers`` and, where it has them, ``final`` and ``head``;
``Encoder.forward`` runs them and is the only forward pass there is. Hidden states and attention maps are handed to
observers as they arise, so that a caller keeps what it needs and nothing else stays in memory. A layer is any module
that takes ``[T, D]`` and a ``LayerContext``, with attention or without.

Shapes: T tokens, D model width, V vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from protea.alphabet import Alphabet
from protea.errors import CapabilityError, SequenceTooLongError
from protea.models.attention_maps import AttentionMaps
from protea.models.config import EncoderConfig
from protea.models.heads import AnyContactHead
from protea.models.layers import LayerContext
from protea.models.published import Published
from protea.models.stored import StoredAs
from protea.packing import PackedBatch

HiddenObserver = Callable[[int, Tensor], None]
"""Called with a layer number and its ``[T, D]`` output: 0 is the embedding, the last comes after ``final``."""

AttentionObserver = Callable[[int, AttentionMaps], None]
"""Called with a layer number, from 1, and the layer's attention maps."""


class Encoder(nn.Module, ABC):
    """A protein language model over packed sequences.

    Attributes:
        config_type: the class of the family's configurations.
        stored: how the family is kept in checkpoint formats, by their names.
        published: its published checkpoints.
        layers: modules from ``[T, D]`` and a ``LayerContext`` to ``[T, D]``.
        lm_head: the language-model head, if there is one.
        contact_head: the contact head, if there is one.
    """

    config_type: ClassVar[type[EncoderConfig]]
    stored: ClassVar[Mapping[str, StoredAs]]
    published: ClassVar[tuple[Published, ...]] = ()

    layers: nn.ModuleList
    lm_head: nn.Module | None
    contact_head: AnyContactHead | None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.lm_head = None
        self.contact_head = None

    @classmethod
    def build(cls, config: EncoderConfig) -> Self:
        """A model without weights, on the meta device, in evaluation mode; buffers have their values."""
        with torch.device("meta"):
            return cls(config).eval()

    # --- what a family supplies ------------------------------------------------------------------------------------

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
        """What comes after the last layer, ``[T, D]``: nothing, unless a family has more."""
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]`` from the final hidden states.

        Raises:
            CapabilityError: the model has no language-model head.
        """
        self.require("logits")
        raise NotImplementedError

    # --- what all of them do ---------------------------------------------------------------------------------------

    def forward(
        self,
        batch: PackedBatch,
        on_hidden: HiddenObserver | None = None,
        on_attention: AttentionObserver | None = None,
        *,
        start: int = 0,
        x: Tensor | None = None,
    ) -> Tensor:
        """Run all layers, or those from one on.

        Args:
            batch: the tokens.
            on_hidden: receives every hidden state as it arises.
            on_attention: receives every layer's attention maps, which are computed as it looks at them.
            start: layers that were run before; with any, ``x`` is needed.
            x: their output ``[T, D]``; without it, the embedding is computed.

        Returns:
            The last hidden state after ``final``, ``[T, D]``.

        Raises:
            SequenceTooLongError: a sequence has more tokens than the model has positions.
            ValueError: the model has no such layer, or its input is missing.
        """
        if not 0 <= start <= len(self.layers) or (start and x is None):
            raise ValueError(f"layers from {start} of {len(self.layers)}; those after the first need what comes before")
        self.check_length(batch.max_length)
        context = self.context(batch)
        if x is None:
            x = self.embed_tokens(batch)
        for number in range(start, len(self.layers)):
            if on_hidden is not None:
                on_hidden(number, x)
            if on_attention is not None:
                context = replace(context, on_attention=partial(on_attention, number + 1))
            x = self.layers[number](x, context)
        x = self.final(x)
        if on_hidden is not None:
            on_hidden(len(self.layers), x)
        return x

    def check_length(self, tokens: int) -> None:
        """See that the model has positions for a sequence.

        Raises:
            SequenceTooLongError: it has fewer than the sequence has tokens.
        """
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise SequenceTooLongError(
                f"a sequence of {tokens} tokens exceeds the {self.max_tokens} positions of this "
                f"{self.config.family} model"
            )

    @property
    def alphabet(self) -> Alphabet:
        """The tokens that the model knows."""
        return self.config.alphabet

    @property
    def max_tokens(self) -> int | None:
        """Tokens a sequence may have, those of its frame included; ``None`` without a limit."""
        return self.config.max_tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens that the published models saw at a time in training, those of the frame included."""
        return self.config.trained_tokens

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the model computes in, autocast apart."""
        return next(self.parameters()).dtype

    @property
    def stored_buffers(self) -> dict[str, Tensor]:
        """Buffers that checkpoints carry, by name; without a file's values they have the architecture's."""
        # state_dict() knows the same, and is refused where a transform has taken parameters away.
        return {
            f"{owner}.{name}".lstrip("."): buffer
            for owner, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def buffer_origin(self, name: str) -> str:
        """What a buffer is computed from, for messages, as in `` from rope_theta 10000``."""
        return ""

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Put a value in the place of a buffer's."""
        owner, _, own_name = name.rpartition(".")
        setattr(self.get_submodule(owner), own_name, value)

    @property
    def capabilities(self) -> frozenset[str]:
        """What this model can do beyond embedding: ``attention``, ``logits``, ``contacts``."""
        can = {
            "attention": any(self.config.attention_heads),
            "logits": self.lm_head is not None,
            "contacts": self.contact_head is not None,
        }
        return frozenset(name for name, there in can.items() if there)

    def require(self, capability: str) -> None:
        """Check for a capability.

        Raises:
            CapabilityError: the model lacks it; with the way out.
        """
        if capability not in self.capabilities:
            way_out = {
                "attention": "its layers do not attend; name a model of another family",
                "logits": "load a checkpoint saved with its language-model head (lm_head.*)",
                "contacts": "load a checkpoint with a contact head, or fit one: protea fit-contacts",
            }[capability]
            raise CapabilityError(f"this {self.config.family} model has no {capability}; {way_out}")
