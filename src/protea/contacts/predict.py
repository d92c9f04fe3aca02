"""Contacts from attention: logistic regression on symmetrised, APC-corrected maps (Rao et al. 2020).

With a the attention of one head between residues, BOS and EOS left out, and s = a + aᵀ,

    apc = s - r rᵀ / t        r the row sums of s, t the sum of all
    p   = sigmoid(b + Σ over layers and heads of w · apc)

Both sums are linear in the maps, so they are added up as the layers come, head by head: of all there are one [L, L] of
weighted attention and one of weighted corrections, and memory grows with the length squared, whatever the model's size.

A model with a bilinear head (``BilinearContactHead``) gives them from its last hidden states.

Shapes: L residues, T tokens, H heads of a layer, M maps of all layers, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.device import free_memory
from protea.errors import DeviceError, UsageError
from protea.infer.runner import FloatArray, Job, Result, Runner, Wanted, check_finite
from protea.models.attention_maps import HeadMaps
from protea.models.encoder import Encoder
from protea.models.heads import ContactHead

_AT_ONCE: Final = 6
"""Maps ``[L, L]`` in float32 that are held while one is made, the model's own needs included; 5.3 were measured."""

_KEPT: Final = "kept"

_NAME: Final = "the sequence"
"""What messages call it where nobody says."""

_LEAST: Final = torch.finfo(torch.float32).tiny
"""What a sum of attention is divided by where there is none: all of it went to BOS and EOS."""


def contacts(model: Encoder, sequences: Sequence[NDArray[np.uint8]], name: str = _NAME) -> list[FloatArray]:
    """Probability ``[L, L]`` that two residues are in contact, for each sequence; computed as one pack.

    Args:
        model: with a contact head.
        sequences: ``[L]`` ids of residues each.
        name: what messages call them.

    Raises:
        CapabilityError: the model has no contact head.
        SequenceTooLongError: a sequence has more tokens than the model has positions.
        DeviceError: the maps would not fit into memory.
        NonFiniteError: the model gives infinities or NaN.
    """
    model.require("contacts")
    head = model.contact_head
    assert head is not None
    if reason := too_large(model, *(len(ids) for ids in sequences)):
        raise DeviceError(f"{reason}; predict contacts of parts of it, or on a machine with more")
    if isinstance(head, ContactHead):
        maps = _from_attention(model, head, sequences)
    else:
        maps = [one.numpy() for one in _last_states(model, sequences, lambda x: head(x).sigmoid_(), name)]
    for one in maps:
        check_finite(one, name, model.compute_dtype)
    return maps


def too_large(model: Encoder, *lengths: int) -> str | None:
    """Why maps of some sequences together would not fit into memory; nothing if they do.

    Systems that promise more memory than they have end a program that believes them, without a word: ask before.
    """
    needed, free = 4 * _AT_ONCE * sum(length**2 for length in lengths), free_memory(model.device)
    if needed <= free:
        return None
    return (
        f"contacts of {sum(lengths):,} residues take about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB "
        "are free"
    )


def _from_attention(model: Encoder, head: ContactHead, sequences: Sequence[NDArray[np.uint8]]) -> list[FloatArray]:
    """Layer by layer: of all heads, two ``[L, L]`` are kept."""
    regression, rows = head.regression, model.alphabet.frame.rows
    weights = torch.split(regression.weight.detach().float()[0], list(model.config.attention_heads))

    def wanted(length: int) -> Wanted:
        return Wanted(watch=lambda: _Sum(length, model.device, rows, weights))

    results = _run(model, sequences, [wanted(len(ids)) for ids in sequences])
    with torch.inference_mode():
        return [result.watcher.probabilities(regression.bias.float()) for result in results]


def states(model: Encoder, sequence: NDArray[np.uint8]) -> Tensor:
    """``[L, D]`` float32 what a bilinear head sees: the last hidden states of residues, on the model's device.

    Args:
        model: of any family; needs no contact head.
        sequence: ``[L]`` ids of residues.
    """
    (x,) = _last_states(model, [sequence], lambda x: x)
    # Autograd takes no tensors that inference made.
    return x.clone().to(model.device)


def features(model: Encoder, sequence: NDArray[np.uint8], pairs: tuple[Tensor, Tensor]) -> FloatArray:
    """``[P, M]`` what the regression sees of some pairs of residues: the corrected maps, layer by layer.

    Args:
        model: of any family; needs no contact head.
        sequence: ``[L]`` ids of residues.
        pairs: ``[P]`` rows and ``[P]`` columns.
    """
    columns: list[Tensor] = []
    rows = model.alphabet.frame.rows
    first, second = pairs

    def keep(_: int, maps: HeadMaps) -> None:
        for head in maps:
            both = head[rows, rows] + head[rows, rows].T
            sums = both.sum(0)
            columns.append(both[first, second] - sums[first] * sums[second] / sums.sum().clamp_min(_LEAST))

    _run(model, [sequence], [Wanted(watch=lambda: keep)])
    with torch.inference_mode():
        values: FloatArray = torch.stack(columns, dim=1).cpu().numpy()
    return values


def attention(
    model: Encoder, sequence: NDArray[np.uint8], layers: Sequence[int], heads: Sequence[int] | None
) -> FloatArray:
    """Attention ``[len(layers), len(heads), T, T]``, BOS and EOS included: a row attends to columns and sums to 1.

    Nothing but what is asked for is ever computed, a map at a time.

    Args:
        model: of any family whose layers attend.
        sequence: ``[L]`` ids of residues.
        layers: from 1; negative ones count from the last.
        heads: from 0; all by default.

    Raises:
        UsageError: a layer or head does not exist, or a layer does not attend.
        SequenceTooLongError: more tokens than the model has positions.
        NonFiniteError: the model gives infinities or NaN.
    """
    model.require("attention")
    there = model.config.attention_heads
    last, width = len(there), max(there)
    chosen = list(range(width)) if heads is None else _whole_numbers(heads)
    wanted = _whole_numbers(layers)
    if not wanted or not all(1 <= abs(layer) <= last for layer in wanted):
        raise UsageError(f"attention is in layers 1 to {last}, or -{last} to -1; got {layers}")
    numbers = [layer + last + 1 if layer < 0 else layer for layer in wanted]
    least = min(there[number - 1] for number in numbers)
    if not least:
        raise UsageError(f"one of the layers {list(layers)} does not attend")
    if not chosen or not all(0 <= head < least for head in chosen):
        raise UsageError(f"heads are 0 to {least - 1}; got {heads}")
    size = model.alphabet.frame.tokens(len(sequence))
    found = np.empty((len(numbers), len(chosen), size, size), np.float32)

    def keep(number: int, maps: HeadMaps) -> None:
        for place in (i for i, one in enumerate(numbers) if one == number):
            for i, head in enumerate(chosen):
                found[place, i] = maps[head].float().cpu().numpy()

    _run(model, [sequence], [Wanted(watch=lambda: keep)])
    check_finite(found, _NAME, model.compute_dtype)
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
        rows: of a map that are residues.
        weights: ``[H]`` of each layer.
    """

    def __init__(self, length: int, device: torch.device, rows: slice, weights: Sequence[Tensor]) -> None:
        self._attention = torch.zeros(length, length, device=device)
        self._corrections = torch.zeros(length, length, device=device)
        self._rows, self._weights = rows, weights

    def __call__(self, number: int, maps: HeadMaps) -> None:
        """Add a layer, from 1."""
        sums = []
        weights = self._weights[number - 1]
        for whole, weight in zip(maps, weights.tolist(), strict=True):
            head = whole[self._rows, self._rows]
            self._attention.add_(head, alpha=weight)
            sums.append(head.sum(0) + head.sum(1))
        rows = torch.stack(sums)
        self._corrections.addmm_((rows * (weights / rows.sum(1).clamp_min(_LEAST))[:, None]).T, rows)

    def probabilities(self, bias: Tensor) -> FloatArray:
        logits = self._attention + self._attention.T - self._corrections + bias
        values: FloatArray = logits.sigmoid_().cpu().numpy()
        return values


def _last_states(
    model: Encoder, sequences: Sequence[NDArray[np.uint8]], reduce: Callable[[Tensor], Tensor], name: str = _NAME
) -> list[Tensor]:
    """Something made of the last hidden states ``[L, D]`` float32 of each sequence's residues, in main memory."""
    last, rows = model.config.num_hidden_layers, model.alphabet.frame.rows
    wanted = Wanted(layers=(last,), reduce=lambda tokens: {_KEPT: reduce(tokens[rows])})
    return [result.states[last, _KEPT] for result in _run(model, sequences, [wanted] * len(sequences), name)]


def _run(
    model: Encoder, sequences: Sequence[NDArray[np.uint8]], wanted: Sequence[Wanted], name: str = _NAME
) -> list[Result[None]]:
    """Some sequences as one pack."""
    frame = model.alphabet.frame
    tokens = [frame.around(ids) for ids in sequences]
    runner = Runner(model, max(1, sum(map(len, tokens))))
    jobs = (Job(one, what, None, name) for one, what in zip(tokens, wanted, strict=True))
    return [result.checked() for result in runner.run(jobs)]
