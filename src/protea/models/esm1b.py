"""ESM-1b (Rives et al. 2021, PNAS 118:e2016239118) and ESM-1v (Meier et al. 2021).

Pre-norm transformer with learned positions and token dropout; ESM-1b norms the embeddings before the first layer,
ESM-1v does not. Follows Meta's ``esm/model/esm1.py`` for ``arch == "roberta_large"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from torch import Tensor, nn

from protea.alphabet import ESM, Alphabet
from protea.errors import CheckpointError
from protea.models.encoder import Encoder, EncoderConfig, LayerContext
from protea.models.layers import blank_embedding, initial_parameter, token_dropout
from protea.packing import PackedBatch

_FIRST_POSITION: Final = ESM.pad + 1
"""Row of the first token: fairseq counts positions from the padding id, whose row stays 0."""


@dataclass(frozen=True, kw_only=True)
class ESM1bConfig(EncoderConfig):
    """Configuration of an ESM-1b or ESM-1v model."""

    model_type: ClassVar[str] = "esm"
    alphabet: ClassVar[Alphabet] = ESM

    vocab_size: int = len(ESM)
    max_position_embeddings: int = 1026
    token_dropout: bool = True
    emb_layer_norm_before: bool

    @property
    def family(self) -> str:
        """``ESM-1b``, or ``ESM-1v`` where embeddings are not normed."""
        return "ESM-1b" if self.emb_layer_norm_before else "ESM-1v"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_position_embeddings <= _FIRST_POSITION:
            raise CheckpointError(
                f"max_position_embeddings must exceed {_FIRST_POSITION}, got {self.max_position_embeddings}"
            )


def _650m(*, emb_layer_norm_before: bool) -> ESM1bConfig:
    return ESM1bConfig(
        num_hidden_layers=33,
        hidden_size=1280,
        num_attention_heads=20,
        intermediate_size=5120,
        emb_layer_norm_before=emb_layer_norm_before,
    )


ESM1B: Final = _650m(emb_layer_norm_before=True)
ESM1V: Final = _650m(emb_layer_norm_before=False)


class ESM1b(Encoder):
    """The model, ESM-1v included."""

    config: ESM1bConfig

    def __init__(self, config: ESM1bConfig) -> None:
        super().__init__(config, activation="gelu", contact_head=True)
        self.position_embeddings = blank_embedding(config.max_position_embeddings, config.hidden_size)
        self.emb_layer_norm_before = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.emb_layer_norm_before else None
        )

    @property
    def max_tokens(self) -> int:
        """1,024 in the published models: 1,022 residues between BOS and EOS."""
        return self.config.max_position_embeddings - _FIRST_POSITION

    @property
    def trained_tokens(self) -> int:
        """All there are positions for."""
        return self.max_tokens

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings with token dropout, plus positions, normed in ESM-1b, ``[T, D]``."""
        x: Tensor = self.word_embeddings(batch.input_ids)
        if self.config.token_dropout:
            x = token_dropout(x, batch, self.alphabet.mask)
        x = x + self.position_embeddings(batch.positions() + _FIRST_POSITION)
        return x if self.emb_layer_norm_before is None else self.emb_layer_norm_before(x)

    def context(self, batch: PackedBatch) -> LayerContext:
        """Boundaries only: positions are in the embeddings."""
        return LayerContext(batch.cu_seqlens)

    def initial_parameter(self, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
        """normal(0, initializer_range); the rows of padding are 0 in words and positions."""
        zero_row = self.alphabet.pad if "_embeddings." in name else None
        return initial_parameter(name, shape, generator, std=self.config.initializer_range, zero_row=zero_row)
