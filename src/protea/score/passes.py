"""Many short questions to a model in few passes: which residues it expects at some tokens of some inputs.

Knows nothing of mutations or protocols: whoever asks says what the model is to see, token by token, and where it is to
be asked. Inputs are packed whole, so that a thousand copies of one protein, each with another residue masked, cost what
their tokens cost.

Shapes: T tokens, P places asked for, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from protea.embed.engine import FloatArray, check_finite, in_halves
from protea.models.encoder import Encoder
from protea.packing import pack, pack_by_budget


class Question(NamedTuple):
    """One input, and where in it the model is asked.

    Attributes:
        tokens: ``[T]`` ids as the model sees them, special ones included where they are to be.
        places: ``[P]`` indices of tokens.
        name: what messages call it.
    """

    tokens: NDArray[np.uint8]
    places: NDArray[np.int64]
    name: str


def log_probabilities(model: Encoder, questions: Iterable[Question], token_budget: int) -> Iterator[FloatArray]:
    """Log-probabilities ``[P, V]`` float32 at each question's places, in order; natural logarithms.

    The softmax is over the tokens of the alphabet; rows that pad a vocabulary take no part.

    Args:
        model: on the device to compute on.
        questions: taken as they are needed.
        token_budget: tokens computed at a time; a single input of more is computed nonetheless.

    Raises:
        CapabilityError: the model has no language-model head.
        SequenceTooLongError: an input has more tokens than the model has positions.
        DeviceError: a single input does not fit in the accelerator's memory.
        NonFiniteError: the model gives infinities or NaN.
    """
    model.require("logits")
    for group in pack_by_budget(questions, lambda one: len(one.tokens), token_budget):
        for answers in in_halves(group, lambda some: _forward(model, some), _too_large):
            yield from answers


def _too_large(question: Question) -> str:
    return (
        f"{question.name}: {len(question.tokens)} tokens at once do not fit in the accelerator's memory; compute in "
        "bfloat16, in windows, or with a smaller model"
    )


def _forward(model: Encoder, group: list[Question]) -> list[FloatArray]:
    device = model.word_embeddings.weight.device
    batch = pack([one.tokens for one in group])
    starts = batch.cu_seqlens.host_offsets[:-1].tolist()
    rows = torch.from_numpy(np.concatenate([one.places + start for one, start in zip(group, starts, strict=True)]))
    with torch.inference_mode():
        hidden = model(batch.to(device)).index_select(0, rows.to(device))
        logits = model.head(hidden)[:, : len(model.alphabet)].float()
        values: FloatArray = logits.log_softmax(-1).cpu().numpy()
    found = np.split(values, np.cumsum([len(one.places) for one in group])[:-1])
    for question, answer in zip(group, found, strict=True):
        check_finite(answer, question.name, model.word_embeddings.weight.dtype)
    return found
