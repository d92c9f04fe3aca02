"""ESM-1 (Rives et al. 2021, PNAS 118:e2016239118): pre-norm transformers with sinusoidal positions and no last norm.

They follow Meta's ``esm/model/esm1.py`` for ``arch == "protein_bert_base"``: embeddings are scaled by √D, every layer
adds one learned key and value behind those of a sequence, and the output matrix is not the word embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from protea.alphabet import Alphabet
from protea.models import esm_formats
from protea.models.attention import AttentionCall
from protea.models.family import Keys, Published, Shapes, StoredAs
from protea.models.layers import LayerContext, token_dropout
from protea.models.transformer import Transformer, TransformerConfig, TransformerLayer
from protea.packing import CuSeqlens, PackedBatch

ALPHABET: Final = Alphabet(
    name="ESM-1",
    tokens=(
        *("<null_0>", "<pad>", "<eos>", "<unk>"),
        *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
        *("<null_1>", "<cls>", "<mask>", "<sep>"),
    ),
    bos=32,
    pad=1,
    eos=None,
    unk=3,
    mask=33,
)
"""The 35 tokens of ESM-1; a sequence has a BOS and no EOS."""

# The first token's position: fairseq counts from the padding id.
_FIRST_POSITION: Final = ALPHABET.pad + 1


@dataclass(frozen=True, kw_only=True)
class ESM1Config(TransformerConfig):
    """Configuration of an ESM-1 model; ``final_bias`` says whether the output matrix has a bias."""

    model_type: ClassVar[str] = "esm1"
    alphabet: ClassVar[Alphabet] = ALPHABET

    vocab_size: int = len(ALPHABET)
    layer_norm_eps: float = 1e-12
    token_dropout: bool = False
    final_bias: bool = True

    family = "ESM-1"
    max_tokens = None  # sines have no limit
    trained_tokens = 1024  # crops of 1,023 residues after BOS

    def forward_flops(self, length: float, predicted: float) -> float:
        """As of other transformers, with one more key, and without the head's dense layer."""
        return super().forward_flops(length + 1, predicted) - 2 * self.hidden_size**2 * predicted


def _size(layers: int, width: int, heads: int) -> ESM1Config:
    return ESM1Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
    )


T6, T12, T34 = _size(6, 768, 12), _size(12, 768, 12), _size(34, 1280, 20)


def _published(name: str, config: ESM1Config) -> Published:
    files = "https://dl.fbaipublicfiles.com/fair-esm"
    return Published(
        name=name,
        config=config,
        publisher="Meta",
        licence="MIT",
        format="fair-esm",
        elsewhere=f"{files}/models/{name}.pt and {files}/regression/{name}-contact-regression.pt",
        contact_head=True,
    )


def _from_meta(described: Mapping[str, Any], sizes: dict[str, Any], shapes: Shapes) -> ESM1Config:
    return ESM1Config(
        **sizes, token_dropout=bool(described.get("token_dropout", False)), final_bias="lm_head.bias" in shapes
    )


def _unsupported_by_meta(config: ESM1Config) -> str | None:
    if config.layer_norm_eps == 1e-12:
        return None
    return f"Meta's class norms with epsilon 1e-12, this model with {config.layer_norm_eps:g}"


_ADDED: Final[Keys] = {
    "layers.{}.bias_k": "layers.{}.self_attn.bias_k",
    "layers.{}.bias_v": "layers.{}.self_attn.bias_v",
}

_STORED: Final = {
    "hf": StoredAs(
        keys={
            **esm_formats.HF,
            "layers.{}.bias_k": "esm.encoder.layer.{}.attention.self.bias_k",
            "layers.{}.bias_v": "esm.encoder.layer.{}.attention.self.bias_v",
            "lm_head.weight": "lm_head.weight",
        },
        config=lambda described, sizes, shapes: ESM1Config(**sizes),
    ),
    "fair-esm": StoredAs(
        keys={**esm_formats.FAIR_ESM, **_ADDED, "lm_head.weight": "embed_out", "lm_head.bias": "embed_out_bias"},
        accepts=lambda described: described["said_by"] == "args" and described.get("arch") == "protein_bert_base",
        config=_from_meta,
        describe=lambda config: {
            "said_by": "args",
            "arch": "protein_bert_base",
            "layers": config.num_hidden_layers,
            "embed_dim": config.hidden_size,
            "ffn_embed_dim": config.intermediate_size,
            "attention_heads": config.num_attention_heads,
            "token_dropout": config.token_dropout,
            "final_bias": config.final_bias,
        },
        unsupported=_unsupported_by_meta,
        roots=("decoder.", "decoder."),
        blanks=("embed_positions._float_tensor",),
    ),
}


@dataclass(frozen=True)
class _AddedKeys(LayerContext):
    """Boundaries of the keys with the added one of each sequence, and the row that each comes from; -1 is the added."""

    cu_keys: CuSeqlens | None = None
    key_rows: Tensor | None = None


class AddedKeyLayer(TransformerLayer):
    """A block whose attention has one more key and value in each sequence, which are parameters ``[1, 1, D]``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.bias_k, self.bias_v = (nn.Parameter(torch.empty(1, 1, config.hidden_size)) for _ in range(2))

    def call(self, q: Tensor, k: Tensor, v: Tensor, context: LayerContext) -> AttentionCall:
        """The call of attention with the added keys and values."""
        assert isinstance(context, _AddedKeys)
        assert context.cu_keys is not None
        k, v = (
            torch.cat((rows, added.view(1, *rows.shape[1:]).to(rows.dtype)))[context.key_rows]
            for rows, added in ((k, self.bias_k), (v, self.bias_v))
        )
        return replace(super().call(q, k, v, context), cu_k=context.cu_keys)


class ESM1(Transformer):
    """ESM-1."""

    config_type = ESM1Config
    stored = _STORED
    published = (
        *(_published(f"esm1_t34_670M_{data}", T34) for data in ("UR50S", "UR50D", "UR100")),
        _published("esm1_t12_85M_UR50S", T12),
        _published("esm1_t6_43M_UR50S", T6),
    )
    layer_type = AddedKeyLayer

    config: ESM1Config

    def __init__(self, config: ESM1Config) -> None:
        super().__init__(config)
        self.emb_layer_norm_after = nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.final_bias)

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings times √D, with token dropout if the model has it, plus positions, ``[T, D]``."""
        x: Tensor = math.sqrt(self.config.hidden_size) * self.word_embeddings(batch.input_ids)
        if self.config.token_dropout:
            x = token_dropout(x, batch, self.alphabet.mask)
        waves = sinusoids(batch.extent, self.config.hidden_size).to(x)
        return x + waves[batch.positions()]

    def context(self, batch: PackedBatch) -> LayerContext:
        """The boundaries of the sequences, and those of the keys."""
        cu, device = batch.cu_seqlens, batch.input_ids.device
        cu_keys = CuSeqlens.from_lengths([end - start + 1 for start, end in cu.spans()]).to(device)
        tokens = torch.arange(len(batch.input_ids), device=device)
        rows = torch.full((len(tokens) + len(batch),), -1, device=device)
        rows[tokens + batch.sequence_index()] = tokens
        return _AddedKeys(cu, cu_keys=cu_keys, key_rows=rows)

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]``."""
        self.require("logits")
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(x)
        return logits


def sinusoids(length: int, width: int) -> Tensor:
    """Sines, then cosines, of positions times frequencies from 1 to 1/10,000, ``[L, D]`` float32 on the CPU."""
    half = width // 2
    step = math.log(10_000) / max(1, half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * -step)
    positions = torch.arange(length, dtype=torch.float32, device="cpu") + _FIRST_POSITION
    angles = positions[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    return nn.functional.pad(waves, (0, width % 2))
