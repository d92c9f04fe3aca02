"""CARP (Yang et al. 2024, Cell Systems 15:286): a stack of dilated convolutions, ByteNet's encoder.

It follows ``sequence_models/convolutional.py`` and ``pretrained.py`` of Microsoft's sequence-models: no positions, no
BOS and EOS, a gap is the padding token, which convolutions do not see, and hidden states come before the last norm,
which belongs to the head.

Shapes: T tokens, D model width, I width of the convolutions, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.alphabet import Alphabet
from protea.errors import CheckpointError
from protea.models.convolution import Convolution, ConvolutionContext, reads
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig, Keys, Published, StoredAs
from protea.models.layers import LayerContext, blank_embedding
from protea.models.transformer import ACTIVATIONS
from protea.packing import PackedBatch

ALPHABET: Final = Alphabet(
    name="CARP",
    tokens=(*"ACDEFGHIKLMNPQRSTVWYBZXJOU*-", "<mask>", "<start>"),
    bos=None,
    eos=None,
    pad=27,
    unk=22,
    mask=28,
)
"""The 30 tokens of sequence-models; an unknown residue is X."""


@dataclass(frozen=True, kw_only=True)
class CARPConfig(EncoderConfig):
    """Configuration of a CARP model.

    Attributes:
        inner_width: width of the convolutions, D or half of it.
        embedding_width: width of the token embeddings, which a matrix makes D wide.
        max_dilation: the dilation doubles from layer to layer, and begins at 1 again after the last power of 2 so far.
    """

    model_type: ClassVar[str] = "carp"
    alphabet: ClassVar[Alphabet] = ALPHABET

    vocab_size: int = len(ALPHABET)
    inner_width: int
    embedding_width: int = 8
    kernel_size: int = 5
    max_dilation: int = 128
    hidden_act: str = "gelu"

    family = "CARP"
    max_tokens = None  # convolutions have no limit
    trained_tokens = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("inner_width", 1 << 20), ("embedding_width", 1 << 20), ("max_dilation", 1 << 20)):
            if not 1 <= getattr(self, name) <= most:
                raise CheckpointError(f"{name} must be from 1 to {most:,}, got {getattr(self, name)}")
        if self.kernel_size not in range(1, 100, 2):
            raise CheckpointError(f"kernel_size must be an odd number from 1 to 99, got {self.kernel_size}")
        if self.hidden_act not in ("relu", "gelu"):
            raise CheckpointError(f"activation {self.hidden_act!r} is not supported; expected 'relu' or 'gelu'")

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of each layer."""
        cycle = self.max_dilation.bit_length()
        return tuple(1 << (number % cycle) for number in range(self.num_hidden_layers))

    @property
    def distances(self) -> list[int]:
        """How far before or behind a token the kernels of all layers read, once for each weight."""
        return [distance for dilation in self.dilations for distance in reads(self.kernel_size, dilation)]

    @property
    def attention_heads(self) -> tuple[int, ...]:
        """No layer attends."""
        return (0,) * self.num_hidden_layers

    @property
    def inference_values(self) -> int:
        """The residual stream, its norm and its copy; the convolution's input, output, one of its shifts, and norms."""
        return 4 * self.hidden_size + 6 * self.inner_width

    def forward_flops(self, length: float, predicted: float) -> float:
        """4 · D · I a layer, 2 · I² for each weight of a kernel that stays within the sequence, and the head."""
        width, inner = self.hidden_size, self.inner_width
        read = sum(max(0.0, 1 - abs(distance) / length) for distance in self.distances)
        layers = self.num_hidden_layers * 4 * width * inner + 2 * inner**2 * read
        return layers + 2 * width * self.vocab_size * predicted

    def activation_bytes(self, length: float, *, mixed: bool, recompute: bool, on_cpu: bool) -> int:
        """Bytes that PyTorch keeps in each layer: x, the inputs of norms and activations, and the shifted inputs."""
        width, inner = self.hidden_size, self.inner_width
        layer = 4 * (2 * width + 4 * inner) + (2 if mixed else 4) * (width + (3 + self.kernel_size) * inner)
        layers = self.num_hidden_layers
        return 4 * width * layers + layer if recompute else layer * layers


def _size(layers: int, width: int, inner: int) -> CARPConfig:
    return CARPConfig(num_hidden_layers=layers, hidden_size=width, inner_width=inner)


SIZES: Final = {
    "600k": _size(16, 128, 64),
    "38M": _size(16, 1024, 512),
    "76M": _size(32, 1024, 512),
    "640M": _size(56, 1280, 1280),
}

_BLOCK: Final = "embedder.layers.{}"
_SEQUENCE_MODELS: Final[Keys] = {
    "word_embeddings.*": "embedder.embedder.*",
    "up_proj.*": "embedder.up_embedder.conv.*",
    "layers.{}.first_layer_norm.*": f"{_BLOCK}.sequence1.0.*",
    "layers.{}.fc1.*": f"{_BLOCK}.sequence1.2.conv.*",
    "layers.{}.conv_layer_norm.*": f"{_BLOCK}.sequence1.3.*",
    "layers.{}.conv.*": f"{_BLOCK}.conv.*",
    "layers.{}.final_layer_norm.*": f"{_BLOCK}.sequence2.0.*",
    "layers.{}.fc2.*": f"{_BLOCK}.sequence2.2.conv.*",
    "lm_head.layer_norm.*": "last_norm.*",
    "lm_head.out.*": "decoder.conv.*",
}


def _from_sequence_models(described: Mapping[str, Any], sizes: dict[str, Any], shapes: object) -> CARPConfig:
    return CARPConfig(
        num_hidden_layers=described["n_layers"],
        hidden_size=described["d_model"],
        inner_width=described["d_model"] // 2 if described["slim"] else described["d_model"],
        embedding_width=described["d_embed"],
        kernel_size=described["kernel_size"],
        max_dilation=described["r"],
        hidden_act=described["activation"],
    )


def _unsupported_by_sequence_models(config: CARPConfig) -> str | None:
    if config.inner_width not in (config.hidden_size, config.hidden_size // 2):
        return f"its class has convolutions of width D or D/2, this model of {config.inner_width}"
    return None


_STORED: Final = {
    "hf": StoredAs(
        keys={name: f"carp.{name}" for name in _SEQUENCE_MODELS},
        config=lambda described, sizes, shapes: CARPConfig(**sizes),
    ),
    "sequence-models": StoredAs(
        keys=_SEQUENCE_MODELS,
        config=_from_sequence_models,
        describe=lambda config: {
            "model": next((f"carp_{size}" for size, known in SIZES.items() if known == config), "carp"),
            "d_embed": config.embedding_width,
            "d_model": config.hidden_size,
            "n_layers": config.num_hidden_layers,
            "kernel_size": config.kernel_size,
            "activation": config.hidden_act,
            "slim": config.inner_width != config.hidden_size,
            "r": config.max_dilation,
        },
        unsupported=_unsupported_by_sequence_models,
    ),
}


class ByteNetLayer(nn.Module):
    """Two linear layers around a dilated convolution, with a norm and an activation before each of the three."""

    replaceable = True

    def __init__(self, config: CARPConfig, dilation: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.inner_width
        self.activate = ACTIVATIONS[config.hidden_act]
        self.first_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.conv_layer_norm = nn.LayerNorm(inner)
        self.conv = Convolution(inner, config.kernel_size, dilation)
        self.final_layer_norm = nn.LayerNorm(inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        assert isinstance(context, ConvolutionContext)
        y = self.fc1(self.activate(self.first_layer_norm(x)))
        y = self.conv(self.activate(self.conv_layer_norm(y)), context)
        added: Tensor = self.fc2(self.activate(self.final_layer_norm(y)))
        return x + added


class ConvolutionHead(nn.Module):
    """The last norm and the output matrix."""

    def __init__(self, config: CARPConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, V]``."""
        logits: Tensor = self.out(self.layer_norm(x))
        return logits


class CARP(Encoder):
    """CARP."""

    config_type = CARPConfig
    stored = _STORED
    published = tuple(
        Published(
            name=f"carp_{size}",
            config=config,
            publisher="Microsoft",
            licence="CC-BY-4.0 (not verified)",
            format="sequence-models",
            elsewhere=f"https://zenodo.org/record/6564798/files/carp_{size}.pt",
        )
        for size, config in SIZES.items()
    )
    lacks: ClassVar[Mapping[str, str]] = {"attention": "its layers are convolutions"}

    config: CARPConfig

    def __init__(self, config: CARPConfig) -> None:
        super().__init__(config)
        self.word_embeddings = blank_embedding(config.vocab_size, config.embedding_width)
        self.up_proj = nn.Linear(config.embedding_width, config.hidden_size)
        self.layers = nn.ModuleList(ByteNetLayer(config, dilation) for dilation in config.dilations)
        self.lm_head = ConvolutionHead(config)

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Word embeddings, made D wide, ``[T, D]``."""
        # A product of all tokens, not of all positions: an embedding then has the same bits in every pack.
        return F.embedding(batch.input_ids, self.up_proj(self.word_embeddings.weight))

    def context(self, batch: PackedBatch) -> LayerContext:
        """Which rows each weight of the kernels reads, and which of them are gaps."""
        return ConvolutionContext.of(batch, self.config.distances, self.alphabet.pad)

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[T, V]``."""
        self.require("logits")
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(x)
        return logits

    def initial_parameter(self, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
        """PyTorch's: norms 1 and 0, embeddings normal(0, 1) and 0 for the mask, others uniform by their inputs."""
        if "layer_norm" in name:
            return torch.full(shape, float(name.endswith("weight")))
        if name == "word_embeddings.weight":
            values = generator.standard_normal(shape).astype(np.float32)
            values[self.alphabet.mask] = 0.0
            return torch.from_numpy(values)
        weight = self.get_parameter(f"{name.rpartition('.')[0]}.weight")
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
        return torch.from_numpy(generator.uniform(-bound, bound, shape).astype(np.float32))
