"""The heads on top of an encoder: the language-model head and the two kinds of contact head.

Shapes: T tokens, D model width, V vocabulary rows, L length of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LanguageModelHead(nn.Module):
    """RoBERTa's head: dense, GELU, norm, then the word embeddings as output matrix, plus a bias.

    All families use the exact GELU: NeMo's ``BertLMHead`` has it although NeMo's blocks have the tanh form.
    """

    def __init__(self, width: int, vocab_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """``[T, D]`` and ``[V, D]`` to ``[T, V]``."""
        return F.linear(self.layer_norm(F.gelu(self.dense(x))), word_embeddings, self.bias)


class ContactHead(nn.Module):
    """Weights of the logistic regression from the attention maps of all layers to contacts (Rao et al. 2020)."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.regression = nn.Linear(maps, 1)


class BilinearContactHead(nn.Module):
    """Contact logits from the last hidden states h: (⟨P hᵢ, Q hⱼ⟩ + ⟨P hⱼ, Q hᵢ⟩) / 2 + b.

    No published model or checkpoint format has such a head; it is stored in a file beside the checkpoint.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.p_proj = nn.Linear(width, rank, bias=False)
        self.q_proj = nn.Linear(width, rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[L, L]``, float32 and symmetric, from the residues ``[L, D]`` of one sequence."""
        p, q = (F.linear(x.float(), projection.weight.float()) for projection in (self.p_proj, self.q_proj))
        products = p @ q.T
        return (products + products.T) / 2 + self.bias.float()


AnyContactHead = ContactHead | BilinearContactHead
