"""One service: its settings, its parts, and the application that serves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from protea import bundled
from protea.errors import UsageError
from protea.infer.loading import IN_FLOAT32, ModelLoader
from protea.serve.admission import Gate, Ticket
from protea.serve.batching import Engine
from protea.serve.job_kinds import Means
from protea.serve.job_store import JobStore
from protea.serve.problems import RefusedError
from protea.serve.safety import Keys, Limits, is_local, log_line
from protea.serve.served import Served
from protea.serve.service_metrics import Metrics
from protea.text import counted

_QUEUED_PACKS = 256
"""Packs that may wait, by default."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """The options of ``protea serve``.

    Attributes:
        models: names; the first is the default of requests.
        adapters: folders of predictors by name.
        max_batch_tokens: of a pack; by default as memory allows.
        max_queue_tokens: that may wait; by default those of 256 packs.
        max_sequences: of one request.
        max_requests: that are open at a time.
        timeout: seconds that a request may take.
        jobs: folder of jobs; without it there are none.
        keep_hours: for which the results of jobs are kept.
    """

    models: tuple[str, ...] = (bundled.NAME,)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    max_batch_tokens: int | None = None
    max_queue_tokens: int | None = None
    max_sequences: int = 2048
    max_requests: int = 256
    timeout: float = 300.0
    jobs: Path | None = None
    keep_hours: float = 72.0
    load: ModelLoader = IN_FLOAT32
    limits: Limits = field(default_factory=Limits)

    def keys(self) -> Keys | None:
        """The keys; a ``UsageError`` for an address that others can reach without one."""
        if self.api_key_file is not None:
            return Keys.read(self.api_key_file)
        if not is_local(self.host):
            raise UsageError(
                f"--host {self.host}: other machines can reach this address, so requests need a key; name a file of "
                "keys with --api-key-file, or listen on 127.0.0.1"
            )
        return None


class Service:
    """The parts of a running service."""

    def __init__(self, settings: ServiceSettings, log: Callable[[Mapping[str, Any]], None] = log_line) -> None:
        self.settings, self.log, self.keys = settings, log, settings.keys()
        self.metrics = Metrics()
        self.engine = Engine(self._computed)
        self.gate = Gate(settings.max_queue_tokens or 0, settings.max_requests, settings.timeout)
        self.metrics.watch(self.gate, self.engine)
        self.served: Served | None = None
        self.jobs = None if settings.jobs is None else JobStore(settings.jobs, settings.keep_hours)

    def load(self) -> None:
        """Load and warm up the models, then open the gate and continue jobs."""
        settings = self.settings
        served = Served.load(self.engine, settings.models, settings.adapters, settings.load, settings.max_batch_tokens)
        self.engine.start()
        served.warm_up(self.gate)
        largest = max(model.lane.budget for model in served.models.values())
        self.gate.pack, self.gate.most_tokens = largest, settings.max_queue_tokens or _QUEUED_PACKS * largest
        for model in served.models.values():
            self.metrics.info.labels(model.name, model.sha256, model.lane.model.precision).set(1)
        self.served = served
        if self.jobs is not None:
            self.jobs.start(Means(self.engine, self.gate, served))
        self.gate.ready = True

    def drain(self) -> None:
        """Answer what was taken, refuse what is new."""
        self.gate.draining = True

    def stop(self) -> None:
        """End all threads; jobs keep what they have computed."""
        self.drain()
        if self.jobs is not None:
            self.jobs.stop()
        self.engine.stop()

    @property
    def ready(self) -> Served:
        """The models, when they are loaded."""
        self.gate.check_open()
        assert self.served is not None
        return self.served

    def admit(self, request: Request, tokens: int) -> Ticket:
        """A ticket for a request of so many tokens; see ``Gate.admit``."""
        self.gate.entering -= request.scope["state"].pop("entering", 0)
        return self.gate.admit(request.state.client, tokens)

    def check_count(self, sequences: int) -> None:
        """Refuse a request of too many sequences before it costs anything."""
        if sequences > self.settings.max_sequences:
            raise RefusedError(
                f"the request has {counted(sequences, 'sequence')}, and at most {self.settings.max_sequences:,} are "
                "taken; send fewer at a time, or make a job of them (/v1/jobs)",
                413,
                "too-many-sequences",
            )

    def _computed(self, computed: Any) -> None:
        self.metrics.pack(computed)
        self.gate.measured(computed.tokens, computed.seconds)
