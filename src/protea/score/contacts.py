"""Contacts from attention: logistic regression on symmetrised, APC-corrected maps (Rao et al. 2020).

With a the attention of one head between residues, BOS and EOS left out, and s = a + aᵀ,

    apc = s - r rᵀ / t        r the row sums of s, t the sum of all
    p   = sigmoid(b + Σ over layers and heads of w · apc)

Both sums are linear in the maps, so they are added up as the layers come, head by head: of all there are one [L, L] of
weighted attention and one of weighted corrections, and memory grows with the length squared, whatever the model's size.

A model with a bilinear head (``BilinearContactHead``) gives them from its last hidden states.

Shapes: L residues, N layers, H heads, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.device import free_memory
from protea.embed.engine import FloatArray
from protea.errors import DeviceError, UsageError
from protea.models.attention_maps import AttentionMaps
from protea.models.encoder import AttentionObserver, Encoder
from protea.models.layers import ContactHead
from protea.packing import pack

_AT_ONCE: Final = 6
"""Maps ``[L, L]`` in float32 that are held while one is made, the model's own needs included; 5.3 were measured."""

_LEAST: Final = torch.finfo(torch.float32).tiny
"""What a sum of attention is divided by where there is none: all of it went to BOS and EOS."""


def contacts(model: Encoder, sequences: Sequence[NDArray[np.uint8]]) -> list[FloatArray]:
    """Probability ``[L, L]`` that two residues are in contact, for each sequence; computed as one pack.

    Args:
        model: with a contact head.
        sequences: ``[L]`` ids of residues each.

    Raises:
        CapabilityError: the model has no contact head.
        SequenceTooLongError: a sequence has more tokens than the model has positions.
        DeviceError: the maps would not fit into memory.
    """
    model.require("contacts")
    head = model.contact_head
    assert head is not None
    if reason := too_large(model, *(len(ids) for ids in sequences)):
        raise DeviceError(f"{reason}; predict contacts of parts of it, or on a machine with more")
    if isinstance(head, ContactHead):
        return _from_attention(model, head, sequences)
    with torch.inference_mode():
        return [head(x).sigmoid_().cpu().numpy() for x in _states(model, sequences)]


def too_large(model: Encoder, *lengths: int) -> str | None:
    """Why maps of some sequences together would not fit into memory; nothing if they do.

    Systems that promise more memory than they have end a program that believes them, without a word: ask before.
    """
    device = model.word_embeddings.weight.device
    needed, free = 4 * _AT_ONCE * sum(length**2 for length in lengths), free_memory(device)
    if needed <= free:
        return None
    return (
        f"contacts of {sum(lengths):,} residues take about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB "
        "are free"
    )


def _from_attention(model: Encoder, head: ContactHead, sequences: Sequence[NDArray[np.uint8]]) -> list[FloatArray]:
    """Layer by layer: of all heads, two ``[L, L]`` are kept."""
    regression = head.regression
    sums = [_Sum(len(ids), regression.weight.device) for ids in sequences]
    weights = regression.weight.float().view(model.config.num_hidden_layers, model.config.num_attention_heads)

    def add(number: int, maps: AttentionMaps) -> None:
        for one, heads in zip(sums, maps, strict=True):
            one.add((head[1:-1, 1:-1] for head in heads), weights[number - 1])

    with torch.inference_mode():
        _run(model, sequences, add)
        return [one.probabilities(regression.bias.float()) for one in sums]


def states(model: Encoder, sequence: NDArray[np.uint8]) -> Tensor:
    """``[L, D]`` float32 what a bilinear head sees: the last hidden states of residues, on the model's device.

    Args:
        model: of any family; needs no contact head.
        sequence: ``[L]`` ids of residues.
    """
    with torch.inference_mode():
        (x,) = _states(model, [sequence])
    # Autograd takes no tensors that inference made.
    return x.clone()


def features(model: Encoder, sequence: NDArray[np.uint8], pairs: tuple[Tensor, Tensor]) -> FloatArray:
    """``[P, N·H]`` what the regression sees of some pairs of residues: the corrected maps, layer by layer.

    Args:
        model: of any family; needs no contact head.
        sequence: ``[L]`` ids of residues.
        pairs: ``[P]`` rows and ``[P]`` columns.
    """
    columns: list[Tensor] = []

    def keep(_: int, maps: AttentionMaps) -> None:
        (heads,) = maps
        for head in heads:
            both = head[1:-1, 1:-1] + head[1:-1, 1:-1].T
            rows = both.sum(0)
            first, second = pairs
            columns.append(both[first, second] - rows[first] * rows[second] / rows.sum().clamp_min(_LEAST))

    with torch.inference_mode():
        _run(model, [sequence], keep)
        values: FloatArray = torch.stack(columns, dim=1).cpu().numpy()
    return values


def attention(
    model: Encoder, sequence: NDArray[np.uint8], layers: Sequence[int], heads: Sequence[int] | None
) -> FloatArray:
    """Attention ``[len(layers), len(heads), L+2, L+2]``, BOS and EOS included: row attends to column, rows sum to 1.

    Nothing but what is asked for is ever computed, a map at a time.

    Args:
        model: of any family.
        sequence: ``[L]`` ids of residues.
        layers: from 1; negative ones count from the last.
        heads: from 0; all by default.

    Raises:
        UsageError: a layer or head does not exist.
        SequenceTooLongError: more tokens than the model has positions.
    """
    last, width = model.config.num_hidden_layers, model.config.num_attention_heads
    chosen = list(range(width)) if heads is None else _whole_numbers(heads)
    wanted = _whole_numbers(layers)
    if not wanted or not all(1 <= abs(layer) <= last for layer in wanted):
        raise UsageError(f"attention is in layers 1 to {last}, or -{last} to -1; got {layers}")
    if not chosen or not all(0 <= head < width for head in chosen):
        raise UsageError(f"heads are 0 to {width - 1}; got {heads}")
    numbers = [layer + last + 1 if layer < 0 else layer for layer in wanted]
    found = np.empty((len(numbers), len(chosen), len(sequence) + 2, len(sequence) + 2), np.float32)

    def keep(number: int, maps: AttentionMaps) -> None:
        for place in (i for i, one in enumerate(numbers) if one == number):
            for i, head in enumerate(chosen):
                found[place, i] = maps.of(0, head).float().cpu().numpy()

    with torch.inference_mode():
        _run(model, [sequence], keep)
    return found


def _whole_numbers(values: Sequence[int]) -> list[int]:
    try:
        return [index(value) for value in values]
    except TypeError as error:
        raise UsageError(f"layers and heads are lists of whole numbers, as in [1, -1]; got {values!r}") from error


class _Sum:
    """What all heads of a sequence say together.

    Args:
        length: of the sequence, in residues.
        device: of the maps.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self._attention = torch.zeros(length, length, device=device)
        self._corrections = torch.zeros(length, length, device=device)

    def add(self, heads: Iterable[Tensor], weights: Tensor) -> None:
        """One layer: a map ``[L, L]`` for each head, and ``[H]``."""
        sums = []
        for head, weight in zip(heads, weights.tolist(), strict=True):
            self._attention.add_(head, alpha=weight)
            sums.append(head.sum(0) + head.sum(1))
        rows = torch.stack(sums)
        self._corrections.addmm_((rows * (weights / rows.sum(1).clamp_min(_LEAST))[:, None]).T, rows)

    def probabilities(self, bias: Tensor) -> FloatArray:
        logits = self._attention + self._attention.T - self._corrections + bias
        values: FloatArray = logits.sigmoid_().cpu().numpy()
        return values


def _states(model: Encoder, sequences: Sequence[NDArray[np.uint8]]) -> list[Tensor]:
    """Last hidden states ``[L, D]`` of the residues of each sequence."""
    states = torch.split(_run(model, sequences), [len(ids) + 2 for ids in sequences])
    return [x[1:-1].float() for x in states]


def _run(model: Encoder, sequences: Sequence[NDArray[np.uint8]], observe: AttentionObserver | None = None) -> Tensor:
    """One pack; its last hidden states."""
    batch = pack(sequences, bos=model.alphabet.bos, eos=model.alphabet.eos)
    states: Tensor = model(batch.to(model.word_embeddings.weight.device), on_attention=observe)
    return states
