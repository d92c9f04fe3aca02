"""One trained predictor of a run: a head, the model below it, and the hidden states that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protea.embed.embeddings import resolve_layers
from protea.finetune import frozen
from protea.finetune.examples import EncodedExamples, Examples
from protea.finetune.features import random_twin
from protea.finetune.finetune_settings import FinetuneSettings
from protea.finetune.frozen import Chosen, Source
from protea.finetune.heads import DEFAULTS, Head, HeadConfig
from protea.finetune.probe import ProbeSettings, predict, rank
from protea.finetune.tasks import Floats, Labelled, Part
from protea.infer.loading import LoadedModel, load_model
from protea.models.encoder import Encoder
from protea.progress import Progress
from protea.transforms.cpu import pack_for_cpu

if TYPE_CHECKING:
    from protea.finetune.adapters import Adapter


@dataclass
class Member:
    """A trained head with the hidden states of all sequences.

    Attributes:
        head: with its final weights.
        prepared: the examples with their parts.
        chosen: hidden states of the layer that it reads.
        encoder: the model with its final weights.
        seed: of its training.
        lr: learning rate of the encoder; ``None`` for a frozen one.
        selected: the number on the validation part that chooses between members.
        loss: on the validation part.
        adapter: LoRA's weights.
        curve: the learning curve, columns of ``curve.tsv``.
        notes: sentences for the user.
    """

    head: Head
    prepared: EncodedExamples
    chosen: Chosen
    encoder: Encoder
    seed: int
    lr: float | None
    selected: float
    loss: float
    adapter: Adapter | None = None
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def predictions(self, part: Part) -> Floats:
        """Probabilities ``[R, C]`` or values ``[R]`` of a part."""
        return predict(self.head, Examples.of(self.prepared, part, self.chosen.features, self.chosen.place))


def best_member(members: Sequence[Member]) -> Member:
    """The first of the best on the validation part."""
    return max(members, key=lambda member: rank(member.selected, member.loss))


def head_of(settings: FinetuneSettings, model: Encoder, data: Labelled) -> HeadConfig:
    """The head that the settings ask for."""
    return HeadConfig(
        kind=settings.head or DEFAULTS[data.task.unit],
        task=data.task.name,
        width=model.config.hidden_size,
        outputs=1 if data.task.kind == "value" else len(data.classes),
        pool=settings.pool,
        hidden=settings.hidden,
        dropout=settings.dropout,
    )


@dataclass(frozen=True)
class Trainer:
    """Trains the members of one fold; the folder of the run holds what a killed run continues from."""

    settings: FinetuneSettings
    loaded: LoadedModel
    folder: Path
    fold: str
    identity: dict[str, Any]
    progress: Progress

    def members(self, prepared: EncodedExamples) -> list[Member]:
        """All members: one for each seed, at the learning rate that is best on the validation part."""
        seeds = range(self.settings.seed, self.settings.seed + self.settings.seeds)
        if self.settings.method == "frozen":
            return [self.frozen(prepared, self.settings.layer, seed) for seed in seeds]
        rates: Sequence[float | None] = self.settings.lr or [None]
        swept = [[self._tuned(prepared, rate, seed) for seed in seeds[:1]] for rate in rates]
        best = best_member([members[0] for members in swept])
        return [best, *(self._tuned(prepared, best.lr, seed) for seed in seeds[1:])]

    def frozen(self, prepared: EncodedExamples, layer: int | str, seed: int) -> Member:
        """A head on the model as it is."""
        return self._probe(self._source(self.loaded.module, "frozen", {}), prepared, layer, seed)

    def random(self, prepared: EncodedExamples, layer: int) -> Member:
        """The same on random weights: what the architecture gives without what pre-training taught."""
        twin = random_twin(self.loaded.module, self.settings.seed)
        source = self._source(twin, "random", {"random": self.settings.seed})
        return self._probe(source, prepared, layer, self.settings.seed)

    def _source(self, model: Encoder, name: str, identity: dict[str, Any]) -> Source:
        title = "embedding" if name == "frozen" else f"embedding, {name} weights"
        return Source(
            model, self.folder / name, self.fold, {**self.identity, **identity}, self.settings.token_budget, title
        )

    def _lengths(self) -> dict[str, Any]:
        """How long to train, as far as it is given."""
        given = self.settings.model_dump(include={"epochs", "batch", "patience"})
        return {name: value for name, value in given.items() if value is not None}

    def _probe(self, source: Source, prepared: EncodedExamples, layer: int | str, seed: int) -> Member:
        """A head on hidden states of ``source``; epochs, batch and patience of lora and full are not for baselines."""
        config, settings = head_of(self.settings, self.loaded.module, prepared.labelled), self.settings
        own = self._lengths() if settings.method == "frozen" else {}
        own["epochs"] = int(own.get("epochs", ProbeSettings.epochs))
        chosen = frozen.features_of_layer(source, prepared, config, layer, settings.seed, self.progress)
        probe = ProbeSettings(
            lr=settings.head_lr,
            weight_decay=settings.weight_decay,
            class_weights=settings.class_weights,
            **own,
        )
        trained = frozen.fit(config, prepared, chosen, probe, seed=seed, progress=self.progress)
        notes = list(trained.notes)
        if chosen.losses:
            notes.insert(0, f"layer {chosen.layer} has the least loss on the validation part")
        return Member(
            trained.head, prepared, chosen, source.model, seed, None, trained.selected, trained.loss,
            curve=trained.curve, notes=notes,
        )  # fmt: skip

    def _tuned(self, prepared: EncodedExamples, rate: float | None, seed: int) -> Member:
        from protea.finetune.tuning import TuneSettings, tune

        settings = self.settings
        tuning = TuneSettings(
            method=settings.method,  # type: ignore[arg-type]
            lr=rate,
            head_lr=settings.head_lr,
            weight_decay=settings.weight_decay,
            rank=settings.rank,
            alpha=settings.lora_alpha,
            dora=settings.dora,
            layer_decay=settings.layer_decay,
            token_budget=settings.token_budget,
            precision=settings.precision,
            recompute=settings.recompute,
            class_weights=settings.class_weights,
            **self._lengths(),
        )
        label = f"{self.fold}-seed-{seed}" + ("" if rate is None else f"-lr-{rate:g}")
        tuned = tune(
            lambda: load_model(self.loaded.path, device=settings.device, trainable=True).module,
            prepared,
            head_of(self.settings, self.loaded.module, prepared.labelled),
            tuning,
            self.folder / label,
            identity=self.identity,
            seed=seed,
            progress=self.progress,
        )
        pack_for_cpu(tuned.model)
        source = self._source(tuned.model, f"{label}-states", {"seed": seed, "lr": rate})
        config = head_of(self.settings, self.loaded.module, prepared.labelled)
        layers = resolve_layers([-1], tuned.model)
        features = source.features(prepared, config.reads, layers, "features", self.progress)
        return Member(
            tuned.head, prepared, Chosen(features, 0, {}), tuned.model, seed, rate, tuned.selected, tuned.loss,
            adapter=tuned.adapter, curve=tuned.curve, notes=tuned.notes,
        )  # fmt: skip
