"""fair-esm's heads, callable by scripts as in fair-esm: of the language model, and of contacts.

They are Protea's heads with another way to call them.

Shapes: B sequences, T tokens of the longest with padding, D width, V vocabulary, N layers, H heads.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from protea.compat.esm.data import EsmAlphabet
from protea.models.layers import ContactHead, LanguageModelHead

SHARED: Final = ("ContactPredictionHead", "RobertaLMHead", "apc", "gelu", "symmetrize")
"""What scripts find in ``esm.modules``."""

gelu: Final = nn.functional.gelu

_TINY: Final = torch.finfo(torch.float32).tiny


def symmetrize(x: Tensor) -> Tensor:
    """``x + xᵀ`` over the last two axes."""
    return x + x.mT


def apc(x: Tensor) -> Tensor:
    """Average product correction over the last two axes: ``x - r c / t``, r and c the sums of rows and columns."""
    return x - x.sum(-1, keepdim=True) * x.sum(-2, keepdim=True) / x.sum((-1, -2), keepdim=True)


class RobertaLMHead(LanguageModelHead):
    """The language-model head with its output matrix, the word embeddings, as ``weight``."""

    weight: nn.Parameter

    @classmethod
    def adopt(cls, head: LanguageModelHead, weight: nn.Parameter) -> None:
        """Make a head one of this class."""
        head.__class__ = cls
        head.weight = weight

    def forward(self, x: Tensor, word_embeddings: Tensor | None = None) -> Tensor:
        """``[..., D]`` to ``[..., V]``, in the type of the weights also under autocast, as in fair-esm."""
        return super().forward(x, self.weight).to(self.bias.dtype)


class ContactPredictionHead(ContactHead):
    """The contact head, which knows the alphabet's frame."""

    alphabet: EsmAlphabet

    @classmethod
    def adopt(cls, head: ContactHead, alphabet: EsmAlphabet) -> None:
        """Make a head one of this class."""
        head.__class__ = cls
        vars(head)["alphabet"] = alphabet

    def forward(self, tokens: Tensor, attentions: Tensor) -> Tensor:
        """Tokens ``[B, T]`` and maps ``[B, N, H, T, T]`` to probabilities between residues."""
        contacts = ContactSum(self, tokens)
        for maps in attentions.unbind(1):
            contacts.add(maps)
        return contacts.probabilities().to(attentions.dtype)


class ContactSum:
    """Contacts of a batch, added up layer by layer, with gradients.

    The formula is that of ``protea.contacts.predict``. As in fair-esm, BOS, EOS and padding take no part, and the
    columns of BOS and, if the alphabet has one, of the last EOS are cut off.
    """

    def __init__(self, head: ContactPredictionHead, tokens: Tensor) -> None:
        alphabet = head.alphabet
        keep = tokens.ne(alphabet.padding_idx)
        if alphabet.append_eos:
            keep = keep & tokens.ne(alphabet.eos_idx)
        inner = torch.zeros_like(keep)
        self._cut = slice(int(alphabet.prepend_bos), tokens.shape[1] - int(alphabet.append_eos))
        inner[:, self._cut] = True
        weight = head.regression.weight[0]
        self._wide = torch.promote_types(weight.dtype, torch.float32)
        self._keep = (keep & inner).to(self._wide)
        self._weights, self._bias = weight.to(self._wide), head.regression.bias.to(self._wide)
        self._maps_used = 0
        self._sums = self._corrections = torch.zeros((), dtype=self._wide, device=tokens.device)

    def add(self, maps: Tensor) -> None:
        """Add the maps ``[B, H, T, T]`` of the next layer."""
        maps, keep = maps.to(self._wide), self._keep
        weights = self._weights[self._maps_used : self._maps_used + maps.shape[1]]
        self._maps_used += maps.shape[1]
        self._sums = self._sums + torch.einsum("h,bhij->bij", weights, maps)
        rows = torch.einsum("bhij,bj->bhi", maps, keep) + torch.einsum("bhij,bi->bhj", maps, keep)
        rows = rows * keep[:, None]
        share = weights / rows.sum(-1).clamp_min(_TINY)
        self._corrections = self._corrections + torch.einsum("bhi,bhj->bij", rows * share[..., None], rows)

    def probabilities(self) -> Tensor:
        """``[B, T', T']``, where T' leaves out BOS and EOS; those of padding are the sigmoid of the bias."""
        both = (self._sums + self._sums.transpose(1, 2)) * self._keep[:, :, None] * self._keep[:, None]
        return (both - self._corrections + self._bias).sigmoid()[:, self._cut, self._cut]
