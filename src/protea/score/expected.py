"""Which residues a model expects at some sites of proteins: with each site masked, or with nothing masked.

Passes of all proteins share packs. Proteins longer than the model was trained on are seen through ProteinGym's windows
(``windows.py``), or run whole where positions are rotary.

Shapes: L residues, S sites, V tokens of the alphabet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.embed.engine import FloatArray
from protea.errors import SequenceTooLongError, UsageError
from protea.models.encoder import Encoder
from protea.score.passes import Question, log_probabilities
from protea.score.windows import around, edge_weights, overlapping

POLICIES: Final = ("window", "full", "error")
"""What happens to a protein longer than the model was trained on: ProteinGym's windows; run whole, which only rotary
models can; or an error."""

Advance = Callable[[int], None]
"""Told how many passes are done."""


class Sites(NamedTuple):
    """Where a protein is looked at.

    Attributes:
        name: what messages call the protein.
        ids: ``[L]`` residues.
        sites: from 0.
    """

    name: str
    ids: NDArray[np.uint8]
    sites: Sequence[int]


def check_policy(long: str) -> None:
    """See that a policy for long proteins is known.

    Raises:
        UsageError: it is not.
    """
    if long not in POLICIES:
        raise UsageError(f"unknown policy for long sequences {long!r}; use {', '.join(POLICIES)}")


def masked(
    model: Encoder, proteins: Iterable[Sites], *, long: str, token_budget: int, advance: Advance = lambda done: None
) -> Iterator[FloatArray]:
    """Log-probabilities ``[S, V]`` for each protein, each site masked by itself; a pass a site; natural logarithms.

    Args:
        model: with a language-model head.
        proteins: taken as they are needed.
        long: what to do with one longer than the model was trained on.
        token_budget: tokens computed at a time.
        advance: told of progress.

    Raises:
        SequenceTooLongError: a protein is too long, and ``long`` is ``error``.
        CapabilityError: the model has no language-model head.
    """
    waiting: deque[FloatArray] = deque()

    def questions() -> Iterator[Question]:
        for name, ids, sites in proteins:
            waiting.append(np.empty((len(sites), len(model.alphabet)), np.float32))
            tokens = with_specials(model.alphabet, ids)
            size = seen_at_once(model, name, len(tokens), long)
            for site in sites:
                start, end = around(site + 1, len(tokens), size)
                window = tokens[start:end].copy()
                window[site + 1 - start] = model.alphabet.mask
                yield Question(window, np.array([site + 1 - start]), name)

    row = 0
    for answer in log_probabilities(model, questions(), token_budget):
        while row == len(waiting[0]):  # it, or all of a protein that nothing is asked of, is done
            yield waiting.popleft()
            row = 0
        waiting[0][row] = answer[0]
        row += 1
        advance(1)
    yield from waiting


def unmasked(
    model: Encoder, proteins: Iterable[Sites], *, long: str, token_budget: int, advance: Advance = lambda done: None
) -> Iterator[FloatArray]:
    """Log-probabilities ``[S, V]`` for each protein with nothing masked; a pass a protein, or a window of it.

    Args:
        model: with a language-model head.
        proteins: taken as they are needed.
        long: what to do with one longer than the model was trained on.
        token_budget: tokens computed at a time.
        advance: told of progress.

    Raises:
        SequenceTooLongError: a protein is too long, and ``long`` is ``error``.
        CapabilityError: the model has no language-model head.
    """
    waiting: deque[tuple[Sites, list[int]]] = deque()

    def questions() -> Iterator[Question]:
        for one in proteins:
            tokens = with_specials(model.alphabet, one.ids)
            size = min(len(tokens), seen_at_once(model, one.name, len(tokens), long))
            starts = overlapping(len(tokens), size)
            waiting.append((one, starts))
            for start in starts:
                yield Question(tokens[start : start + size], np.arange(size), one.name)

    windows: list[FloatArray] = []
    for answer in log_probabilities(model, questions(), token_budget):
        windows.append(answer)
        one, starts = waiting[0]
        if len(windows) == len(starts):
            waiting.popleft()
            whole = windows[0] if len(windows) == 1 else _joined(windows, starts, len(one.ids) + 2)
            yield whole[1:-1][list(one.sites)]
            windows = []
            advance(1)


def with_specials(alphabet: Alphabet, ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A whole sequence as the model sees it, ``[L+2]``."""
    return np.concatenate(([alphabet.bos], ids, [alphabet.eos])).astype(np.uint8)


def seen_at_once(model: Encoder, name: str, tokens: int, long: str) -> int:
    """How many tokens of a protein a model sees at once.

    Raises:
        SequenceTooLongError: it is too long, by the policy or for the model.
    """
    if tokens > model.trained_tokens and long == "error":
        whole = ", or whole (full)" if model.max_tokens is None else ""
        raise SequenceTooLongError(
            f"{name}: {tokens - 2} residues, the model was trained on {model.trained_tokens - 2}; score it in windows "
            f"(window){whole}"
        )
    if model.max_tokens is not None and tokens > model.max_tokens and long == "full":
        raise SequenceTooLongError(
            f"{name}: {tokens - 2} residues, and {model.config.family} has positions for {model.max_tokens - 2}; score "
            "it in windows (window)"
        )
    return tokens if long == "full" else model.trained_tokens


def _joined(windows: Sequence[FloatArray], starts: Sequence[int], tokens: int) -> FloatArray:
    """``[T, V]``: means of windows that overlap, weighted by how far inside each they lie."""
    size = len(windows[0])
    weights = edge_weights(size)
    total, weight = np.zeros((tokens, windows[0].shape[1])), np.zeros(tokens)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + size] += window * weights[:, None]
        weight[start : start + size] += weights
    mean: FloatArray = (total / weight[:, None]).astype(np.float32)
    return mean
