"""The models and adapters of a service: loaded once, shared where their weights are the same, memory planned first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from protea.checkpoints.hub import locate
from protea.checkpoints.summary import describe
from protea.device import resolve_device
from protea.embed.embeddings import Asked
from protea.errors import DeviceError, UsageError
from protea.finetune.foreign import is_foreign, read_foreign
from protea.finetune.predictor import Predictor, read_predictor, with_encoder
from protea.infer.loading import LoadedModel, ModelLoader, load_model
from protea.infer.runner import Job, Wanted, default_budget
from protea.limits import free_memory
from protea.serve.admission import Gate
from protea.serve.batching import Engine, Lane
from protea.serve.problems import RefusedError
from protea.text import bytes_text

_SPARE: Final = 1.2  # of the weights, for what the packs need


@dataclass(frozen=True)
class SharingLoader(ModelLoader):
    """Loads each model once."""

    loaded: dict[Path, LoadedModel] = field(default_factory=dict, compare=False)

    def __call__(self, model: str) -> LoadedModel:
        """The model; see ``load_model``."""
        path = locate(model).resolve()
        if path not in self.loaded:
            self.loaded[path] = load_model(model, device=self.device, dtype=self.dtype)
        return self.loaded[path]


@dataclass(frozen=True)
class ServedModel:
    """A model with its queue."""

    name: str
    loaded: LoadedModel
    lane: Lane
    sha256: str


@dataclass(frozen=True)
class ServedAdapter:
    """A predictor with the queue of its encoder, and the folder that holds it."""

    name: str
    folder: Path
    predictor: Predictor
    lane: Lane


@dataclass
class Served:
    """All that a service computes with, by name."""

    engine: Engine
    models: dict[str, ServedModel]
    adapters: dict[str, ServedAdapter]
    loader: ModelLoader

    @classmethod
    def load(
        cls, engine: Engine, models: Sequence[str], adapters: Mapping[str, Path], load: ModelLoader, budget: int | None
    ) -> Served:
        """Load models and adapters; a ``DeviceError`` if the weights do not fit into memory."""
        _plan(models, load)
        loader = SharingLoader(load.device, load.dtype)
        lanes: dict[int, Lane] = {}

        def lane_of(name: str, module: Any) -> Lane:
            if id(module) not in lanes:
                lanes[id(module)] = Lane(name, module, budget or default_budget(module))
                engine.add(lanes[id(module)])
            return lanes[id(module)]

        served: dict[str, ServedModel] = {}
        for name in models:
            if name in served:
                raise UsageError(f"-m {name}: this model is named twice; name each model once")
            loaded = loader(name)
            sha = ",".join(loaded.weights_sha256().values())
            served[name] = ServedModel(name, loaded, lane_of(name, loaded.module), sha)
        tuned: dict[str, ServedAdapter] = {}
        for name, folder in adapters.items():
            base = None
            if is_foreign(folder):
                predictor = read_foreign(folder, loader, base)
            else:
                predictor = with_encoder(read_predictor(folder), folder, loader, base)
            if predictor.task.unit == "pair":
                raise UsageError(f"--adapter {name}={folder}: a predictor of pairs cannot be served")
            tuned[name] = ServedAdapter(name, folder, predictor, lane_of(name, predictor.encoder))
        return cls(engine, served, tuned, loader)

    def model(self, name: str | None) -> ServedModel:
        """A served model; by default the first. Only served names are looked up, never files."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise RefusedError(
                f"the model {name[:100]!r} is not served; served are {', '.join(self.models)}",
                404,
                "unknown-model",
                more={"parameter": "model"},
            )
        return self.models[name]

    def adapter(self, name: str) -> ServedAdapter:
        """A served adapter."""
        if name not in self.adapters:
            served = ", ".join(self.adapters) or "none; start the service with --adapter NAME=RUN"
            raise RefusedError(f"the adapter {name[:100]!r} is not served; served are {served}", 404, "unknown-adapter")
        return self.adapters[name]

    def warm_up(self, gate: Gate) -> None:
        """Compute a pack of each model, so that the first request does not wait for what is prepared once."""
        lanes = [*(one.lane for one in self.models.values()), *(one.lane for one in self.adapters.values())]
        for lane in {id(lane): lane for lane in lanes}.values():
            alphabet = lane.model.alphabet
            size = min(lane.budget, lane.model.trained_tokens)
            tokens = alphabet.frame.around(
                np.full(alphabet.frame.residues(size), alphabet.encode("A")[0], dtype=np.uint8)
            )
            ticket = gate.for_job("warm-up")
            try:
                job = Job(tokens, Wanted(layers=(lane.model.config.num_hidden_layers,)), None, "warm-up")
                for result in self.engine.runner(lane, ticket).run([job]):
                    result.checked()
            finally:
                ticket.close()


def kinds_of(predictor: Predictor) -> Asked:
    """The embedding that a predictor reads."""
    kinds = predictor.kinds
    poolings = tuple(name for name in kinds if name != "residues")
    return Asked(layers=(predictor.layer,), poolings=poolings, residues="residues" in kinds)


def _plan(models: Sequence[str], load: ModelLoader) -> None:
    """Refuse models whose weights do not fit together."""
    needed = 0
    for name in models:
        locate(name)  # downloads a published model
        # Without a number the model cannot compute in this type; loading says so.
        needed += int(describe(name)["memory_bytes"].get(load.dtype, 0) * _SPARE)
    free = free_memory(resolve_device(load.device))
    if needed > free:
        raise DeviceError(
            f"{', '.join(models)}: their weights need {bytes_text(needed)} of memory, and {bytes_text(free)} are free; "
            "serve fewer or smaller models, or compute in bfloat16"
        )
