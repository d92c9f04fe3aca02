"""A family outside the package that differs from the others in everything that the package could take for granted.

It has BOS but no EOS, its own alphabet, heads of a width that is not the model's width over their number, relative
positions as a bias of the scores, an additional key behind those of each sequence as in ESM-1, a convolution instead of
attention in the middle, no norm before the head, and an untied output matrix.

Shapes: T tokens, D model width, H heads, K head width, L tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.alphabet import Alphabet
from protea.models.attention import AttentionCall, attend
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig, Published, StoredAs
from protea.models.layers import ContactHead, LayerContext, blank_embedding
from protea.packing import CuSeqlens, PackedBatch

PLACE = "toy_family:Toy"

TOY = Alphabet(
    name="Toy",
    tokens=("<pad>", "<mask>", "<bos>", "<unk>", *"ACDEFGHIKLMNPQRSTVWYXBZ"),
    pad=0,
    mask=1,
    bos=2,
    eos=None,
    unk=3,
)


@dataclass(frozen=True, kw_only=True)
class ToyConfig(EncoderConfig):
    """Configuration of this family."""

    model_type: ClassVar[str] = "toy"
    alphabet: ClassVar[Alphabet] = TOY

    num_attention_heads: int
    head_width: int
    kernel_size: int = 3
    vocab_size: int = len(TOY)

    @property
    def family(self) -> str:
        return "Toy"

    @property
    def max_tokens(self) -> None:
        return None

    @property
    def trained_tokens(self) -> int:
        return 128

    @property
    def attention_heads(self) -> tuple[int, ...]:
        return tuple(0 if number == 1 else self.num_attention_heads for number in range(self.num_hidden_layers))

    @property
    def inference_values(self) -> int:
        return 8 * self.hidden_size

    def forward_flops(self, length: float, predicted: float) -> float:
        return 10 * self.hidden_size**2 + length * self.hidden_size + predicted * self.hidden_size * self.vocab_size

    def activation_bytes(self, length: float, *, mixed: bool, recompute: bool, on_cpu: bool) -> int:
        return 4 * 10 * self.hidden_size * self.num_hidden_layers


class ToyAttention(nn.Module):
    """Attention with an additional key and value behind those of each sequence."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.head_width
        self.head_width = width
        self.norm = nn.LayerNorm(config.hidden_size)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, heads * width) for _ in range(3))
        self.out_proj = nn.Linear(heads * width, config.hidden_size)
        self.bias_k = nn.Parameter(torch.empty(heads, width))
        self.bias_v = nn.Parameter(torch.empty(heads, width))

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        y = self.norm(x)
        shape = (-1, self.head_width)
        q, k, v = (project(y).unflatten(-1, shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q = q * self.head_width**-0.5
        cu = context.cu_seqlens
        spans = cu.spans()
        k, v = (
            torch.cat([part for start, end in spans for part in (rows[start:end], added[None].to(rows.dtype))])
            for rows, added in ((k, self.bias_k), (v, self.bias_v))
        )
        cu_k = CuSeqlens.from_lengths([end - start + 1 for start, end in spans]).to(x.device)
        call = AttentionCall(q, k, v, cu, cu_k, bias=context.bias)
        if context.on_attention is not None:
            context.on_attention(call)
        return x + self.out_proj(attend(call).flatten(-2))


class ToyConvolution(nn.Module):
    """A convolution along each sequence, which does not see the neighbours in the pack."""

    gain: Tensor

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.register_buffer("gain", torch.ones(1, device="cpu"))
        self.mix = nn.Conv1d(config.hidden_size, config.hidden_size, config.kernel_size, padding="same")

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        y = self.norm(x)
        mixed = [self.mix(y[start:end].T[None])[0].T for start, end in context.cu_seqlens.spans()]
        return x + self.gain * F.relu(torch.cat(mixed))


class ToyHead(nn.Module):
    """An untied output matrix."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(x)
        return logits


class Toy(Encoder):
    """A model of this family."""

    config_type = ToyConfig
    stored: ClassVar = {
        "hf": StoredAs(
            keys={
                "word_embeddings.*": "toy.words.*",
                "relative_bias": "toy.relative_bias",
                "distances": "toy.distances",
                "layers.{}.gain": "toy.block.{}.gain",
                **{
                    f"layers.{{}}.{name}.*": f"toy.block.{{}}.{name}.*"
                    for name in ("norm", "q_proj", "k_proj", "v_proj", "out_proj", "mix")
                },
                "layers.{}.bias_k": "toy.block.{}.bias_k",
                "layers.{}.bias_v": "toy.block.{}.bias_v",
                "lm_head.out.*": "head.*",
                "contact_head.regression.*": "contacts.*",
            },
            config=lambda described, sizes, shapes: ToyConfig(**sizes),
        )
    }
    published = (
        Published(
            name="toy_tiny",
            config=ToyConfig(num_hidden_layers=3, hidden_size=20, num_attention_heads=3, head_width=8),
            publisher="these tests",
            contact_head=True,
        ),
    )

    config: ToyConfig
    distances: Tensor

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.word_embeddings = blank_embedding(config.vocab_size, config.hidden_size)
        # Exponents i: a bias is learned for each distance 2^i and interpolated between them.
        self.register_buffer("distances", torch.arange(8, dtype=torch.float32, device="cpu"))
        self.relative_bias = nn.Parameter(torch.empty(config.num_attention_heads, 8))
        self.layers = nn.ModuleList(
            ToyAttention(config) if heads else ToyConvolution(config) for heads in config.attention_heads
        )
        self.lm_head = ToyHead(config)
        self.contact_head = ContactHead(sum(config.attention_heads))

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        x: Tensor = self.word_embeddings(batch.input_ids)
        return x

    def context(self, batch: PackedBatch) -> LayerContext:
        places = torch.arange(batch.cu_seqlens.max_length + 1, device=self.device)
        distance = (places[:-1, None] - places[None]).abs().clamp_min(1).float().log2()
        closeness = (1 - (distance[..., None] - self.distances).abs()).clamp_min(0)
        bias = (closeness @ self.relative_bias.float().T).permute(2, 0, 1)
        return LayerContext(batch.cu_seqlens, bias=bias)

    def head(self, x: Tensor) -> Tensor:
        self.require("logits")
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(x)
        return logits

    def initial_parameter(self, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        return torch.from_numpy(0.3 * generator.standard_normal(shape)).float()
