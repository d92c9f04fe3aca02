"""How well a model predicts residues that it cannot see.

    perplexity          exp(Σ -log p(token) / masked tokens); 15 % of all residues are masked at once, one pass a
                        sequence: BioNeMo 2's protocol (80/10/10, over all tokens, not a mean of means)
    pseudo-perplexity   exp(-1/L Σ log p(residue | all others)) of each sequence, a pass a residue

Masks depend only on the seed and the number of the sequence, not on the sequences that share its pack.
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
from protea.progress import SILENT, Progress


class Masked(NamedTuple):
    """A sequence after masking.

    Attributes:
        name: its name in messages.
        tokens: ``[T]``, BOS and EOS included.
        places: ``[P]`` tokens to predict.
        truth: ``[P]`` their ids before masking.
    """

    name: str
    tokens: NDArray[np.uint8]
    places: NDArray[np.int64]
    truth: NDArray[np.uint8]


def mask(
    alphabet: Alphabet, sequences: Iterable[tuple[str, NDArray[np.uint8]]], masking: Masking, seed: int
) -> Iterator[Masked]:
    """Mask sequences, given as name and ``[L]`` ids; in a short one no residue may be selected."""
    masker = Masker(masking, alphabet)
    for number, (name, ids) in enumerate(sequences):
        tokens = alphabet.frame.around(ids)
        changed, hidden = masker(tokens, fold(seed, 0, MASK, number), np.array([0, len(tokens)]))
        places = np.flatnonzero(hidden)
        yield Masked(name, changed, places, tokens[places])


def losses(runner: Runner, sequences: Iterable[Masked], progress: Progress = SILENT) -> Iterator[FloatArray]:
    """Negative log-probability ``[P]`` of the masked tokens of each sequence, in nats; advances by tokens."""
    runner.model.require("logits")
    jobs = (Job(masked.tokens, Wanted(places=masked.places), masked.truth, masked.name) for masked in sequences)
    for result in runner.run(jobs):
        truth = result.job.tag
        yield -result.log_probabilities[np.arange(len(truth)), truth]
        progress.advance(len(result.job.tokens))


def of_all(losses: Iterable[FloatArray]) -> float:
    """Perplexity of the tokens of all sequences together; a ``UsageError`` if there are none."""
    total, count = 0.0, 0
    for values in losses:
        total += float(values.sum(dtype=np.float64))
        count += len(values)
    if not count:
        raise UsageError("no residue was masked; give more sequences, or mask a larger share of their residues")
    return of_loss(total / count)


def of_loss(loss: float) -> float:
    """Perplexity of a mean loss in nats; infinite if a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
