"""A head on the hidden states of a model that does not change, and the choice of their layer.

``layer="auto"`` tries every layer with a linear head and takes the one with the least loss on the validation part, or
with the best number on the inner folds of a nested split. For vectors of sequences, one pass gives all layers. All
layers of all residues would take too much disk; for residues, a sample of proteins chooses the layer, and then one pass
gives it for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from protea.embed.embeddings import resolve_layers
from protea.finetune.choices import Choice
from protea.finetune.examples import EncodedExamples, Examples
from protea.finetune.features import Features, compute
from protea.finetune.heads import RESIDUES, HeadConfig
from protea.finetune.probe import ProbeSettings, Trained, train_head
from protea.finetune.tasks import Floats, Ints, Part
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress

AUTO: Final = "auto"
_PILOT: Final[dict[Part, int]] = {"train": 60_000, "validation": 30_000}
"""Residues of the sample that chooses a layer, at least, where the part has as many."""


@dataclass(frozen=True)
class Source:
    """A model whose hidden states are computed once and kept in a folder.

    Folds share it, except for the sample that chooses a layer. ``identity`` is what the states depend on beside model
    and sequences; ``title`` names the work in progress bars.
    """

    model: Encoder
    folder: Path
    fold: str
    identity: Mapping[str, Any]
    token_budget: int | None = None
    title: str = "embedding"

    def features(
        self, prepared: EncodedExamples, reads: str, layers: tuple[int, ...], name: str, progress: Progress
    ) -> Features:
        """Hidden states of all sequences, in the subfolder ``name``."""
        digest = sha256()
        for record in prepared.sequences:
            digest.update(record.ids.tobytes() + b"\0" + repr(record.windows).encode())
        identity = {**self.identity, "reads": reads, "layers": list(layers), "sequences": digest.hexdigest()}
        return compute(
            self.folder / name,
            self.model,
            prepared.sequences,
            reads=reads,
            layers=layers,
            identity=identity,
            title=self.title,
            token_budget=self.token_budget,
            progress=progress,
        )


@dataclass(frozen=True)
class Chosen:
    """Hidden states of one layer; for ``auto``, the loss of each layer on validation, or the choice on inner folds."""

    features: Features
    place: int  # of the layer in ``features.layers``
    losses: dict[int, float] = field(default_factory=dict)
    choice: Choice[int] | None = None

    @property
    def layer(self) -> int:
        """The layer's number, from 0."""
        return self.features.layers[self.place]


def features_of_layer(
    source: Source,
    prepared: EncodedExamples,
    config: HeadConfig,
    layer: int | str,
    seed: int,
    inner: Sequence[EncodedExamples] = (),
    progress: Progress = SILENT,
) -> Chosen:
    """The hidden states that a head reads, of one layer or of the best; ``inner`` are the divisions of inner folds."""
    if layer != AUTO:
        (number,) = resolve_layers([int(layer)], source.model)
        return Chosen(source.features(prepared, config.reads, (number,), f"layer-{number}", progress), 0)
    every = tuple(range(source.model.config.num_hidden_layers + 1))
    probe = replace(config, kind="linear")
    tried = [prepared, *inner]
    if probe.reads != RESIDUES:
        features = source.features(prepared, probe.reads, every, "features", progress)
    else:
        places = _pilot(prepared, inner, seed)
        tried = [one.chosen(places) for one in tried]
        titled = replace(source, title="choosing the layer")
        features = titled.features(tried[0], RESIDUES, every, f"{source.fold}-pilot", progress)
    scores = _scores(probe, tried[1:] or tried, features, seed, progress)
    choice = Choice("layer", every, scores) if inner else None
    losses = {} if inner else dict(enumerate(scores[:, 0, 1].tolist()))
    best = min(losses, key=lambda number: losses[number]) if choice is None else choice.best
    if config.reads == probe.reads != RESIDUES:
        return Chosen(features, best, losses, choice)
    features = source.features(prepared, config.reads, (best,), f"layer-{best}", progress)
    return Chosen(features, 0, losses, choice)


def fit(
    config: HeadConfig,
    prepared: EncodedExamples,
    chosen: Chosen,
    settings: ProbeSettings,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Trained:
    """Train a head on the training part; the validation part chooses penalty or epoch."""
    train, validation = (Examples.of(prepared, part, chosen.features, chosen.place) for part in ("train", "validation"))
    return train_head(config, train, validation, settings, seed=seed, progress=progress)


def _pilot(prepared: EncodedExamples, inner: Sequence[EncodedExamples], seed: int) -> Ints:
    """Some examples, drawn at random: of the training and validation parts, or of every inner fold."""
    generator = np.random.default_rng(seed)
    wanted = [(prepared.places(part), residues) for part, residues in _PILOT.items()]
    if inner:
        each = -(-sum(_PILOT.values()) // len(inner))
        wanted = [(division.places("validation"), each) for division in inner]
    chosen: list[Ints] = []
    for places, residues in wanted:
        drawn = generator.permutation(places)
        sizes = np.cumsum([len(prepared.labelled.targets[place]) for place in drawn])
        chosen.append(drawn[: int(np.searchsorted(sizes, residues)) + 1])
    return np.sort(np.concatenate(chosen))


def _scores(
    config: HeadConfig, divisions: Sequence[EncodedExamples], features: Features, seed: int, progress: Progress
) -> Floats:
    """``[layers, divisions, 2]``: number and loss on the validation part of a linear head on each layer."""
    scores = np.empty((len(features.layers), len(divisions), 2))
    progress.begin("choosing the layer", scores.shape[0] * scores.shape[1])
    for place, number in np.ndindex(scores.shape[:2]):
        trained = fit(config, divisions[number], Chosen(features, place), ProbeSettings(), seed=seed)
        scores[place, number] = trained.selected, trained.loss
        progress.advance()
    return scores
