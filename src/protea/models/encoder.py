"""The interface that every family implements, and the one forward pass that runs them all.

A family supplies ``embed_tokens``, ``context``, its ``layers`` and, if it has them, ``final`` and ``head``.
``Encoder.forward`` runs these and gives hidden states and attention maps to observers as they arise, so that only what
an observer keeps stays in memory. A layer is any module that maps ``[T, D]`` and a ``LayerContext`` to ``[T, D]``.

Shapes: T tokens, D model width, V vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from protea.alphabet import Alphabet
from protea.device import MIXED, QUANTIZED
from protea.errors import CapabilityError, SequenceTooLongError
from protea.models.attention import AttentionCall
from protea.models.family import EncoderConfig, Published, StoredAs
from protea.models.layers import AnyContactHead, LayerContext, chooses_rows
from protea.packing import PackedBatch, PackedRows

HiddenObserver = Callable[[int, Tensor], None]
"""Receives a layer number and its ``[T, D]`` output: 0 is the embedding, the last comes after ``final``."""

AttentionObserver = Callable[[int, AttentionCall], None]
"""Receives a layer number, from 1, and the layer's call of attention, which gives the maps of each sequence."""


class Encoder(nn.Module, ABC):
    """A protein language model over packed sequences; ``stored`` has an entry for each checkpoint format."""

    config_type: ClassVar[type[EncoderConfig]]
    stored: ClassVar[Mapping[str, StoredAs]]
    published: ClassVar[tuple[Published, ...]] = ()
    lacks: ClassVar[Mapping[str, str]] = {}
    """Why no model of the family has a capability, by capability."""
    mixed = False
    """Whether the layers multiply in bfloat16, and the rest is float32 (``protea.transforms.mixed``)."""
    quantized = False
    """Whether the layers multiply in int8 (``protea.transforms.quantized``)."""

    layers: nn.ModuleList
    lm_head: nn.Module | None
    contact_head: AnyContactHead | None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.lm_head = None
        self.contact_head = None

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
        """What follows the last layer, ``[T, D]``; by default nothing."""
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]`` from the final hidden states; ``CapabilityError`` without a language-model head."""
        self.require("logits")
        raise NotImplementedError

    # --- what all families share -----------------------------------------------------------------------------------

    def forward(
        self,
        batch: PackedBatch,
        on_hidden: HiddenObserver | None = None,
        on_attention: AttentionObserver | None = None,
        *,
        layers: range | None = None,
        x: Tensor | None = None,
        rows: PackedRows | None = None,
    ) -> Tensor:
        """Run all layers; returns the last hidden state after ``final``, ``[T, D]``. Checks the length of sequences.

        With ``layers``, only these run, and what they need of the rest: they begin with ``x``, the output of the layer
        before them, unless they are the first, and end with ``final`` if they are the last. With ``rows``, the last
        hidden state is that of these tokens, ``[R, D]``, and the last layer computes little else.
        """
        self.check_length(batch.cu_seqlens.max_length)
        context = self.context(batch)
        numbers = range(len(self.layers)) if layers is None else layers
        last = (len(self.layers) if layers is None else self.config.num_hidden_layers) - 1
        if x is None:
            x = self.embed_tokens(batch)
        for number in numbers:
            if on_hidden is not None:
                on_hidden(number, x)
            if on_attention is not None:
                context = replace(context, on_attention=partial(on_attention, number + 1))
            # By its name: a model may lack other layers.
            layer = self.layers.get_submodule(str(number))
            if number == last and rows is not None and len(rows) and chooses_rows(layer):
                context = replace(context, rows=rows)
            x = layer(x, context)
        if last not in numbers:
            return x
        if rows is not None and context.rows is None:
            x = x.index_select(0, rows.index)
        x = self.final(x)
        if on_hidden is not None:
            on_hidden(numbers.stop, x)
        return x

    def check_length(self, tokens: int) -> None:
        """Raise ``SequenceTooLongError`` if a sequence of so many tokens exceeds the model's positions."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            length, most = map(self.alphabet.frame.residues, (tokens, self.max_tokens))
            raise SequenceTooLongError(
                f"a sequence of {length:,} residues exceeds the {most:,} of this {self.config.family} model"
            )

    @property
    def alphabet(self) -> Alphabet:
        """The tokens that the model knows."""
        return self.config.alphabet

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that a sequence may have, with BOS and EOS; ``None`` without a limit."""
        return self.config.max_tokens

    @property
    def trained_tokens(self) -> int:
        """Most tokens of a sequence in the training of the published models, with BOS and EOS."""
        return self.config.trained_tokens

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the parameters and of hidden states, outside autocast."""
        return next(self.parameters()).dtype

    @property
    def precision(self) -> str:
        """What the model computes in, as ``--dtype`` spells it."""
        if self.quantized:
            return QUANTIZED
        return MIXED if self.mixed else str(self.compute_dtype).removeprefix("torch.")

    @property
    def stored_buffers(self) -> dict[str, Tensor]:
        """Buffers that checkpoints carry, by name."""
        # Not from state_dict(), which fails after a transform has replaced parameters.
        return {
            f"{owner}.{name}".lstrip("."): buffer
            for owner, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def buffer_origin(self, name: str) -> str:
        """For messages, where a buffer's values come from, such as `` from rope_theta 10000``."""
        return ""

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Replace a buffer."""
        owner, _, own_name = name.rpartition(".")
        setattr(self.get_submodule(owner), own_name, value)

    @property
    def restricted(self) -> Published | None:
        """The published model of this architecture whose licence forbids a use that users may not expect."""
        return next((known for known in self.published if known.restriction and known.config == self.config), None)

    @property
    def capabilities(self) -> frozenset[str]:
        """What this model can do beyond embedding: ``attention``, ``logits``, ``contacts``."""
        present = {
            "attention": any(self.config.attention_heads),
            "logits": self.lm_head is not None,
            "contacts": self.contact_head is not None,
        }
        return frozenset(name for name in present if present[name])

    def require(self, capability: str) -> None:
        """Raise ``CapabilityError`` with the reason and a way out if the model lacks a capability."""
        if capability not in self.capabilities:
            # By a string: the registry imports this module.
            raise CapabilityError(import_module("protea.models.registry").why_not(self, capability))
