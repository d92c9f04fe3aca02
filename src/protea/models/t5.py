"""ProtT5 (Elnaggar et al. 2022, TPAMI 44:7112) and ProstT5 (Heinzinger et al. 2024): the encoder of T5.

They follow transformers' ``modeling_t5.py``: pre-norm blocks without biases, with root-mean-square norms and ReLU; the
query is not scaled, and the first block's table of biases by distance is added to the scores of all blocks. Every
checkpoint has its own vocabulary, which its tokenizer's files state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from protea.alphabet import Alphabet
from protea.errors import CheckpointError
from protea.models.family import Keys, StoredAs, on_hub
from protea.models.layers import LayerContext, blank_embedding
from protea.models.transformer import Transformer, TransformerConfig
from protea.packing import PackedBatch

_EXTRA: Final = tuple(f"<extra_id_{number}>" for number in reversed(range(100)))
PUBLISHED_TOKENS: Final = ("<pad>", "</s>", "<unk>", *"ALGVSREDTIPKFQNYMHWCXBOUZ", *_EXTRA)
"""The vocabulary of the published ProtT5 models."""

_STANDARD: Final = "ACDEFGHIKLMNPQRSTVWY"
_TO_X: Final = "UZOB"
"""Letters that the authors replace by X, although the vocabulary has them."""

READS: Final = {"amino-acids": "<AA2fold>", "3di": "<fold2AA>"}
"""What letters mean, and the token that ProstT5 puts before such a sequence. 3Di states are lower-case tokens."""


def alphabet_of(tokens: tuple[str, ...], reads: str) -> Alphabet:
    """The alphabet of a vocabulary: its letters of one kind are residues, spelled in upper case."""
    lower = reads == "3di"
    letters = {
        token: token.upper() for token in tokens if len(token) == 1 and token.isalpha() and token.islower() == lower
    }
    spelled = [
        letters[token] if token in letters and token not in _TO_X else token if len(token) > 1 else f"<{token}>"
        for token in tokens
    ]
    missing = [letter for letter in (*_STANDARD, "X") if letter not in spelled and not (lower and letter == "X")]
    places = {token: number for number, token in enumerate(tokens)}
    if twice := [letter for letter in spelled if len(letter) == 1 and spelled.count(letter) > 1]:
        raise CheckpointError(f"not a protein vocabulary: several tokens are the letter {twice[0]}")
    missing += [token for token in ("<pad>", "</s>", "<unk>") if token not in places]
    if missing or len(tokens) > 255:
        raise CheckpointError(
            f"not a protein vocabulary: {len(tokens):,} tokens" + (f" without {', '.join(missing)}" if missing else "")
        )
    return Alphabet(
        name="ProtT5" if tokens == PUBLISHED_TOKENS else "ProtT5 (of the checkpoint)",
        tokens=tuple(spelled),
        bos=places.get(READS[reads]),
        eos=places["</s>"],
        pad=places["<pad>"],
        unk=places["<unk>"],
        mask=places.get("<extra_id_0>", places["<unk>"]),
    )


@dataclass(frozen=True, kw_only=True)
class T5Config(TransformerConfig):
    """Configuration of an encoder of T5.

    Attributes:
        head_width: width of a head, which need not be D over the number of heads.
        tokens: the vocabulary, as the tokenizer spells it, without its mark of a word's beginning.
        reads: what the letters of sequences mean, a key of ``READS``.
    """

    model_type: ClassVar[str] = "t5"
    alphabet: ClassVar[Alphabet] = alphabet_of(PUBLISHED_TOKENS, "amino-acids")
    linear_bias: ClassVar[bool] = False
    query_scale: ClassVar[float | None] = 1.0
    norm_type: ClassVar[type[nn.LayerNorm] | type[nn.RMSNorm]] = nn.RMSNorm
    spelled: ClassVar[Mapping[str, str]] = {
        "num_hidden_layers": "num_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "head_width": "d_kv",
        "intermediate_size": "d_ff",
        "layer_norm_eps": "layer_norm_epsilon",
    }
    absent: ClassVar[Mapping[str, Any]] = {"head_width": 64}

    head_width: int = 128
    vocab_size: int = len(PUBLISHED_TOKENS)
    layer_norm_eps: float = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    tokens: tuple[str, ...] = PUBLISHED_TOKENS
    reads: str = "amino-acids"

    max_tokens = None  # distances have no limit
    trained_tokens = 512

    @property
    def family(self) -> str:
        """``ProstT5`` if the vocabulary has its tokens."""
        return "ProtT5" if READS["amino-acids"] not in self.tokens else "ProstT5"

    @property
    def activation(self) -> str:
        """The published models have the first version's."""
        return "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.head_width <= 1 << 20:
            raise CheckpointError(f"head_width (d_kv) must be from 1 to {1 << 20:,}, got {self.head_width}")
        if self.reads not in READS:
            raise CheckpointError(f"reads must be one of {', '.join(READS)}, got {self.reads!r}")
        # The alphabet is the checkpoint's own, not the class's.
        object.__setattr__(self, "alphabet", alphabet_of(self.tokens, self.reads))
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or farthest <= buckets // 4:
            raise CheckpointError(
                "relative_attention_num_buckets must be an even number from 4, and a quarter of it below "
                f"relative_attention_max_distance; got {buckets} and {farthest}"
            )
        if self.vocab_size < len(self.tokens):
            raise CheckpointError(f"vocab_size {self.vocab_size} is smaller than the {len(self.tokens)} tokens")


PROT_T5_XL: Final = T5Config(
    num_hidden_layers=24, hidden_size=1024, num_attention_heads=32, head_width=128, intermediate_size=16384
)
_STATES: Final = "algvsredtipkfqnymhwc"
PROST_T5: Final = replace(
    PROT_T5_XL, vocab_size=150, tokens=(*PUBLISHED_TOKENS, *_STATES, READS["3di"], READS["amino-acids"])
)

_BLOCK: Final = "encoder.block.{}.layer"
_HF: Final[Keys] = {
    "word_embeddings.*": "shared.*",
    "relative_bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "layers.{}.self_attn_layer_norm.*": f"{_BLOCK}.0.layer_norm.*",
    "layers.{}.self_attn.q_proj.*": f"{_BLOCK}.0.SelfAttention.q.*",
    "layers.{}.self_attn.k_proj.*": f"{_BLOCK}.0.SelfAttention.k.*",
    "layers.{}.self_attn.v_proj.*": f"{_BLOCK}.0.SelfAttention.v.*",
    "layers.{}.self_attn.out_proj.*": f"{_BLOCK}.0.SelfAttention.o.*",
    "layers.{}.final_layer_norm.*": f"{_BLOCK}.1.layer_norm.*",
    "layers.{}.fc1.*": f"{_BLOCK}.1.DenseReluDense.wi.*",
    "layers.{}.fc2.*": f"{_BLOCK}.1.DenseReluDense.wo.*",
    "emb_layer_norm_after.*": "encoder.final_layer_norm.*",
    "contact_head.regression.*": "contact_head.regression.*",
}


def _from_hf(described: Mapping[str, Any], sizes: dict[str, Any], shapes: object) -> T5Config:
    if described.get("feed_forward_proj", "relu") != "relu":
        raise CheckpointError(f"feed_forward_proj {described['feed_forward_proj']!r} is not supported; expected 'relu'")
    return T5Config(**sizes)


def _tokenizer(config: T5Config) -> dict[str, Any]:
    """The files that transformers makes a tokenizer of, which expects blanks between letters."""
    plain = [token for token in config.tokens if len(token) == 1]
    special = [
        {"id": number, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for number, token in enumerate(config.tokens)
        if token not in plain
    ]
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    ending = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, mark]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": ending,
            "pair": [*ending, {"Sequence": {"id": "B", "type_id": 0}}, ending[1]],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [config.alphabet.eos], "tokens": ["</s>"]}},
        },
        "decoder": mark,
        "model": {
            "type": "Unigram",
            "unk_id": config.alphabet.unk,
            "vocab": [
                [f"▁{token}" if token in plain else token, -2.0 if token in plain else 0.0] for token in config.tokens
            ],
            "byte_fallback": False,
        },
    }
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": names | {"tokenizer_class": "PreTrainedTokenizerFast"},
    }


_STORED: Final = {
    "hf": StoredAs(
        keys=_HF,
        config=_from_hf,
        describe=lambda config: {
            "feed_forward_proj": "relu",
            "is_encoder_decoder": False,
            "eos_token_id": config.alphabet.eos,
            "use_cache": False,
        },
        classes=("T5EncoderModel", "T5EncoderModel"),
        repeats={"encoder.embed_tokens.weight": "shared.weight"},
        outside=r"(decoder|lm_head)\..*",
        tokenizer_files=_tokenizer,
    )
}


class T5(Transformer):
    """The encoder of ProtT5 or ProstT5."""

    config_type = T5Config
    stored = _STORED
    published = (
        on_hub(
            "prot_t5_xl_uniref50", PROT_T5_XL, "Rostlab/prot_t5_xl_uniref50", publisher="Rostlab", licence="AFL-3.0"
        ),
        on_hub("prot_t5_xl_bfd", PROT_T5_XL, "Rostlab/prot_t5_xl_bfd", publisher="Rostlab", licence="AFL-3.0"),
        on_hub(
            "prot_t5_xl_half_uniref50-enc",
            PROT_T5_XL,
            "Rostlab/prot_t5_xl_half_uniref50-enc",
            publisher="Rostlab",
            licence="AFL-3.0",
        ),
        on_hub("ProstT5", PROST_T5, "Rostlab/ProstT5", publisher="Rostlab", licence="MIT"),
    )
    lacks: ClassVar[Mapping[str, str]] = {"logits": "its encoder has no language-model head"}
    has_contact_head = False

    config: T5Config

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.lm_head = None
        self.relative_bias = blank_embedding(config.relative_attention_num_buckets, config.num_attention_heads)

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings, ``[T, D]``."""
        x: Tensor = self.word_embeddings(batch.input_ids)
        return x

    def context(self, batch: PackedBatch) -> LayerContext:
        """The boundaries of the sequences, and what the distance of two tokens adds to their score."""
        longest = batch.cu_seqlens.max_length
        ahead = torch.arange(longest - 1, -longest, -1, device=batch.input_ids.device)
        buckets = distance_buckets(
            ahead, self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        )
        return LayerContext(batch.cu_seqlens, relative=self.relative_bias(buckets).T)

    def initial_std(self, name: str) -> float:
        """T5's: 1 for embeddings, and what keeps the scale of products for matrices."""
        config = self.config
        kind = name.rpartition(".weight")[0].rpartition(".")[2]
        fan_in = {"q_proj": config.hidden_size * config.head_width, "fc2": config.intermediate_size}
        fan_in |= {"out_proj": config.inner_width, "word_embeddings": 1}
        return float(fan_in.get(kind, config.hidden_size) ** -0.5)


def distance_buckets(ahead: Tensor, buckets: int, farthest: int) -> Tensor:
    """T5's bucket of each number of tokens that a key is ahead of its query; negative for keys behind it.

    Half of the buckets are for keys ahead. Of each half, one half is for single distances, the other for ranges that
    grow as powers, and everything from ``farthest`` on is in the last.
    """
    half = buckets // 2
    single = half // 2
    distance = ahead.abs()
    share = torch.log(distance.clamp_min(1).float() / single) / math.log(farthest / single)
    ranges = (single + (share * (half - single)).long()).clamp_max(half - 1)
    return torch.where(distance < single, distance, ranges) + half * (ahead > 0)
