"""The residues that a model expects at some sites of proteins: each site masked by itself, or nothing masked.

The passes of all proteins share packs.

Shapes: L residues, S sites, T tokens, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import SequenceTooLongError, UsageError
from protea.infer.budget import default_budget
from protea.infer.runner import FloatArray, Job, Runner, Wanted
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.score.proteingym_windows import around, edge_weights, overlapping

POLICIES: Final = ("window", "full", "error")
"""Policies for a protein longer than the model was trained on; only rotary models can run it whole."""


class Sites(NamedTuple):
    """The sites ``[S]``, from 0, of a protein with residues ``[L]``; messages use the name."""

    name: str
    ids: NDArray[np.uint8]
    sites: Sequence[int]


def check_policy(long: str) -> None:
    """Refuse an unknown policy for long proteins."""
    if long not in POLICIES:
        raise UsageError(f"unknown policy for long sequences {long!r}; use {', '.join(POLICIES)}")


def runner_for(model: Encoder, token_budget: int | None) -> Runner:
    """A runner that computes ``token_budget`` tokens at a time, by default what the memory allows."""
    if token_budget is not None and token_budget < 1:
        raise UsageError(f"a token budget must be at least 1, got {token_budget}")
    return Runner(model, token_budget or default_budget(model))


def masked(
    runner: Runner, proteins: Iterable[Sites], *, long: str, progress: Progress = SILENT
) -> Iterator[tuple[Sites, FloatArray]]:
    """Log-probabilities ``[S, V]`` of each protein, natural logarithms; each site is masked in a pass of its own.

    Proteins are read as they are needed; ``progress`` advances by one a pass.

    Raises:
        SequenceTooLongError: a protein is too long for the policy.
        CapabilityError: the model has no language-model head.
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
    """The same with nothing masked: a pass a protein, or a window of it; ``progress`` advances by one a protein."""
    model = runner.model
    model.require("logits")
    frame = model.alphabet.frame

    def jobs(protein: Sites) -> Iterator[Job[int]]:
        tokens = frame.around(protein.ids)
        size = min(len(tokens), tokens_seen_at_once(model, protein.name, len(tokens), long))
        for start in overlapping(len(tokens), size):
            yield Job(tokens[start : start + size], Wanted(places=np.arange(size)), start, protein.name)

    for protein, results in runner.each((protein, jobs(protein)) for protein in proteins):
        windows = {result.job.tag: result.log_probabilities for result in results}
        values = windows[0] if len(windows) == 1 else _joined(windows, frame.tokens(len(protein.ids)))
        yield protein, values[frame.rows][list(protein.sites)]
        progress.advance()


def tokens_seen_at_once(model: Encoder, name: str, tokens: int, long: str) -> int:
    """The most tokens of a protein that a pass holds; ``SequenceTooLongError`` if the protein is too long."""
    residues = model.alphabet.frame.residues
    limit = {"error": model.trained_tokens, "full": model.max_tokens}.get(long)
    if limit is not None and tokens > limit:
        full = ", or whole: full" if model.max_tokens is None else ""
        raise SequenceTooLongError(
            f"{name}: {residues(tokens)} residues exceed the {residues(limit)} of {model.config.family}; score it in "
            f"windows: window{full}"
        )
    return tokens if long == "full" else model.trained_tokens


def _joined(windows: dict[int, FloatArray], tokens: int) -> FloatArray:
    """Means ``[T, V]`` of overlapping windows, by start; a token far from a window's edges weighs more."""
    size, width = windows[0].shape
    weights = edge_weights(size)
    total, weight = np.zeros((tokens, width)), np.zeros(tokens)
    for start, values in windows.items():
        total[start : start + size] += values * weights[:, None]
        weight[start : start + size] += weights
    mean: FloatArray = (total / weight[:, None]).astype(np.float32)
    return mean
