"""ESM-1nv, NVIDIA's 44M-parameter model: Megatron's BERT with pre-norm blocks, for at most 512 tokens.

It has learned positions from 0, dropout in the embeddings, a tied head, and neither token dropout nor a mask of
embeddings. Sizes are from BioNeMo 1's ``base_config.yaml``. The rest is from NeMo 1's ``bert_model.py``, ``mlp.py`` and
``fused_bias_gelu.py``: with NeMo's defaults, blocks have the tanh form of GELU, the head has the exact one, and the
initialisation of residual projections is scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor
from torch.nn import functional as F

from protea.alphabet import ESM1NV as ESM1NV_ALPHABET
from protea.alphabet import Alphabet
from protea.errors import CheckpointError
from protea.models import esm_formats
from protea.models.esm_formats import gelu_is_tanh
from protea.models.family import Shapes, StoredAs, by_nvidia
from protea.models.layers import blank_embedding
from protea.models.transformer import Transformer, TransformerConfig
from protea.packing import PackedBatch


@dataclass(frozen=True, kw_only=True)
class ESM1nvConfig(TransformerConfig):
    """Configuration of ESM-1nv; the defaults are the published model.

    ``hidden_act`` is ``gelu_tanh`` (NeMo's fused bias-GELU) or ``gelu`` (exact). The attention dropout of 0.1 is NeMo's
    default; we could not verify that the published model was trained with it. Inference does not depend on it.
    """

    model_type: ClassVar[str] = "esm1nv"
    alphabet: ClassVar[Alphabet] = ESM1NV_ALPHABET

    num_hidden_layers: int = 6
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 128
    max_position_embeddings: int = 512
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    hidden_act: str = "gelu_tanh"

    family = "ESM-1nv"

    @property
    def max_tokens(self) -> int:
        """512 in the published model: 510 residues between BOS and EOS."""
        return self.max_position_embeddings

    @property
    def activation(self) -> str:
        """As configured."""
        return self.hidden_act

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act not in ("gelu", "gelu_tanh"):
            raise CheckpointError(f"hidden_act must be one of gelu, gelu_tanh, got {self.hidden_act!r}")


ESM1NV: Final = ESM1nvConfig()


def _from_nemo(described: Mapping[str, Any], sizes: dict[str, Any], shapes: Shapes) -> ESM1nvConfig:
    return ESM1nvConfig(
        **sizes,
        max_position_embeddings=shapes["position_embeddings.weight"][0],
        hidden_act="gelu_tanh" if gelu_is_tanh(described) else "gelu",
    )


_STORED: Final = {
    "hf": StoredAs(keys=esm_formats.HF, config=lambda described, sizes, shapes: ESM1nvConfig(**sizes)),
    "nemo": StoredAs(
        keys=esm_formats.NEMO,
        accepts=lambda described: described.get("position_embedding_type") in (None, "learned_absolute"),
        config=_from_nemo,
        describe=lambda config: {
            "name": "esm1nv",
            "position_embedding_type": "learned_absolute",
            "apply_query_key_layer_scaling": True,
            "bias_gelu_fusion": config.hidden_act == "gelu_tanh",
            "tokenizer": {"library": "sentencepiece", "vocab_file": "nemo:vocab.txt"},
        },
        padded=True,
    ),
}


class ESM1nv(Transformer):
    """ESM-1nv."""

    config_type = ESM1nvConfig
    stored = _STORED
    published = (by_nvidia("esm1nv", ESM1NV, "esm1nv"),)
    has_contact_head = zero_padding = False

    config: ESM1nvConfig

    def __init__(self, config: ESM1nvConfig) -> None:
        super().__init__(config)
        self.position_embeddings = blank_embedding(config.max_position_embeddings, config.hidden_size)

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word plus position embeddings, ``[T, D]``."""
        x = self.word_embeddings(batch.input_ids) + self.position_embeddings(batch.positions())
        return F.dropout(x, self.config.hidden_dropout_prob, self.training)

    def initial_std(self, name: str) -> float:
        """initializer_range, divided by sqrt(2 · layers) for projections into the residual stream."""
        scaled = name.endswith(("out_proj.weight", "fc2.weight"))
        return self.config.initializer_range / (math.sqrt(2 * self.config.num_hidden_layers) if scaled else 1.0)
