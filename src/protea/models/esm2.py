"""ESM-2 (Lin et al. 2023, Science 379:1123) and NVIDIA's ESM-2nv, which has the same architecture.

Pre-norm transformers with rotary positions and token dropout. They follow Meta's ``esm/model/esm2.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from torch import Tensor

from protea import bundled
from protea.alphabet import ESM, Alphabet
from protea.errors import CheckpointError
from protea.models import esm_formats
from protea.models.esm_formats import QKV, esm_config, esm_positions, gelu_is_tanh
from protea.models.family import Keys, Published, Shapes, StoredAs, by_meta, by_nvidia, te_recipe
from protea.models.layers import token_dropout
from protea.models.transformer import RotaryConfig, RotaryTransformer
from protea.packing import PackedBatch


@dataclass(frozen=True, kw_only=True)
class ESM2Config(RotaryConfig):
    """Configuration of an ESM-2 model.

    ``vocab_size`` above 33 means rows of padding, as in NVIDIA's checkpoints. ``max_position_embeddings`` is only
    copied to and from files; rotary positions have no limit.
    """

    model_type: ClassVar[str] = "esm"
    alphabet: ClassVar[Alphabet] = ESM
    absent: ClassVar[Mapping[str, Any]] = {**RotaryConfig.absent, "token_dropout": False}

    vocab_size: int = len(ESM)
    max_position_embeddings: int = 1026
    token_dropout: bool = True

    family = "ESM-2"
    trained_tokens = 1024  # crops of 1,022 residues, with BOS and EOS


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
    # Nobody published a 20B model. This one has the width of 15B, and enough layers for 12·layers·width² = 20·10⁹.
    "20B": _size(64, 5120, 40),
}

# NVIDIA's names, sizes, pages in its catalogue, and SHA-256 from BioNeMo's bionemo-core/data/resources/esm2.yaml.
_NEMO1_FILES: Final = (  # the vocabulary padded from 33 rows to 128
    ("esm2nv_650M", "650M", "esm2nv650m", "1e38063cafa808306329428dd17ea6df78c9e5d6b3d2caf04237c555a1f131b7"),
    ("esm2nv_3B", "3B", "esm2nv3b", ""),
    ("esm2nv_15B", "15B", "", ""),
    ("esm2nv_20B", "20B", "", ""),
)
_NEMO2_ARCHIVES: Final = (  # NVIDIA converted 2.0 from Meta's weights and trained 2.1 itself
    ("esm2nv8m:2.0", "8M", "esm2nv8m", "2957b2c36d5978d0f595d6f1b72104b312621cf0329209086537b613c1c96d16"),
    ("esm2nv650m:2.0", "650M", "esm2nv650m", "0798767e843e3d54315aef91934d28ae7d8e93c2849d5fcfbdf5fac242013997"),
    ("esm2nv3b:2.0", "3B", "esm2nv3b", "a2248cfed1ef39f83bd32a0e08b84c0a8f39325d383e2d92767022ff7f5260ed"),
    ("esm2nv650m:2.1", "650M", "esm2nv650m", "b83e9b5d62f1499b443817c5cd0facd3bdd4013a51a897e05e17228bf650befe"),
    ("esm2nv3b:2.1", "3B", "esm2nv3b", "a79327a4054bf8d1d7075e1b3c961dbc503da02d72ed15f707d9cbbd49d181b6"),
)


def _published() -> Iterator[Published]:
    yield Published(
        name=bundled.NAME,
        config=replace(SIZES["8M"], num_attention_heads=5),
        publisher="Protea",
        licence="Apache-2.0",
        format="hf",
        elsewhere="comes with the package",
        contact_head=True,
    )
    weights = [(size, f"esm2_t{config.num_hidden_layers}_{size}_UR50D") for size, config in SIZES.items()]
    weights.pop()  # nobody published weights of 20B
    yield from (by_meta(name, SIZES[size]) for size, name in weights)
    for name, size, page, sha256 in _NEMO1_FILES:
        yield by_nvidia(name, replace(SIZES[size], vocab_size=128), page, sha256=sha256)
    for name, size, page, sha256 in _NEMO2_ARCHIVES:
        yield by_nvidia(name, SIZES[size], page, "nemo2", sha256)
    yield from (te_recipe(f"nvidia/{name}", SIZES[size]) for size, name in weights)


def _unsupported_by_meta(config: ESM2Config) -> str | None:
    if config.intermediate_size != 4 * config.hidden_size:
        return f"Meta's ESM-2 has feed-forward layers of 4 times the width, this model of {config.intermediate_size}"
    return esm_formats.meta_epsilon(config)


def _from_nemo(described: Mapping[str, Any], sizes: dict[str, Any], shapes: Shapes) -> ESM2Config:
    if gelu_is_tanh(described):
        raise CheckpointError("bias_gelu_fusion without esm_gelu: ESM-2 with the tanh form of GELU is not supported")
    return ESM2Config(**sizes, token_dropout=bool(described.get("embedding_token_dropout", False)))


_NEMO2: Final[Keys] = {
    "word_embeddings.*": "embedding.word_embeddings.*",
    "layers.{}.self_attn_layer_norm.*": "encoder.layers.self_attention.linear_qkv.layer_norm_*",
    **dict.fromkeys(QKV, "encoder.layers.self_attention.linear_qkv.*"),
    "layers.{}.self_attn.out_proj.*": "encoder.layers.self_attention.linear_proj.*",
    "layers.{}.final_layer_norm.*": "encoder.layers.mlp.linear_fc1.layer_norm_*",
    "layers.{}.fc1.*": "encoder.layers.mlp.linear_fc1.*",
    "layers.{}.fc2.*": "encoder.layers.mlp.linear_fc2.*",
    "emb_layer_norm_after.*": "encoder.final_layernorm.*",
    "lm_head.dense.*": "lm_head.dense.*",
    "lm_head.layer_norm.*": "lm_head.layer_norm.*",
    "lm_head.bias": "output_layer.bias",
}

_TE: Final[Keys] = {
    "word_embeddings.*": "model.embeddings.word_embeddings.*",
    "layers.{}.self_attn_layer_norm.*": "model.encoder.layers.{}.self_attention.layernorm_qkv.layer_norm_*",
    **dict.fromkeys(QKV, "model.encoder.layers.{}.self_attention.layernorm_qkv.*"),
    "layers.{}.self_attn.out_proj.*": "model.encoder.layers.{}.self_attention.proj.*",
    "layers.{}.final_layer_norm.*": "model.encoder.layers.{}.layernorm_mlp.layer_norm_*",
    "layers.{}.fc1.*": "model.encoder.layers.{}.layernorm_mlp.fc1_*",
    "layers.{}.fc2.*": "model.encoder.layers.{}.layernorm_mlp.fc2_*",
    "emb_layer_norm_after.*": "model.encoder.emb_layer_norm_after.*",
    "lm_head.dense.*": "lm_head.dense.*",
    "lm_head.layer_norm.*": "lm_head.decoder.layer_norm_*",
    "lm_head.bias": "lm_head.decoder.bias",
}

_STORED: Final = {
    "hf": StoredAs(
        keys=esm_formats.HF,
        accepts=lambda described: esm_positions(described) == "rotary",
        config=lambda described, sizes, shapes: ESM2Config(**sizes),
        describe=lambda config: esm_config("rotary", norm_before=False),
        classes=esm_formats.HF_CLASSES,
        tokenizer_files=esm_formats.tokenizer_files,
    ),
    "fair-esm": StoredAs(
        keys=esm_formats.FAIR_ESM,
        accepts=lambda described: described["said_by"] == "cfg",
        config=lambda described, sizes, shapes: ESM2Config(
            **sizes, token_dropout=bool(described.get("token_dropout", True))
        ),
        describe=lambda config: {
            "said_by": "cfg",
            "encoder_layers": config.num_hidden_layers,
            "encoder_embed_dim": config.hidden_size,
            "encoder_attention_heads": config.num_attention_heads,
            "token_dropout": config.token_dropout,
        },
        roots=esm_formats.META_ROOTS,
        unsupported=_unsupported_by_meta,
        prefix="esm2",
    ),
    "nemo": StoredAs(
        keys=esm_formats.NEMO,
        accepts=lambda described: described.get("position_embedding_type") == "rope",
        config=_from_nemo,
        describe=lambda config: {
            "name": "esm2nv",
            "position_embedding_type": "rope",
            "embedding_use_attention_mask": True,
            "embedding_token_dropout": config.token_dropout,
            "mask_token_id": ESM.mask,
            "normalize_attention_scores": False,
            "bias_gelu_fusion": False,
            "use_esm_attention": True,
            "esm_gelu": True,
            "tokenizer": {"library": "huggingface", "model_name": "facebook/esm2_t33_650M_UR50D", "mask_id": ESM.mask},
        },
    ),
    "nemo2": StoredAs(
        keys=_NEMO2,
        config=lambda described, sizes, shapes: ESM2Config(
            **sizes,
            token_dropout=described.get("token_dropout", True) is not False,
            rope_theta=described["rotary_base"],
        ),
        describe=lambda config: {
            "_target_": "bionemo.esm2.model.model.ESM2Config",
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "token_dropout": config.token_dropout,
            "layernorm_epsilon": config.layer_norm_eps,
            "hidden_dropout": config.hidden_dropout_prob,
            "attention_dropout": config.attention_probs_dropout_prob,
            "rotary_base": config.rope_theta,
            "make_vocab_size_divisible_by": 128,
            "position_embedding_type": "rope",
        },
    ),
    "te": StoredAs(
        keys=_TE,
        accepts=lambda described: esm_positions(described) == "rotary",
        config=lambda described, sizes, shapes: ESM2Config(**sizes),
        describe=lambda config: {"position_embedding_type": "rotary", "emb_layer_norm_before": False},
    ),
}


class ESM2(RotaryTransformer):
    """ESM-2 and ESM-2nv."""

    config_type = ESM2Config
    stored = _STORED
    published = tuple(_published())

    config: ESM2Config

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings with token dropout, ``[T, D]``."""
        x: Tensor = self.word_embeddings(batch.input_ids)
        return token_dropout(x, batch, self.alphabet.mask) if self.config.token_dropout else x
