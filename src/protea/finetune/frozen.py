"""A head on the hidden states of a model that does not change, and the choice of their layer.

``layer="auto"`` tries every layer with a linear head and takes the one with the least loss on the validation part. For
vectors of sequences, one pass gives all layers. All layers of all residues would take too much disk; for residues, a
sample of proteins chooses the layer, and then one pass gives it for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from protea.embed.embeddings import resolve_layers
from protea.finetune.examples import EncodedExamples, Examples
from protea.finetune.features import Features, compute
from protea.finetune.heads import RESIDUES, HeadConfig
from protea.finetune.probe import ProbeSettings, Trained, train_head
from protea.finetune.tasks import Ints
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress

AUTO: Final = "auto"
_PILOT: Final = {"train": 60_000, "validation": 30_000}
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
    """Hidden states of one layer, the layer's number, and for ``auto`` the loss of each layer on validation."""

    features: Features
    place: int  # of the layer in ``features.layers``
    losses: dict[int, float]

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
    progress: Progress = SILENT,
) -> Chosen:
    """The hidden states that a head reads, of one layer or of the best."""
    if layer != AUTO:
        (number,) = resolve_layers([int(layer)], source.model)
        return Chosen(source.features(prepared, config.reads, (number,), f"layer-{number}", progress), 0, {})
    every = tuple(range(source.model.config.num_hidden_layers + 1))
    probe = replace(config, kind="linear")
    if probe.reads != RESIDUES:
        features = source.features(prepared, probe.reads, every, "features", progress)
        losses = _losses(probe, prepared, features, seed)
        best = min(losses, key=lambda number: losses[number])
        if config.reads == probe.reads:
            return Chosen(features, best, losses)
    else:
        losses = _losses(probe, pilot := _pilot(prepared, seed), _pilot_features(source, pilot, every, progress), seed)
        best = min(losses, key=lambda number: losses[number])
    return Chosen(source.features(prepared, config.reads, (best,), f"layer-{best}", progress), 0, losses)


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


def _pilot_features(source: Source, pilot: EncodedExamples, layers: tuple[int, ...], progress: Progress) -> Features:
    titled = replace(source, title="choosing the layer")
    return titled.features(pilot, RESIDUES, layers, f"{source.fold}-pilot", progress)


def _pilot(prepared: EncodedExamples, seed: int) -> EncodedExamples:
    """Some proteins of the training and validation parts, drawn at random."""
    generator = np.random.default_rng(seed)
    chosen: list[Ints] = []
    for part, residues in _PILOT.items():
        places = generator.permutation(prepared.places(part))  # type: ignore[arg-type]
        sizes = np.cumsum([len(prepared.labelled.targets[place]) for place in places])
        chosen.append(places[: int(np.searchsorted(sizes, residues)) + 1])
    places = np.sort(np.concatenate(chosen))
    sequences, which = np.unique(prepared.which[places], return_inverse=True)
    records = [prepared.sequences[number] for number in sequences]
    return EncodedExamples(prepared.labelled.chosen(places.tolist()), records, which.reshape(len(places), -1))


def _losses(config: HeadConfig, prepared: EncodedExamples, features: Features, seed: int) -> dict[int, float]:
    """The validation loss of a linear head on each layer, by the layer's place."""
    losses = {}
    for place in range(len(features.layers)):
        chosen = Chosen(features, place, {})
        losses[place] = fit(config, prepared, chosen, ProbeSettings(), seed=seed).loss
    return losses
