"""Checkpoints of other programs, built from the layouts' descriptions alone; nothing here uses our readers or writers.

Weights come as Hugging Face's state dictionary, which transformers' own code makes.
"""

from __future__ import annotations

import io
import json
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


def padded(rows: Tensor, multiple: int, fill: float = 0.0) -> Tensor:
    missing = -len(rows) % multiple
    return torch.cat([rows, torch.full((missing, *rows.shape[1:]), fill, dtype=rows.dtype)])


def fused(state: State, layer: int, kind: str, heads: int, *, interleaved: bool = True) -> Tensor:
    """Query, key and value in one: [heads][3][head width], as Megatron has it, or [3][all]."""
    parts = [state[f"esm.encoder.layer.{layer}.attention.self.{one}.{kind}"] for one in ("query", "key", "value")]
    if not interleaved:
        return torch.cat(parts)
    rows = []
    width = len(parts[0]) // heads
    for head in range(heads):
        for part in parts:
            rows.append(part[head * width : (head + 1) * width])  # noqa: PERF401
    return torch.cat(rows)


def depth(state: State) -> int:
    return len([key for key in state if key.endswith("attention.self.query.weight")])


# --- fair-esm ----------------------------------------------------------------------------------------------------


def write_fair_esm(path: Path, model: torch.nn.Module, described: dict[str, Any], **options: Any) -> None:
    """A model of Meta's package as Meta published it: prefixed, with the regression in a file of its own."""
    body: State = {}
    head: State = {}
    for key, value in model.state_dict().items():
        if key.startswith("contact_head."):
            head[key] = value
        else:
            body[f"encoder.{key}" if key.startswith("lm_head") else f"encoder.sentence_encoder.{key}"] = value
    torch.save({**described, "model": body}, path, **options)
    if head:
        torch.save({"model": head}, path.with_name(f"{path.stem}-contact-regression.pt"), **options)


def esm1_args(layers: int, width: int, heads: int, inner: int) -> Namespace:
    return Namespace(
        arch="roberta_large",
        encoder_layers=layers,
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=inner,
        encoder_attention_heads=heads,
        max_positions=1024,
        token_dropout=True,
        final_bias=True,
        data="/a/path",
        lr=[0.0001],
    )


# --- BioNeMo 1 ---------------------------------------------------------------------------------------------------

NEMO = {
    "attention.output.dense": "self_attention.dense",
    "attention.LayerNorm": "input_layernorm",
    "LayerNorm": "post_attention_layernorm",
    "intermediate.dense": "mlp.dense_h_to_4h",
    "output.dense": "mlp.dense_4h_to_h",
}


def nemo_state(state: State, heads: int) -> State:
    root = "model.language_model"
    out = {f"{root}.embedding.word_embeddings.weight": padded(state["esm.embeddings.word_embeddings.weight"], 128)}
    if "esm.embeddings.position_embeddings.weight" in state:
        out[f"{root}.embedding.position_embeddings.weight"] = state["esm.embeddings.position_embeddings.weight"]
    for layer in range(depth(state)):
        here = f"{root}.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            out[f"{here}.self_attention.query_key_value.{kind}"] = fused(state, layer, kind, heads)
            for theirs, name in NEMO.items():
                out[f"{here}.{name}.{kind}"] = state[f"esm.encoder.layer.{layer}.{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"{root}.encoder.final_layernorm.{kind}"] = state[f"esm.encoder.emb_layer_norm_after.{kind}"]
        out[f"model.lm_head.dense.{kind}"] = state[f"lm_head.dense.{kind}"]
        out[f"model.lm_head.layernorm.{kind}"] = state[f"lm_head.layer_norm.{kind}"]
    out["model.lm_head.bias"] = padded(state["lm_head.bias"], 128)
    frequencies = [value for key, value in state.items() if key.endswith("inv_freq")]
    if frequencies:
        out[f"{root}.rotary_pos_emb.inv_freq"] = frequencies[0]
    return out


def nemo_yaml(**options: Any) -> str:
    lines = [f"{key}: {value}" for key, value in options.items()]
    return "\n".join([*lines, "seq_length: 1024", "layernorm_epsilon: 1e-5", "data:", "  num_workers: 8", ""])


def write_nemo(path: Path, weights: dict[str, State], config: str) -> None:
    """A tar of the configuration and, by their names in it, weight files."""
    with tarfile.open(path, "w") as archive:
        members = {"./model_config.yaml": config.encode()}
        for name, state in weights.items():
            buffer = io.BytesIO()
            torch.save(state, buffer)
            members[name] = buffer.getvalue()
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def split_ranks(state: State, ranks: int) -> list[State]:
    """Tensor parallelism as Megatron cuts it: columns of the first projections, rows of the second."""
    out: list[State] = [{} for _ in range(ranks)]
    for key, value in state.items():
        first = ("query_key_value", "dense_h_to_4h", "word_embeddings")
        if any(one in key for one in first) or key == "model.lm_head.bias":
            parts = value.chunk(ranks, dim=0)
        elif key.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
            parts = value.chunk(ranks, dim=1)
        else:
            parts = (value,) * ranks
        for part, mine in zip(parts, out, strict=True):
            mine[key] = part.clone()
    return out


# --- BioNeMo 2 ---------------------------------------------------------------------------------------------------

NEMO2 = {
    "attention.output.dense.weight": "self_attention.linear_proj.weight",
    "attention.output.dense.bias": "self_attention.linear_proj.bias",
    "attention.LayerNorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attention.LayerNorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "LayerNorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "LayerNorm.bias": "mlp.linear_fc1.layer_norm_bias",
    "intermediate.dense.weight": "mlp.linear_fc1.weight",
    "intermediate.dense.bias": "mlp.linear_fc1.bias",
    "output.dense.weight": "mlp.linear_fc2.weight",
    "output.dense.bias": "mlp.linear_fc2.bias",
}


def nemo2_state(state: State, heads: int) -> tuple[State, list[State]]:
    """What stands outside the layers, and each layer's tensors."""
    outside = {
        "module.embedding.word_embeddings.weight": padded(state["esm.embeddings.word_embeddings.weight"], 128),
        "module.output_layer.bias": padded(state["lm_head.bias"], 128),
    }
    for kind in ("weight", "bias"):
        outside[f"module.encoder.final_layernorm.{kind}"] = state[f"esm.encoder.emb_layer_norm_after.{kind}"]
        outside[f"module.lm_head.dense.{kind}"] = state[f"lm_head.dense.{kind}"]
        outside[f"module.lm_head.layer_norm.{kind}"] = state[f"lm_head.layer_norm.{kind}"]
    layers = []
    for layer in range(depth(state)):
        here = {ours: state[f"esm.encoder.layer.{layer}.{theirs}"] for theirs, ours in NEMO2.items()}
        for kind in ("weight", "bias"):
            here[f"self_attention.linear_qkv.{kind}"] = fused(state, layer, kind, heads)
        layers.append(here)
    return outside, layers


def write_context(folder: Path, heads: int) -> None:
    (folder / "context").mkdir()
    (folder / "context" / "model.yaml").write_text(
        "_target_: bionemo.llm.lightning.BionemoLightningModule\n"
        f"config:\n  _target_: bionemo.esm2.model.model.ESM2Config\n  num_attention_heads: {heads}\n"
        "  params_dtype: !!python/object/apply:torch.float32 []\n"
    )


# --- TransformerEngine -------------------------------------------------------------------------------------------

TE = {
    "attention.output.dense.weight": "self_attention.proj.weight",
    "attention.output.dense.bias": "self_attention.proj.bias",
    "attention.LayerNorm.weight": "self_attention.layernorm_qkv.layer_norm_weight",
    "attention.LayerNorm.bias": "self_attention.layernorm_qkv.layer_norm_bias",
    "intermediate.dense.weight": "layernorm_mlp.fc1_weight",
    "intermediate.dense.bias": "layernorm_mlp.fc1_bias",
    "output.dense.weight": "layernorm_mlp.fc2_weight",
    "output.dense.bias": "layernorm_mlp.fc2_bias",
    "LayerNorm.weight": "layernorm_mlp.layer_norm_weight",
    "LayerNorm.bias": "layernorm_mlp.layer_norm_bias",
}


def write_te(
    folder: Path, state: State, config: dict[str, Any], *, prefix: str = "model.", interleaved: bool = True
) -> None:
    heads = config["num_attention_heads"]
    out = {
        f"{prefix}embeddings.word_embeddings.weight": padded(state["esm.embeddings.word_embeddings.weight"], 64),
        "lm_head.decoder.bias": padded(state["lm_head.bias"], 64, torch.finfo(torch.float32).min),
        "lm_head.decoder.layer_norm_weight": state["lm_head.layer_norm.weight"],
        "lm_head.decoder.layer_norm_bias": state["lm_head.layer_norm.bias"],
        "lm_head.dense.weight": state["lm_head.dense.weight"],
        "lm_head.dense.bias": state["lm_head.dense.bias"],
    }
    for kind in ("weight", "bias"):
        name = f"encoder.emb_layer_norm_after.{kind}"
        out[f"{prefix}{name}"] = state[f"esm.{name}"]
    for layer in range(depth(state)):
        here = f"{prefix}encoder.layers.{layer}."
        for theirs, name in TE.items():
            out[here + name] = state[f"esm.encoder.layer.{layer}.{theirs}"]
        for kind in ("weight", "bias"):
            key = f"{here}self_attention.layernorm_qkv.{kind}"
            out[key] = fused(state, layer, kind, heads, interleaved=interleaved)
    folder.mkdir()
    more = {"model_type": "nv_esm", "padded_vocab_size": 64, "qkv_weight_interleaved": interleaved}
    (folder / "config.json").write_text(json.dumps(config | more))
    save_file({key: value.contiguous().clone() for key, value in out.items()}, folder / "model.safetensors")
