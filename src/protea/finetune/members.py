"""One trained predictor of a run: a head, the model below it, and the hidden states that it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protea.embed.embeddings import resolve_layers
from protea.errors import ResumeError
from protea.finetune import frozen
from protea.finetune.choices import Choice
from protea.finetune.examples import EncodedExamples, Examples
from protea.finetune.features import random_twin
from protea.finetune.finetune_settings import FinetuneSettings
from protea.finetune.frozen import Chosen, Source
from protea.finetune.heads import DEFAULTS, Head, HeadConfig
from protea.finetune.probe import ProbeSettings, predict, rank
from protea.finetune.tasks import Floats, Labelled, Part
from protea.infer.loading import LoadedModel, load_model
from protea.models.encoder import Encoder
from protea.output import write_durably
from protea.progress import Progress
from protea.transforms.cpu import pack_for_cpu

if TYPE_CHECKING:
    from protea.finetune.adapters import Adapter
    from protea.finetune.tuning import Tuned


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
        choice: of its layer or learning rate on inner folds.
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
    choice: Choice[Any] | None = None
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
    """Trains the members of one fold; the folder of the run holds what a killed run continues from.

    ``inner`` are the divisions of a nested split: layer and learning rate are chosen on them, not on the validation
    part.
    """

    settings: FinetuneSettings
    loaded: LoadedModel
    folder: Path
    fold: str
    identity: dict[str, Any]
    progress: Progress
    inner: Sequence[EncodedExamples] = ()

    def members(self, prepared: EncodedExamples) -> list[Member]:
        """All members: one for each seed, at the best learning rate."""
        seeds = range(self.settings.seed, self.settings.seed + self.settings.seeds)
        if self.settings.method == "frozen":
            return self.frozen(prepared, self.settings.layer, seeds)
        rates = list(dict.fromkeys(self.settings.lr or ()))
        choice = self._choice(rates) if self.inner and len(rates) > 1 else None
        kept: Sequence[float | None] = (rates or [None]) if choice is None else [choice.best]
        best = best_member([self._tuned(prepared, rate, seeds[0]) for rate in kept])
        members = [best, *(self._tuned(prepared, best.lr, seed) for seed in seeds[1:])]
        return [replace(member, choice=choice) for member in members]

    def frozen(self, prepared: EncodedExamples, layer: int | str, seeds: Sequence[int]) -> list[Member]:
        """Heads on the model as it is, one for each seed."""
        return self._probes(self._source(self.loaded.module, "frozen", {}), prepared, layer, seeds)

    def random(self, prepared: EncodedExamples, layer: int) -> Member:
        """The same on random weights: what the architecture gives without what pre-training taught."""
        twin = random_twin(self.loaded.module, self.settings.seed)
        source = self._source(twin, "random", {"random": self.settings.seed})
        return self._probes(source, prepared, layer, [self.settings.seed])[0]

    def _source(self, model: Encoder, name: str, identity: dict[str, Any]) -> Source:
        title = "embedding" if name == "frozen" else f"embedding, {name} weights"
        return Source(
            model, self.folder / name, self.fold, {**self.identity, **identity}, self.settings.token_budget, title
        )

    def _lengths(self) -> dict[str, Any]:
        """How long to train, as far as it is given."""
        given = self.settings.model_dump(include={"epochs", "batch", "patience"})
        return {name: value for name, value in given.items() if value is not None}

    def _probes(
        self, source: Source, prepared: EncodedExamples, layer: int | str, seeds: Sequence[int]
    ) -> list[Member]:
        """Heads on hidden states of ``source``; epochs, batch and patience of lora and full are not for baselines."""
        config, settings = head_of(self.settings, self.loaded.module, prepared.labelled), self.settings
        own = self._lengths() if settings.method == "frozen" else {}
        own["epochs"] = int(own.get("epochs", ProbeSettings.epochs))
        chosen = frozen.features_of_layer(source, prepared, config, layer, settings.seed, self.inner, self.progress)
        probe = ProbeSettings(
            lr=settings.head_lr,
            weight_decay=settings.weight_decay,
            class_weights=settings.class_weights,
            **own,
        )
        found = [f"layer {chosen.layer} has the least loss on the validation part"] if chosen.losses else []
        members = []
        for seed in seeds:
            trained = frozen.fit(config, prepared, chosen, probe, seed=seed, progress=self.progress)
            members.append(
                Member(
                    trained.head, prepared, chosen, source.model, seed, None, trained.selected, trained.loss,
                    choice=chosen.choice, curve=trained.curve, notes=[*found, *trained.notes],
                )
            )  # fmt: skip
        return members

    def _choice(self, rates: Sequence[float]) -> Choice[float]:
        scores = [[self._score(rate, place) for place in range(len(self.inner))] for rate in rates]
        return Choice("lr", rates, np.array(scores))

    def _score(self, rate: float, place: int) -> tuple[float, float]:
        """Number and loss of a training on an inner fold; a file keeps them, and the checkpoints go."""
        folder = self.folder / f"{self.fold}-inner-{place + 1}-lr-{rate:g}"
        kept = self.folder / f"{folder.name}.json"
        try:
            selected, loss = map(float, json.loads(kept.read_text(encoding="utf-8")))
        except FileNotFoundError:
            tuned = self._tune(self.inner[place], rate, self.settings.seed, folder)
            selected, loss = tuned.selected, tuned.loss
            write_durably(kept, json.dumps([selected, loss]))
        except (ValueError, TypeError) as error:
            raise ResumeError(f"{kept}: is damaged ({error}); pass --overwrite to start again") from error
        shutil.rmtree(folder, ignore_errors=True)
        return selected, loss

    def _tuned(self, prepared: EncodedExamples, rate: float | None, seed: int) -> Member:
        label = f"{self.fold}-seed-{seed}" + ("" if rate is None else f"-lr-{rate:g}")
        tuned = self._tune(prepared, rate, seed, self.folder / label)
        pack_for_cpu(tuned.model)
        source = self._source(tuned.model, f"{label}-states", {"seed": seed, "lr": rate})
        config = head_of(self.settings, self.loaded.module, prepared.labelled)
        layers = resolve_layers([-1], tuned.model)
        features = source.features(prepared, config.reads, layers, "features", self.progress)
        return Member(
            tuned.head, prepared, Chosen(features, 0), tuned.model, seed, rate, tuned.selected, tuned.loss,
            adapter=tuned.adapter, curve=tuned.curve, notes=tuned.notes,
        )  # fmt: skip

    def _tune(self, prepared: EncodedExamples, rate: float | None, seed: int, work: Path) -> Tuned:
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
        return tune(
            lambda: load_model(self.loaded.path, device=settings.device, trainable=True).module,
            prepared,
            head_of(settings, self.loaded.module, prepared.labelled),
            tuning,
            work,
            identity=self.identity,
            seed=seed,
            progress=self.progress,
        )
