"""What ESM-1b, ESM-1v, ESM-2 and ESM-1nv share in checkpoint formats: names of tensors and meanings of settings.

Sources: transformers' ``EsmForMaskedLM`` and ``EsmConfig``, Meta's ``esm`` package, and NeMo 1's Megatron models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from protea.errors import CheckpointError
from protea.models.family import Keys
from protea.models.transformer import TransformerConfig

QKV: Final = ("layers.{}.self_attn.q_proj.*", "layers.{}.self_attn.k_proj.*", "layers.{}.self_attn.v_proj.*")

HF: Final[Keys] = {
    "word_embeddings.*": "esm.embeddings.word_embeddings.*",
    "position_embeddings.*": "esm.embeddings.position_embeddings.*",
    "emb_layer_norm_before.*": "esm.embeddings.layer_norm.*",
    "layers.{}.self_attn_layer_norm.*": "esm.encoder.layer.{}.attention.LayerNorm.*",
    "layers.{}.self_attn.q_proj.*": "esm.encoder.layer.{}.attention.self.query.*",
    "layers.{}.self_attn.k_proj.*": "esm.encoder.layer.{}.attention.self.key.*",
    "layers.{}.self_attn.v_proj.*": "esm.encoder.layer.{}.attention.self.value.*",
    "layers.{}.self_attn.out_proj.*": "esm.encoder.layer.{}.attention.output.dense.*",
    "layers.{}.final_layer_norm.*": "esm.encoder.layer.{}.LayerNorm.*",
    "layers.{}.fc1.*": "esm.encoder.layer.{}.intermediate.dense.*",
    "layers.{}.fc2.*": "esm.encoder.layer.{}.output.dense.*",
    "emb_layer_norm_after.*": "esm.encoder.emb_layer_norm_after.*",
    "lm_head.dense.*": "lm_head.dense.*",
    "lm_head.layer_norm.*": "lm_head.layer_norm.*",
    "lm_head.bias": "lm_head.bias",
    "contact_head.regression.*": "esm.contact_head.regression.*",
    # Readers expect the frequencies in every layer.
    "inv_freq": "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq",
}
"""The names in transformers, as version 4 spells them."""

HF_CLASSES: Final = ("EsmForMaskedLM", "EsmModel")  # with and without the language-model head

FAIR_ESM: Final[Keys] = {name: name for name in HF} | {
    "word_embeddings.*": "embed_tokens.*",
    "position_embeddings.*": "embed_positions.*",
    "inv_freq": "layers.{}.self_attn.rot_emb.inv_freq",
}
"""Meta's names, which are ours except for the embeddings, without the prefixes that Meta's loader removes."""

META_ROOTS: Final = ("encoder.sentence_encoder.", "encoder.")  # of the encoder and of its heads in Meta's files

_SUPPORTED: Final = {
    "is_folding_model": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
}
_NEMO_ROOT: Final = "model.language_model"
_NEMO_LAYER: Final = f"{_NEMO_ROOT}.encoder.layers.{{}}"

NEMO: Final[Keys] = {
    "word_embeddings.*": f"{_NEMO_ROOT}.embedding.word_embeddings.*",
    "position_embeddings.*": f"{_NEMO_ROOT}.embedding.position_embeddings.*",
    "layers.{}.self_attn_layer_norm.*": f"{_NEMO_LAYER}.input_layernorm.*",
    **dict.fromkeys(QKV, f"{_NEMO_LAYER}.self_attention.query_key_value.*"),
    "layers.{}.self_attn.out_proj.*": f"{_NEMO_LAYER}.self_attention.dense.*",
    "layers.{}.final_layer_norm.*": f"{_NEMO_LAYER}.post_attention_layernorm.*",
    "layers.{}.fc1.*": f"{_NEMO_LAYER}.mlp.dense_h_to_4h.*",
    "layers.{}.fc2.*": f"{_NEMO_LAYER}.mlp.dense_4h_to_h.*",
    "emb_layer_norm_after.*": f"{_NEMO_ROOT}.encoder.final_layernorm.*",
    "lm_head.dense.*": "model.lm_head.dense.*",
    "lm_head.layer_norm.*": "model.lm_head.layernorm.*",
    "lm_head.bias": "model.lm_head.bias",
    "inv_freq": f"{_NEMO_ROOT}.rotary_pos_emb.inv_freq",
}
"""Megatron's names as NeMo 1 wraps them."""


def esm_positions(described: Mapping[str, Any]) -> str:
    """``rotary`` or ``absolute``, from a ``config.json`` of transformers' ``esm``.

    Raises:
        CheckpointError: the model needs a feature that Protea does not support.
    """
    for key, supported in _SUPPORTED.items():
        if described.get(key) not in (None, supported):
            raise CheckpointError(f"{key} {described[key]!r} is not supported; expected {supported!r}")
    if not isinstance(described.get("emb_layer_norm_before"), bool | None):
        raise CheckpointError(f"emb_layer_norm_before must be of type bool, got {described['emb_layer_norm_before']!r}")
    position = described.get("position_embedding_type", "absolute")
    if position not in ("rotary", "absolute"):
        raise CheckpointError(f"position_embedding_type {position!r} is not supported; expected 'rotary' or 'absolute'")
    if position == "rotary" and described.get("emb_layer_norm_before"):
        raise CheckpointError("emb_layer_norm_before is not supported with rotary positions")
    return str(position)


def esm_config(position: str, *, norm_before: bool) -> dict[str, Any]:
    """What transformers expects in the ``config.json`` of an ``esm`` model beside its sizes."""
    return {
        "position_embedding_type": position,
        "emb_layer_norm_before": norm_before,
        "is_folding_model": False,
        "esmfold_config": None,
        "vocab_list": None,
        "use_cache": True,
    }


def tokenizer_files(config: TransformerConfig) -> dict[str, Any]:
    """The files, beside the vocabulary, from which transformers makes its tokenizer for ESM."""
    alphabet = config.alphabet
    names = ("unk_token", "cls_token", "pad_token", "mask_token", "eos_token")
    ids = (alphabet.unk, alphabet.bos, alphabet.pad, alphabet.mask, alphabet.eos)
    special = {name: alphabet.tokens[i] for name, i in zip(names, ids, strict=True) if i is not None}
    return {"special_tokens_map.json": special, "tokenizer_config.json": special | {"tokenizer_class": "EsmTokenizer"}}


def meta_epsilon(config: TransformerConfig) -> str | None:
    """The reason why Meta's classes cannot hold a model whose norms have another epsilon; ``None`` if they can."""
    if config.layer_norm_eps == 1e-5:
        return None
    return f"Meta's classes norm with epsilon 1e-05, this model with {config.layer_norm_eps:g}"


def gelu_is_tanh(described: Mapping[str, Any]) -> bool:
    """Whether NeMo 1 used the tanh form of GELU, which its fused bias-GELU has; that is its default."""
    return bool(described.get("bias_gelu_fusion", True)) and not described.get("esm_gelu", False)
