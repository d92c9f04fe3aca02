"""ESM-1b (Rives et al. 2021, PNAS 118:e2016239118) and ESM-1v (Meier et al. 2021).

Pre-norm transformers with learned positions and token dropout. ESM-1b norms the embeddings before the first layer,
ESM-1v does not. They follow Meta's ``esm/model/esm1.py`` for ``arch == "roberta_large"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from torch import Tensor, nn

from protea.alphabet import ESM, Alphabet
from protea.errors import CheckpointError
from protea.models import esm_formats
from protea.models.esm_formats import esm_config, esm_positions
from protea.models.family import Shapes, StoredAs, by_meta
from protea.models.layers import blank_embedding, token_dropout
from protea.models.transformer import Transformer, TransformerConfig
from protea.packing import PackedBatch

# Row of the first token's position: fairseq counts from the padding id, whose row stays 0.
_FIRST_POSITION: Final = ESM.pad + 1


@dataclass(frozen=True, kw_only=True)
class ESM1bConfig(TransformerConfig):
    """Configuration of an ESM-1b or ESM-1v model."""

    model_type: ClassVar[str] = "esm"
    alphabet: ClassVar[Alphabet] = ESM
    absent: ClassVar[Mapping[str, Any]] = {
        **TransformerConfig.absent,
        "token_dropout": False,
        "emb_layer_norm_before": False,
    }

    vocab_size: int = len(ESM)
    max_position_embeddings: int = 1026
    token_dropout: bool = True
    emb_layer_norm_before: bool

    @property
    def family(self) -> str:
        """``ESM-1b``, or ``ESM-1v`` without a norm of the embeddings."""
        return "ESM-1b" if self.emb_layer_norm_before else "ESM-1v"

    @property
    def max_tokens(self) -> int:
        """1,024 in the published models: 1,022 residues between BOS and EOS."""
        return self.max_position_embeddings - _FIRST_POSITION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_position_embeddings <= _FIRST_POSITION:
            raise CheckpointError(
                f"max_position_embeddings must exceed {_FIRST_POSITION}, got {self.max_position_embeddings}"
            )


ESM1B: Final = ESM1bConfig(
    num_hidden_layers=33, hidden_size=1280, num_attention_heads=20, intermediate_size=5120, emb_layer_norm_before=True
)
ESM1V: Final = replace(ESM1B, emb_layer_norm_before=False)


def _from_meta(described: Mapping[str, Any], sizes: dict[str, Any], shapes: Shapes) -> ESM1bConfig:
    return ESM1bConfig(
        **sizes,
        max_position_embeddings=shapes["position_embeddings.weight"][0],
        token_dropout=bool(described.get("token_dropout", False)),
        emb_layer_norm_before="emb_layer_norm_before.weight" in shapes,
    )


_STORED: Final = {
    "hf": StoredAs(
        keys=esm_formats.HF,
        accepts=lambda described: esm_positions(described) == "absolute",
        config=lambda described, sizes, shapes: ESM1bConfig(**sizes),
        describe=lambda config: esm_config("absolute", norm_before=config.emb_layer_norm_before),
        classes=esm_formats.HF_CLASSES,
        tokenizer_files=esm_formats.tokenizer_files,
    ),
    "fair-esm": StoredAs(
        keys=esm_formats.FAIR_ESM,
        accepts=lambda described: described["said_by"] == "args" and described.get("arch") == "roberta_large",
        config=_from_meta,
        describe=lambda config: {
            "said_by": "args",
            "arch": "roberta_large",
            "encoder_layers": config.num_hidden_layers,
            "encoder_embed_dim": config.hidden_size,
            "encoder_ffn_embed_dim": config.intermediate_size,
            "encoder_attention_heads": config.num_attention_heads,
            "max_positions": config.max_tokens,
            "token_dropout": config.token_dropout,
            "final_bias": True,
        },
        roots=esm_formats.META_ROOTS,
        unsupported=esm_formats.meta_epsilon,
        # Meta's loader sets this row to 0 for models with token dropout. Only the output matrix uses the row.
        zeroed=lambda config: {"word_embeddings.weight": ESM.mask} if config.token_dropout else {},
    ),
}


class ESM1b(Transformer):
    """ESM-1b and ESM-1v."""

    config_type = ESM1bConfig
    stored = _STORED
    published = (
        by_meta("esm1b_t33_650M_UR50S", ESM1B),
        *(by_meta(f"esm1v_t33_650M_UR90S_{number}", ESM1V, contact_head=False) for number in range(1, 6)),
    )

    config: ESM1bConfig

    def __init__(self, config: ESM1bConfig) -> None:
        super().__init__(config)
        self.position_embeddings = blank_embedding(config.max_position_embeddings, config.hidden_size)
        self.emb_layer_norm_before = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.emb_layer_norm_before else None
        )

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings with token dropout, plus positions, normed in ESM-1b, ``[T, D]``."""
        x: Tensor = self.word_embeddings(batch.input_ids)
        if self.config.token_dropout:
            x = token_dropout(x, batch, self.alphabet.mask)
        x = x + self.position_embeddings(batch.positions() + _FIRST_POSITION)
        return x if self.emb_layer_norm_before is None else self.emb_layer_norm_before(x)
