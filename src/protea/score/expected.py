"""Which residues a model expects at some sites of proteins: with each site masked, or with nothing masked.

Passes of all proteins share packs. Proteins longer than the model was trained on are seen through ProteinGym's windows
(``windows.py``), or run whole where positions are rotary.

Shapes: L residues, S sites, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import SequenceTooLongError, UsageError
from protea.infer.runner import FloatArray, Job, Runner, Wanted
from protea.models.encoder import Encoder
from protea.score.proteingym_windows import around, edge_weights, overlapping

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
    runner: Runner, proteins: Iterable[Sites], *, long: str, advance: Advance = lambda done: None
) -> Iterator[tuple[Sites, FloatArray]]:
    """Log-probabilities ``[S, V]`` for each protein, each site masked by itself; a pass a site; natural logarithms.

    Args:
        runner: of a model with a language-model head.
        proteins: taken as they are needed.
        long: what to do with one longer than the model was trained on.
        advance: told of progress, a pass at a time.

    Raises:
        SequenceTooLongError: a protein is too long, and ``long`` is ``error``.
        CapabilityError: the model has no language-model head.
    """
    model = runner.model
    model.require("logits")
    frame = model.alphabet.frame

    def jobs(protein: Sites) -> Iterator[Job[None]]:
        tokens = frame.around(protein.ids)
        size = seen_at_once(model, protein.name, len(tokens), long)
        for site in protein.sites:
            place = site + frame.before
            start, end = around(place, len(tokens), size)
            window = tokens[start:end].copy()
            window[place - start] = model.alphabet.mask
            yield Job(window, Wanted(places=np.array([place - start])), None, protein.name)

    nothing = np.empty((0, len(model.alphabet)), np.float32)
    for protein, results in runner.each(((one, jobs(one)) for one in proteins), advance=advance):
        yield protein, np.concatenate([nothing, *(result.log_probabilities for result in results)])


def unmasked(
    runner: Runner, proteins: Iterable[Sites], *, long: str, advance: Advance = lambda done: None
) -> Iterator[tuple[Sites, FloatArray]]:
    """Log-probabilities ``[S, V]`` for each protein with nothing masked; a pass a protein, or a window of it.

    Args:
        runner: of a model with a language-model head.
        proteins: taken as they are needed.
        long: what to do with one longer than the model was trained on.
        advance: told of progress, a protein at a time.

    Raises:
        SequenceTooLongError: a protein is too long, and ``long`` is ``error``.
        CapabilityError: the model has no language-model head.
    """
    model = runner.model
    model.require("logits")
    frame = model.alphabet.frame

    def jobs(protein: Sites) -> Iterator[Job[int]]:
        tokens = frame.around(protein.ids)
        size = min(len(tokens), seen_at_once(model, protein.name, len(tokens), long))
        for start in overlapping(len(tokens), size):
            yield Job(tokens[start : start + size], Wanted(places=np.arange(size)), start, protein.name)

    for protein, results in runner.each((one, jobs(one)) for one in proteins):
        windows = [result.log_probabilities for result in results]
        starts = [result.job.tag for result in results]
        whole = windows[0] if len(windows) == 1 else _joined(windows, starts, frame.tokens(len(protein.ids)))
        yield protein, whole[frame.rows][list(protein.sites)]
        advance(1)


def seen_at_once(model: Encoder, name: str, tokens: int, long: str) -> int:
    """How many tokens of a protein a model sees at once.

    Raises:
        SequenceTooLongError: it is too long, by the policy or for the model.
    """
    residues = model.alphabet.frame.residues
    if tokens > model.trained_tokens and long == "error":
        whole = ", or whole (full)" if model.max_tokens is None else ""
        raise SequenceTooLongError(
            f"{name}: {residues(tokens)} residues, the model was trained on {residues(model.trained_tokens)}; score it "
            f"in windows (window){whole}"
        )
    if model.max_tokens is not None and tokens > model.max_tokens and long == "full":
        raise SequenceTooLongError(
            f"{name}: {residues(tokens)} residues, and {model.config.family} has positions for "
            f"{residues(model.max_tokens)}; score it in windows (window)"
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
