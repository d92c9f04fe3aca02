"""Implementations to compare Protea with: two published ones, and plain implementations in float64.

Their computations share no code with the package; configurations, parameter names and the translation to Hugging
Face's names do. Weights are copied by our parameter names, which differ from those of Meta's ``esm`` only in the
embeddings.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.models.encoder import Encoder
from protea.models.esm1b import ESM1bConfig
from protea.models.esm1nv import ESM1nvConfig
from protea.models.esm2 import ESM2
from protea.models.esm_formats import HF
from protea.models.family import key_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import esm
    from esm.model.esm1 import ProteinBertModel
    from transformers import EsmConfig, EsmForMaskedLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

Outputs = tuple[list[Tensor], Tensor]
"""Hidden states ``[L+2, D]`` from the embedding to the last, and logits ``[L+2, V]``."""

FAIR_NAMES = {"word_embeddings.weight": "embed_tokens.weight", "position_embeddings.weight": "embed_positions.weight"}


def hf_name(name: str) -> str:
    """Return transformers' name for one of our parameters."""
    key = key_of(HF, name)
    assert key is not None
    return key[0]


# --- transformers ------------------------------------------------------------------------------------------------


def transformers_config(model: Encoder) -> EsmConfig:
    config = model.config
    rotary = isinstance(model, ESM2)
    return EsmConfig(
        vocab_size=config.vocab_size,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_eps=config.layer_norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type="rotary" if rotary else "absolute",
        emb_layer_norm_before=isinstance(config, ESM1bConfig) and config.emb_layer_norm_before,
        token_dropout=True,
    )


def load_transformers(folder: Path) -> EsmForMaskedLM:
    model = EsmForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def run_transformers(model: EsmForMaskedLM, ids: Tensor) -> Outputs:
    tokens = ids[None]
    result = model(tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
    return [state[0] for state in result.hidden_states], result.logits[0]


# --- Meta's esm --------------------------------------------------------------------------------------------------


def new_fair_esm(model: Encoder) -> nn.Module:
    """Build a model of Meta's package with the same shape and its own initialisation."""
    config = model.config
    if isinstance(model, ESM2):
        return esm.ESM2(config.num_hidden_layers, config.hidden_size, config.num_attention_heads).eval()
    assert isinstance(config, ESM1bConfig)
    args = Namespace(
        arch="roberta_large",
        layers=config.num_hidden_layers,
        embed_dim=config.hidden_size,
        ffn_embed_dim=config.intermediate_size,
        attention_heads=config.num_attention_heads,
        max_positions=config.max_position_embeddings - 2,
        emb_layer_norm_before=config.emb_layer_norm_before,
        token_dropout=True,
        final_bias=True,
    )
    return ProteinBertModel(args, esm.data.Alphabet.from_architecture("roberta_large")).eval()


def from_fair_esm(fair: nn.Module, model: Encoder) -> None:
    """Give our model (on the meta device) the weights of Meta's model."""
    theirs = fair.state_dict()
    state = {name: theirs[FAIR_NAMES.get(name, name)] for name, _ in model.named_parameters()}
    if isinstance(model, ESM2):
        state["inv_freq"] = theirs["layers.0.self_attn.rot_emb.inv_freq"]
    model.load_state_dict(state, assign=True)


def to_fair_esm(model: Encoder) -> nn.Module:
    """Return Meta's model with our weights."""
    fair = new_fair_esm(model)
    state = {FAIR_NAMES.get(name, name): value for name, value in model.named_parameters()}
    state["lm_head.weight"] = state["embed_tokens.weight"]
    if isinstance(model, ESM2):
        for layer in range(model.config.num_hidden_layers):
            state[f"layers.{layer}.self_attn.rot_emb.inv_freq"] = model.inv_freq
    fair.load_state_dict(state)
    return fair


def run_fair_esm(model: nn.Module, ids: Tensor) -> Outputs:
    layers = list(range(len(model.layers) + 1))
    result = model(ids[None], repr_layers=layers)
    return [result["representations"][layer][0] for layer in layers], result["logits"][0]


# --- plain float64 implementations -------------------------------------------------------------------------------


def run_float64(model: Encoder, ids: Tensor) -> Outputs:
    """Compute ESM-2, ESM-1b or ESM-1v for one sequence, step by step as in the papers and Meta's code."""
    config: Any = model.config
    weights = {hf_name(name): value for name, value in model.named_parameters()}
    heads, eps = config.num_attention_heads, config.layer_norm_eps

    def get(name: str) -> Tensor:
        return weights[name].detach().double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + eps).sqrt() * get(f"{name}.weight") + get(f"{name}.bias")

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    length = len(ids)
    words = get("esm.embeddings.word_embeddings.weight")
    masked = ids == 32
    x = words[ids] * (~masked)[:, None] * (1 - 0.15 * 0.8) / (1 - masked.double().mean())
    if isinstance(model, ESM2):
        angles = torch.arange(length).double()[:, None] * model.inv_freq.double()[None]
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    else:
        x = x + get("esm.embeddings.position_embeddings.weight")[torch.arange(length) + 2]
        if config.emb_layer_norm_before:
            x = norm(x, "esm.embeddings.layer_norm")

    def turn(y: Tensor) -> Tensor:
        half = y.shape[-1] // 2
        return y * cos + torch.cat((-y[..., half:], y[..., :half]), -1) * sin

    states = [x]
    for number in range(config.num_hidden_layers):
        layer = f"esm.encoder.layer.{number}"
        y = norm(x, f"{layer}.attention.LayerNorm")
        q, k, v = (
            linear(y, f"{layer}.attention.self.{part}").view(length, heads, -1).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        q = q * q.shape[-1] ** -0.5
        if isinstance(model, ESM2):
            q, k = turn(q), turn(k)
        attention = (q @ k.transpose(1, 2)).softmax(-1) @ v
        x = x + linear(attention.transpose(0, 1).reshape(length, -1), f"{layer}.attention.output.dense")
        y = norm(x, f"{layer}.LayerNorm")
        x = x + linear(gelu(linear(y, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        states.append(x)
    states[-1] = norm(x, "esm.encoder.emb_layer_norm_after")
    y = norm(gelu(linear(states[-1], "lm_head.dense")), "lm_head.layer_norm")
    return states, y @ words.T + get("lm_head.bias")


class PlainESM1nv(nn.Module):
    """ESM-1nv after BioNeMo 1's configuration and NeMo's code, on padded batches, built from ``torch.nn`` only."""

    def __init__(self, config: ESM1nvConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.act = {"gelu_tanh": nn.GELU("tanh"), "gelu": nn.GELU()}[config.hidden_act]
        self.words = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.norms1 = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for _ in range(config.num_hidden_layers))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(config.num_hidden_layers)
        )
        self.norms2 = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for _ in range(config.num_hidden_layers))
        self.ups = nn.ModuleList(nn.Linear(width, config.intermediate_size) for _ in range(config.num_hidden_layers))
        self.downs = nn.ModuleList(nn.Linear(config.intermediate_size, width) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.LayerNorm(width, eps=1e-5)
        self.dense = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def take(self, model: Encoder) -> PlainESM1nv:
        """Copy our model's weights."""
        ours = model.state_dict()
        with torch.no_grad():
            self.words.weight.copy_(ours["word_embeddings.weight"])
            self.positions.weight.copy_(ours["position_embeddings.weight"])
            for number, attention in enumerate(self.attentions):
                layer = f"layers.{number}"
                for kind in ("weight", "bias"):
                    parts = [ours[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                    getattr(attention, f"in_proj_{kind}").copy_(torch.cat(parts))
                    getattr(attention.out_proj, kind).copy_(ours[f"{layer}.self_attn.out_proj.{kind}"])
                    getattr(self.norms1[number], kind).copy_(ours[f"{layer}.self_attn_layer_norm.{kind}"])
                    getattr(self.norms2[number], kind).copy_(ours[f"{layer}.final_layer_norm.{kind}"])
                    getattr(self.ups[number], kind).copy_(ours[f"{layer}.fc1.{kind}"])
                    getattr(self.downs[number], kind).copy_(ours[f"{layer}.fc2.{kind}"])
            for kind in ("weight", "bias"):
                getattr(self.last_norm, kind).copy_(ours[f"emb_layer_norm_after.{kind}"])
                getattr(self.dense, kind).copy_(ours[f"lm_head.dense.{kind}"])
                getattr(self.head_norm, kind).copy_(ours[f"lm_head.layer_norm.{kind}"])
            self.bias.copy_(ours["lm_head.bias"])
        return self

    def forward(self, ids: Tensor, padding: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        states = [x]
        for norm1, attention, norm2, up, down in zip(
            self.norms1, self.attentions, self.norms2, self.ups, self.downs, strict=True
        ):
            y = norm1(x)
            x = x + attention(y, y, y, key_padding_mask=padding, need_weights=True)[0]
            x = x + down(self.act(up(norm2(x))))
            states.append(x)
        states[-1] = self.last_norm(x)
        y = self.head_norm(F.gelu(self.dense(states[-1])))
        return states, y @ self.words.weight.T + self.bias
