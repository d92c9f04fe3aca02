"""How well a model predicts residues that it cannot see.

    perplexity          exp(Σ -log p(token) / masked tokens), 15 % of all residues masked at once, one pass a sequence:
                        BioNeMo 2's protocol (80/10/10, over tokens, not a mean of means)
    pseudo-perplexity   exp(-1/L Σ log p(residue | all others)) of each sequence, a pass a residue

Masks depend on the seed and the number of the sequence alone, whatever shares its pack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.draws import MASK, fold
from protea.data.masking import Masker, Masking
from protea.errors import UsageError
from protea.infer.runner import FloatArray, Job, Runner, Wanted


class Masked(NamedTuple):
    """A sequence as the model will see it.

    Attributes:
        name: what messages call it.
        tokens: ``[T]`` after masking, those of its frame included.
        places: ``[P]`` which of them are to be predicted.
        truth: ``[P]`` what they were.
    """

    name: str
    tokens: NDArray[np.uint8]
    places: NDArray[np.int64]
    truth: NDArray[np.uint8]


def mask(
    alphabet: Alphabet, sequences: Iterable[tuple[str, NDArray[np.uint8]]], masking: Masking, seed: int
) -> Iterator[Masked]:
    """Masked sequences, in order; in short ones nothing may be selected.

    Args:
        alphabet: of the model.
        sequences: name and ``[L]`` ids of residues of each.
        masking: how.
        seed: of the masks.
    """
    masker = Masker(masking, alphabet)
    for number, (name, ids) in enumerate(sequences):
        tokens = alphabet.frame.around(ids)
        changed, hidden = masker(tokens, fold(seed, 0, MASK, number), np.array([0, len(tokens)]))
        places = np.flatnonzero(hidden)
        yield Masked(name, changed, places, tokens[places])


def losses(runner: Runner, sequences: Iterable[Masked]) -> Iterator[FloatArray]:
    """Negative log-probability ``[P]`` of the masked tokens of each sequence, in nats.

    Raises:
        CapabilityError: the model has no language-model head.
    """
    runner.model.require("logits")
    jobs = (Job(one.tokens, Wanted(places=one.places), one.truth, one.name) for one in sequences)
    for result in runner.run(jobs):
        truth = result.job.tag
        yield -result.log_probabilities[np.arange(len(truth)), truth]


def of_all(found: Iterable[FloatArray]) -> float:
    """Perplexity of the tokens of all sequences together.

    Raises:
        UsageError: there are none.
    """
    total, count = 0.0, 0
    for values in found:
        total += float(values.sum(dtype=np.float64))
        count += len(values)
    if not count:
        raise UsageError("no residue was masked, so few there are; give more sequences, or mask a larger share")
    return of_loss(total / count)


def of_loss(loss: float) -> float:
    """Perplexity of a mean loss in nats; beyond what a float holds, infinite."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
