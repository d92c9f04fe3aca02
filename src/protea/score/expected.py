"""The residues that a model expects at some sites of proteins: each site masked by itself, or nothing masked.

The passes of all proteins share packs. A protein longer than the model was trained on is seen through ProteinGym's
windows (Notin et al. 2023, ``compute_fitness.py``). A window is a slice of the tokens, BOS and EOS included; inner
windows contain neither. ProteinGym's windows have 1,024 tokens; other sizes keep the proportions.

Shapes: L residues, S sites, T tokens, V tokens of the alphabet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import SequenceTooLongError, UsageError
from protea.infer.runner import FloatArray, Job, Runner, Wanted, default_budget
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.text import shown

LongProtein = Literal["window", "full", "error"]
"""Policies for a protein longer than the model was trained on; only rotary models can run it whole."""


class Sites(NamedTuple):
    """The sites ``[S]``, from 0, of a protein with residues ``[L]``; messages use the name."""

    name: str
    ids: NDArray[np.uint8]
    sites: Sequence[int]


def runner_for(model: Encoder, token_budget: int | None) -> Runner:
    """A runner that computes ``token_budget`` tokens at a time, by default what the memory allows."""
    if token_budget is not None and token_budget < 1:
        raise UsageError(f"a token budget must be at least 1, got {shown(token_budget)}")
    return Runner(model, token_budget or default_budget(model))


def masked(
    runner: Runner, proteins: Iterable[Sites], *, long: str, progress: Progress = SILENT
) -> Iterator[tuple[Sites, FloatArray]]:
    """Log-probabilities ``[S, V]`` of each protein, natural logarithms; each site is masked in a separate pass.

    Proteins are read when they are needed; ``progress`` advances by one per pass.
    """
    model = runner.model
    model.require("logits")
    frame = model.alphabet.frame

    def jobs(protein: Sites) -> Iterator[Job[None]]:
        tokens = frame.around(protein.ids)
        size = tokens_seen_at_once(model, protein.name, len(tokens), long)
        for site in protein.sites:
            place = site + frame.before
            start, end = around(place, len(tokens), size)
            window = tokens[start:end].copy()
            window[place - start] = model.alphabet.mask
            yield Job(window, Wanted(places=np.array([place - start])), None, protein.name)

    no_sites = np.empty((0, len(model.alphabet)), np.float32)
    entries = ((protein, jobs(protein)) for protein in proteins)
    for protein, results in runner.each(entries, advance=progress.advance):
        yield protein, np.concatenate([no_sites, *(result.log_probabilities for result in results)])


def unmasked(
    runner: Runner, proteins: Iterable[Sites], *, long: str, progress: Progress = SILENT
) -> Iterator[tuple[Sites, FloatArray]]:
    """The same with nothing masked: one pass per protein or window of it; ``progress`` advances by one per protein.

    Where windows overlap, the result is a weighted mean.
    """
    model = runner.model
    model.require("logits")
    frame = model.alphabet.frame

    def jobs(protein: Sites) -> Iterator[Job[int]]:
        tokens = frame.around(protein.ids)
        size = min(len(tokens), tokens_seen_at_once(model, protein.name, len(tokens), long))
        for start in overlapping(len(tokens), size):
            yield Job(tokens[start : start + size], Wanted(places=np.arange(size)), start, protein.name)

    for protein, results in runner.each((protein, jobs(protein)) for protein in proteins):
        count, size = frame.tokens(len(protein.ids)), len(results[0].job.tokens)
        weights = edge_weights(size)
        total, weight = np.zeros((count, len(model.alphabet))), np.zeros(count)
        for result in results:
            window = slice(result.job.tag, result.job.tag + size)
            total[window] += result.log_probabilities * weights[:, None]
            weight[window] += weights
        means = (total / weight[:, None]).astype(np.float32)
        yield protein, means[frame.rows][list(protein.sites)]
        progress.advance()


def tokens_seen_at_once(model: Encoder, name: str, tokens: int, long: str) -> int:
    """The most tokens of a protein in one pass; ``SequenceTooLongError`` if the protein is too long."""
    residues = model.alphabet.frame.residues
    limit = {"error": model.trained_tokens, "full": model.max_tokens}.get(long)
    if limit is not None and tokens > limit:
        full = " or full (the whole protein)" if model.max_tokens is None else ""
        raise SequenceTooLongError(
            f"{name}: {residues(tokens)} residues exceed the {residues(limit)} of {model.config.family}; use the "
            f"policy window (overlapping windows){full}"
        )
    return tokens if long == "full" else model.trained_tokens


def around(index: int, total: int, size: int) -> tuple[int, int]:
    """Start and end of the window that scores the token ``index`` of ``total``: centred as far as the ends allow."""
    half = size // 2
    if total <= size or index < half:
        return 0, min(total, size)
    start = total - size if index >= total - half else index - half
    return start, start + size


def overlapping(total: int, size: int) -> list[int]:
    """Starts of the windows that cover a long protein, placed from both ends inward until they meet.

    Neighbours start half a window less one token apart. If the last two windows share fewer tokens than that, one more
    window lies between them.
    """
    if total <= size:
        return [0]
    step = size // 2 - 1
    left, right = 0, total - size
    starts = [left, right]
    while left + size - 1 <= right:
        left, right = left + step, right - step
        starts += [left, right]
    if left + size - right < step:
        starts.append(total // 2 - size // 2)
    return starts


def edge_weights(size: int) -> NDArray[np.float64]:
    """The weight ``[size]`` of each token of a window: 1 inside, less toward the edges.

    The edge is a sigmoid over a quarter of the window. As in ProteinGym's code, the outermost token has weight 1.
    """
    edge, slope = size // 4, size / 64
    weights = np.ones(size)
    for i in range(1, edge + 1):
        weights[i] = 1 / (1 + math.exp(-(i - edge / 2) / slope))
    for i in range(size - 2 - edge, size - 1):
        weights[i] = 1 / (1 + math.exp((i - (size - 2) + edge / 2) / slope))
    return weights
