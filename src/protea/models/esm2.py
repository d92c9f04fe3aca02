"""ESM-2 (Lin et al. 2023, Science 379:1123) and NVIDIA's ESM-2nv, which has the same architecture.

Pre-norm transformer with rotary positions and token dropout. Follows Meta's ``esm/model/esm2.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from torch import Tensor

from protea.alphabet import ESM, Alphabet
from protea.errors import CheckpointError
from protea.models.encoder import Encoder, EncoderConfig, LayerContext
from protea.models.layers import initial_parameter, inverse_frequencies, rotary_angles, token_dropout
from protea.packing import PackedBatch


@dataclass(frozen=True, kw_only=True)
class ESM2Config(EncoderConfig):
    """Configuration of an ESM-2 model.

    ``vocab_size`` above 33 means rows of padding, as NVIDIA's checkpoints have. ``max_position_embeddings`` is
    what the published files carry; rotary models have no limit and ignore it.
    """

    model_type: ClassVar[str] = "esm"
    alphabet: ClassVar[Alphabet] = ESM

    vocab_size: int = len(ESM)
    max_position_embeddings: int = 1026
    token_dropout: bool = True
    rope_theta: float = 10000.0

    @property
    def family(self) -> str:
        """``ESM-2``."""
        return "ESM-2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width % 2:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} makes heads "
                f"{self.head_width} wide; rotary positions need an even width"
            )
        if not 1 <= self.rope_theta <= 1e12:
            raise CheckpointError(f"rope_theta must be from 1 to 1e12, got {self.rope_theta}")


def _size(layers: int, width: int, heads: int) -> ESM2Config:
    return ESM2Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
    )


SIZES: Final = {
    "8M": _size(6, 320, 20),
    "35M": _size(12, 480, 20),
    "150M": _size(30, 640, 20),
    "650M": _size(33, 1280, 20),
    "3B": _size(36, 2560, 40),
    "15B": _size(48, 5120, 40),
    # Nobody published a 20B model: 15B's width, deepened until 12·layers·width² reaches 20·10⁹.
    "20B": _size(64, 5120, 40),
}


class ESM2(Encoder):
    """The model.

    ``inv_freq`` is a buffer because published checkpoints carry it, rounded to float16. It holds values from the
    start, on the meta device too, so that none can run with rotary frequencies that nobody set.
    """

    config: ESM2Config
    inv_freq: Tensor

    def __init__(self, config: ESM2Config) -> None:
        super().__init__(config, activation="gelu", contact_head=True)
        self.register_buffer("inv_freq", inverse_frequencies(config.head_width, config.rope_theta))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ESM2:
        """Move ``inv_freq`` between devices like everything else, but never round it to a narrower type."""
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = exact.to(self.inv_freq.device)
        return self

    @property
    def max_tokens(self) -> None:
        """Rotary positions have no end."""
        return None

    @property
    def trained_tokens(self) -> int:
        """1,024: crops of 1,022 residues between BOS and EOS."""
        return 1024

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings with token dropout, ``[T, D]``."""
        x: Tensor = self.word_embeddings(batch.input_ids)
        return token_dropout(x, batch, self.alphabet.mask) if self.config.token_dropout else x

    def context(self, batch: PackedBatch) -> LayerContext:
        """Boundaries and rotary angles, shared by all layers."""
        return LayerContext(batch.cu_seqlens, rotary=rotary_angles(batch.positions(), self.inv_freq))

    def initial_parameter(self, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
        """normal(0, initializer_range); the padding token's embedding is 0."""
        zero_row = self.alphabet.pad if name == "word_embeddings.weight" else None
        return initial_parameter(name, shape, generator, std=self.config.initializer_range, zero_row=zero_row)
