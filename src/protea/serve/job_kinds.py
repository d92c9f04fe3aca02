"""What jobs compute, each by the function of its command, with packs that are shared with requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

from protea.contacts.maps import predict_maps, without_too_long, write_maps
from protea.data.masking import masking_named
from protea.embed.embeddings import check_poolings, resolve_layers
from protea.embed.run import EmbedRun
from protea.embed.settings import parse
from protea.finetune.predictions import predict
from protea.infer.runner import Runner
from protea.letters import ReportRow
from protea.progress import Progress
from protea.score.effects import Scoring
from protea.score.expected import LongProtein
from protea.score.perplexity import measure_perplexity
from protea.score.proteins import Reading, choice, wild_types
from protea.score.variant_table import score_variants, variant_table
from protea.serve.admission import Gate, Ticket
from protea.serve.batching import Engine, Lane
from protea.serve.problems import RefusedError
from protea.serve.served import Served, ServedModel

Kind = Literal["embed", "residues", "logits", "predict", "score", "scan", "contacts", "perplexity"]

_OUTPUT: Final = {"embed": "sequences", "residues": "residues", "logits": "logits"}
_ANY: Final = ("unknown", "gaps")
_EMBED: Final = ("model", "layers", "long", "duplicates", *_ANY)
_TABLE: Final = ("parquet", "csv", "tsv")


class Means(NamedTuple):
    """What jobs compute with."""

    engine: Engine
    gate: Gate
    served: Served


class JobForm(NamedTuple):
    """The formats of a kind's result, the first is the default, and the options that it reads."""

    formats: tuple[str, ...]
    options: tuple[str, ...]


FORMS: Final[Mapping[str, JobForm]] = {
    "embed": JobForm(("parquet", "h5", "csv", "npz"), (*_EMBED, "pool")),
    "residues": JobForm(("parquet", "h5"), _EMBED),
    "logits": JobForm(("parquet", "h5"), ("model", "long", "duplicates", *_ANY)),
    "predict": JobForm(("parquet", "csv", "tsv", "h5"), ("adapter", "long", "duplicates", *_ANY)),
    "score": JobForm(_TABLE, ("model", "variants", "method", "offset", "long", *_ANY)),
    "scan": JobForm(_TABLE, ("model", "method", "offset", "long", *_ANY)),
    "contacts": JobForm(("h5", *_TABLE), ("model", "min_probability", "min_separation", *_ANY)),
    "perplexity": JobForm(_TABLE, ("model", "pseudo", "masking", "seed", "long", *_ANY)),
}
"""Forms by what is computed."""


def check(served: Served, what: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the model or adapter, and the other options; refuses now what would fail later."""
    if foreign := [name for name in given if name not in FORMS[what].options]:
        raise RefusedError(f"{foreign[0]}: {what} has no such option; it has {', '.join(FORMS[what].options)}")
    options = {name: value for name, value in given.items() if name not in ("model", "adapter")}
    if what == "predict":
        if given.get("adapter") is None:
            raise RefusedError("adapter: name the adapter that predicts")
        return served.adapter(given["adapter"]).name, options
    model = served.model(given.get("model"))
    module = model.lane.model
    if what in _OUTPUT:
        settings = parse({**options, "inputs": ["input.fasta"], _OUTPUT[what]: "result.parquet"}, "the job")
        resolve_layers(settings.layers, module)
        check_poolings(settings.pool, module.alphabet.frame)
    if what in ("logits", "score", "scan", "perplexity"):
        module.require("logits")
    if what == "contacts":
        module.require("contacts")
    if what == "score":
        if not options.get("variants"):
            raise RefusedError("variants: name the variants to score, as in variants=A24V,A24V:G30S")
        variant_table(options["variants"].split(","))
    if what in ("score", "scan"):
        _scoring(options)
    if what == "perplexity":
        masking_named(options.get("masking", "standard"))
        policies = LongProtein if options.get("pseudo") else Literal["truncate", "full", "error"]
        choice("long", options.get("long", get_args(policies)[0]), policies)
    return model.name, options


@dataclass(frozen=True)
class Computation:
    """One job to compute: what, with which means, from which file into which."""

    means: Means
    ticket: Ticket
    progress: Progress
    target: str
    options: Mapping[str, Any]
    input: Path
    result: Path

    def __call__(self, what: str) -> None:
        """Compute the job; what an earlier call has left unfinished is continued, or begun again."""
        other: Mapping[str, Callable[[], object]] = {
            "predict": self._predict,
            "score": self._effects,
            "scan": self._effects,
            "contacts": self._contacts,
            "perplexity": self._perplexity,
        }
        other.get(what, partial(self._embed, what))()

    @property
    def _model(self) -> ServedModel:
        return self.means.served.model(self.target)

    def _runner(self, lane: Lane) -> Runner:
        return self.means.engine.runner(lane, self.ticket)

    def _embed(self, what: str) -> None:
        model = self._model
        values = {**self.options, "inputs": [str(self.input)], _OUTPUT[what]: str(self.result)}
        values |= {"model": model.name, "token_budget": model.lane.budget, "dtype": self.means.served.loader.dtype}
        run = EmbedRun(
            parse(values, "the job"),
            model.lane.model,
            model.loaded.weights_sha256(),
            progress=self.progress,
            make_runner=lambda _, __: self._runner(model.lane),
        )
        run()

    def _predict(self) -> None:
        adapter = self.means.served.adapter(self.target)
        values = {**self.options, "inputs": [str(self.input)], "sequences": str(self.result)}
        predict(
            adapter.folder,
            {**values, "token_budget": adapter.lane.budget},
            load=self.means.served.loader,
            progress=self.progress,
            make_runner=lambda _, __: self._runner(adapter.lane),
        )

    @property
    def _of_table(self) -> dict[str, Any]:
        """Arguments of every command that writes one table: how it reads, where it writes, and who computes."""
        return {
            "reading": self._reading,
            "output": self.result,
            "overwrite": True,
            "load": self.means.served.loader,
            "progress": self.progress,
            "make_runner": lambda _, __: self._runner(self._model.lane),
        }

    def _effects(self) -> None:
        variants = self.options.get("variants")
        score_variants(
            str(self.input),
            None if variants is None else variants.split(","),
            _scoring(self.options),
            models=(self.target,),
            **self._of_table,
        )

    def _perplexity(self) -> None:
        options = {name: value for name, value in self.options.items() if name not in _ANY}
        measure_perplexity(
            [str(self.input)],
            model=self.target,
            **self._of_table,
            **options,
        )

    def _contacts(self) -> None:
        rows: list[ReportRow] = []
        model, runner = self._model, self._runner(self._model.lane)
        module = model.lane.model
        proteins = without_too_long(module, wild_types([self.input], module.alphabet, self._reading, rows), rows)
        maps = predict_maps(module, proteins, lambda _, __: None, self.progress, runner)
        settings = {"command": "contacts", "inputs": [self.input.name], "models": {model.name: model.sha256}}
        least = {
            name: self.options.get(name, usual) for name, usual in (("min_probability", 0.1), ("min_separation", 6))
        }
        write_maps(self.result, maps, rows, settings | least)

    @property
    def _reading(self) -> Reading:
        return Reading(**{name: self.options[name] for name in _ANY if name in self.options})


def _scoring(options: Mapping[str, Any]) -> Scoring:
    return Scoring(**{name: options[name] for name in ("method", "offset", "long") if name in options})
