"""Contacts from attention: logistic regression on symmetrised, APC-corrected maps (Rao et al. 2020).

With a the attention of one head between residues, BOS and EOS left out, and s = a + aᵀ,

    apc = s - r rᵀ / t        r the row sums of s, t the sum of all
    p   = sigmoid(b + Σ over layers and heads of w · apc)

Both sums are linear in the maps, so each map is added up as its layer is computed. Two [L, L] arrays are kept, and
memory grows with the length squared, whatever the model's size. A model with a ``BilinearContactHead`` predicts
contacts from its last hidden states instead.

Shapes: L residues, T tokens, H heads of a layer, M maps of all layers, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.errors import DeviceError, UsageError
from protea.infer.runner import FloatArray, Job, Result, Runner, Wanted, check_finite
from protea.limits import free_memory
from protea.models.attention import HeadMaps
from protea.models.encoder import Encoder
from protea.models.layers import ContactHead
from protea.models.registry import families_with
from protea.text import shown

_AT_ONCE: Final = 6  # float32 maps [L, L] held while a map is made, the model's needs included; measured: 5.3

_TINY: Final = torch.finfo(torch.float32).tiny
"""Least divisor: attention between residues sums to 0 where all of it goes to BOS and EOS."""

_NAME: Final = "the sequence"


def contacts(
    model: Encoder, sequence: NDArray[np.uint8], name: str = _NAME, runner: Runner | None = None
) -> FloatArray:
    """Probability ``[L, L]`` that two residues are in contact, from ids ``[L]``; ``name`` is for messages.

    ``runner`` computes the pass; by default one of the model's own. A map that would not fit into memory is a
    ``DeviceError``.
    """
    model.require("contacts")
    head = model.contact_head
    assert head is not None
    if reason := too_large(model, len(sequence)):
        raise DeviceError(f"{reason}; predict contacts of parts of the sequence, or use a machine with more memory")
    if isinstance(head, ContactHead):
        probabilities = _from_attention(model, head, sequence, runner)
    else:
        probabilities = _last_states(model, sequence, lambda x: head(x).sigmoid_(), name, runner).numpy()
    check_finite(probabilities, name, model.precision)
    # PyTorch's sigmoid of equal numbers can differ in the last bit, by their place in memory.
    symmetric: FloatArray = np.maximum(probabilities, probabilities.T)
    return symmetric


def too_long(model: Encoder, length: int) -> str | None:
    """The reason why a model or this machine cannot predict contacts at this length; ``None`` if it can."""
    frame = model.alphabet.frame
    if model.max_tokens is not None and frame.tokens(length) > model.max_tokens:
        most = frame.residues(model.max_tokens)
        return (
            f"{length:,} residues, and this {model.config.family} model takes {most:,}; families that predict contacts "
            f"at any length: {families_with('contacts', 'any length')}"
        )
    return too_large(model, length)


def too_large(model: Encoder, length: int) -> str | None:
    """The reason why a map would not fit into memory; ``None`` if it fits.

    Check first: some systems promise more memory than they have, and kill a program that uses it.
    """
    needed, free = 4 * _AT_ONCE * length**2, free_memory(model.device)
    if needed <= free:
        return None
    return f"contacts of {length:,} residues need about {needed / 1e9:,.1f} GB of memory; {free / 1e9:,.1f} GB are free"


def _from_attention(
    model: Encoder, head: ContactHead, sequence: NDArray[np.uint8], runner: Runner | None
) -> FloatArray:
    rows, length = model.alphabet.frame.rows, len(sequence)
    weights = torch.split(head.regression.weight.detach().float()[0], list(model.config.attention_heads))
    attention_sum, corrections = (torch.zeros(length, length, device=model.device) for _ in range(2))

    def add(layer: int, maps: HeadMaps) -> None:
        own = weights[layer - 1]
        sums = []
        for full_map, weight in zip(maps, own.tolist(), strict=True):
            residues = full_map[rows, rows]
            attention_sum.add_(residues, alpha=weight)
            sums.append(residues.sum(0) + residues.sum(1))
        r = torch.stack(sums)
        corrections.addmm_((r * (own / r.sum(1).clamp_min(_TINY))[:, None]).T, r)

    _run(model, sequence, Wanted(watch=lambda: add), runner=runner)
    with torch.inference_mode():
        logits = attention_sum + attention_sum.T - corrections + head.regression.bias.float()
        probabilities: FloatArray = logits.sigmoid_().cpu().numpy()
    return probabilities


def states(model: Encoder, sequence: NDArray[np.uint8]) -> Tensor:
    """``[L, D]`` float32, the input of a bilinear head: the last hidden states, on the model's device."""
    # Autograd refuses tensors made in inference mode, so this is a copy.
    return _last_states(model, sequence, lambda x: x).clone().to(model.device)


def features(model: Encoder, sequence: NDArray[np.uint8], pairs: tuple[Tensor, Tensor]) -> FloatArray:
    """``[P, M]``, the input of the regression: corrected maps at ``pairs``, ``[P]`` rows and ``[P]`` columns."""
    columns: list[Tensor] = []
    rows = model.alphabet.frame.rows
    first, second = pairs

    def keep(_: int, maps: HeadMaps) -> None:
        for head in maps:
            both = head[rows, rows] + head[rows, rows].T
            sums = both.sum(0)
            columns.append(both[first, second] - sums[first] * sums[second] / sums.sum().clamp_min(_TINY))

    _run(model, sequence, Wanted(watch=lambda: keep))
    with torch.inference_mode():
        values: FloatArray = torch.stack(columns, dim=1).cpu().numpy()
    return values


def attention(
    model: Encoder, sequence: NDArray[np.uint8], layers: Sequence[int], heads: Sequence[int] | None
) -> FloatArray:
    """Attention ``[len(layers), len(heads), T, T]``, BOS and EOS included.

    A row attends to columns, and sums to 1 unless the family adds keys.

    Only the requested maps are computed, one at a time. Layers count from 1, negative ones from the last; heads count
    from 0, all by default.
    """
    model.require("attention")
    head_counts = model.config.attention_heads
    last = len(head_counts)
    chosen_heads = range(max(head_counts)) if heads is None else heads
    if not layers or not all(1 <= abs(layer) <= last for layer in layers):
        raise UsageError(f"attention is in layers 1 to {last}, or -{last} to -1; got {shown(list(layers))}")
    numbers = [layer + last + 1 if layer < 0 else layer for layer in layers]
    fewest = min(head_counts[number - 1] for number in numbers)
    if not fewest:
        raise UsageError(f"one of the layers {list(layers)} has no attention")
    if not chosen_heads or not all(0 <= head < fewest for head in chosen_heads):
        raise UsageError(f"heads are 0 to {fewest - 1}; got {shown(list(chosen_heads))}")
    size = model.alphabet.frame.tokens(len(sequence))
    result = np.empty((len(numbers), len(chosen_heads), size, size), np.float32)

    def keep(layer: int, maps: HeadMaps) -> None:
        for place in (i for i, number in enumerate(numbers) if number == layer):
            for i, head in enumerate(chosen_heads):
                result[place, i] = maps[head].float().cpu().numpy()

    _run(model, sequence, Wanted(watch=lambda: keep))
    check_finite(result, _NAME, model.precision)
    return result


def _last_states(
    model: Encoder,
    sequence: NDArray[np.uint8],
    reduce: Callable[[Tensor], Tensor],
    name: str = _NAME,
    runner: Runner | None = None,
) -> Tensor:
    """Apply ``reduce`` to the residues' last hidden states ``[L, D]`` float32; the result is in main memory."""
    last, rows = model.config.num_hidden_layers, model.alphabet.frame.rows
    wanted = Wanted(layers=(last,), reduce=lambda tokens: {"kept": reduce(tokens[rows])})
    return _run(model, sequence, wanted, name, runner).states[last, "kept"]


def _run(
    model: Encoder, sequence: NDArray[np.uint8], wanted: Wanted, name: str = _NAME, runner: Runner | None = None
) -> Result[None]:
    tokens = model.alphabet.frame.around(sequence)
    (result,) = (runner or Runner(model, len(tokens))).run([Job(tokens, wanted, None, name)])
    return result.checked()
