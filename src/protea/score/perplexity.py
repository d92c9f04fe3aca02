"""How well a model predicts residues that it cannot see.

    perplexity          exp(Σ -log p(token) / masked tokens), 15 % of all residues masked at once, one pass a sequence:
                        BioNeMo 2's protocol (80/10/10, over tokens, not a mean of means)
    pseudo-perplexity   exp(-1/L Σ log p(residue | all others)) of each sequence, a pass a residue

Masks depend on the seed and the number of the sequence alone, whatever shares its pack.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.draws import MASK, fold
from protea.data.masking import Masker, Masking
from protea.embed.engine import FloatArray
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.score.expected import with_specials
from protea.score.passes import Question, log_probabilities


class Masked(NamedTuple):
    """A sequence as the model will see it.

    Attributes:
        question: the masked tokens, and which are to be predicted.
        truth: ``[P]`` what they were.
    """

    question: Question
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
        tokens = with_specials(alphabet, ids)
        changed, hidden = masker(tokens, fold(seed, 0, MASK, number), np.array([0, len(tokens)]))
        places = np.flatnonzero(hidden)
        yield Masked(Question(changed, places, name), tokens[places])


def losses(model: Encoder, sequences: Iterable[Masked], token_budget: int) -> Iterator[FloatArray]:
    """Negative log-probability ``[P]`` of the masked tokens of each sequence, in nats.

    Raises:
        CapabilityError: the model has no language-model head.
    """
    waiting: deque[NDArray[np.uint8]] = deque()

    def questions() -> Iterator[Question]:
        for question, truth in sequences:
            waiting.append(truth)
            yield question

    for answer in log_probabilities(model, questions(), token_budget):
        truth = waiting.popleft()
        yield -answer[np.arange(len(truth)), truth]


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
