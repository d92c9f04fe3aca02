"""What the service counts, in Prometheus' form, in a registry of its own."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from protea.serve.admission import Gate
from protea.serve.batching import Computed, Engine

_SECONDS: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS: Final = tuple(2**power for power in range(4, 18))


class Metrics:
    """The numbers of one service."""

    def __init__(self) -> None:
        made = self.registry = CollectorRegistry()
        self.requests = Counter("protea_requests", "Answered requests", ["route", "code"], registry=made)
        self.rejected = Counter("protea_rejected", "Refused requests, by reason", ["reason"], registry=made)
        self.seconds = Histogram(
            "protea_request_seconds",
            "Time to the end of an answer",
            ["route"],
            buckets=_SECONDS,
            registry=made,
        )
        self.batch = Histogram("protea_batch_tokens", "Tokens of a pack", ["model"], buckets=_TOKENS, registry=made)
        self.waited = Histogram(
            "protea_queue_seconds", "Time that passes wait", ["model"], buckets=_SECONDS, registry=made
        )
        self.computed = Histogram(
            "protea_compute_seconds", "Time to compute a pack", ["model"], buckets=_SECONDS, registry=made
        )
        self.passes = Counter("protea_sequences", "Computed passes", ["model"], registry=made)
        self.tokens = Counter("protea_tokens", "Computed tokens", ["model"], registry=made)
        self.info = Gauge("protea_model_info", "Served models", ["model", "sha256", "computed_in"], registry=made)

    def watch(self, gate: Gate, engine: Engine) -> None:
        """Show how much waits whenever the numbers are read."""
        made = self.registry
        Gauge("protea_queue_tokens", "Tokens that wait", registry=made).set_function(lambda: gate.tokens)
        Gauge("protea_queue_sequences", "Passes that wait", registry=made).set_function(lambda: engine.waiting)
        Gauge("protea_open_requests", "Requests that are open", registry=made).set_function(lambda: gate.requests)

    def pack(self, computed: Computed) -> None:
        """Count a pack."""
        self.batch.labels(computed.model).observe(computed.tokens)
        self.computed.labels(computed.model).observe(computed.seconds)
        self.passes.labels(computed.model).inc(computed.passes)
        self.tokens.labels(computed.model).inc(computed.tokens)
        for seconds in computed.waited:
            self.waited.labels(computed.model).observe(seconds)

    def text(self) -> bytes:
        """All numbers."""
        return generate_latest(self.registry)
