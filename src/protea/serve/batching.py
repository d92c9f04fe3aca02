"""Continuous batching: the passes of all requests share packs, first in, first out, fair between clients.

A request runs in a thread of its own, with the functions that the commands use; they get a ``SharedRunner``, whose
packs are computed by one thread for all requests. That thread takes what waits whenever it is free: no timer holds
anything back. The client that has been served the fewest tokens is next; its passes are taken in their order. On a CPU
a pass gives the same bits whatever shares its pack.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any, Final

from torch import Tensor

from protea.errors import DeviceError
from protea.infer.runner import Job, Result, Runner
from protea.models.encoder import Encoder
from protea.serve.admission import Ticket
from protea.serve.problems import RefusedError

_AHEAD: Final = 2  # packs of one request that are queued at a time, so that a large one leaves room for others


@dataclass
class _Batch:
    """Passes that a request waits for together."""

    ticket: Ticket
    results: list[Result[Any] | None]
    missing: int
    done: Event = field(default_factory=Event)
    failure: Exception | None = None

    def wait(self) -> list[Result[Any]]:
        """The results, in order; a refusal if the client has gone or the request takes too long."""
        while not self.done.wait(0.2 if self.ticket.left is None else min(0.2, max(self.ticket.left, 0.001))):
            if self.ticket.cancelled.is_set():
                raise RefusedError("the client has closed the connection", 499, "gone")
            if self.ticket.left is not None and self.ticket.left <= 0:
                raise RefusedError("the request took too long; try again later", 503, "timeout", retry_after=5)
        if self.failure is not None:
            raise self.failure
        return [result for result in self.results if result is not None]


@dataclass
class _Pass:
    """One job in a queue: where its result belongs, and since when it waits."""

    job: Job[Any]
    batch: _Batch
    place: int
    since: float


class Lane:
    """The passes that wait for one model, by client."""

    def __init__(self, name: str, model: Encoder, budget: int) -> None:
        self.name, self.model, self.budget = name, model, budget
        self.runner = Runner(model, budget)
        self._waiting: dict[str, deque[_Pass]] = {}
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def oldest(self) -> float | None:
        """Since when the pass waits that has waited longest."""
        return min((queue[0].since for queue in self._waiting.values()), default=None)

    def add(self, client: str, passes: Iterable[_Pass]) -> None:
        """Add passes behind those of the same client; a new client begins with the least that others were served."""
        if client not in self._waiting:
            self._waiting[client] = deque()
            self._served[client] = min((self._served[name] for name in self._served), default=0)
        self._waiting[client].extend(passes)

    def next_pack(self) -> list[_Pass]:
        """The passes of the next pack, as many as the budget holds; those of clients who have gone are dropped."""
        chosen: list[_Pass] = []
        filled = 0
        while (client := self._next_client()) is not None:
            queue = self._waiting[client]
            first = queue[0]
            size, alone = len(first.job.tokens), first.job.wanted.watch is not None
            if chosen and (filled + size > self.budget or alone):
                break
            chosen.append(queue.popleft())
            self._served[client] += size
            filled += size
            if alone:  # it watches attention: a pack that is computed again in halves would confuse it
                break
        self._next_client()
        return chosen

    def _next_client(self) -> str | None:
        for client, queue in list(self._waiting.items()):
            while queue and queue[0].batch.ticket.cancelled.is_set():
                queue.popleft()
            if not queue:
                del self._waiting[client], self._served[client]
        return min(self._waiting, key=self._served.__getitem__, default=None)


@dataclass(frozen=True)
class Computed:
    """What is known of a pack that was computed, for metrics."""

    model: str
    passes: int
    tokens: int
    seconds: float
    waited: tuple[float, ...]


class Engine:
    """Computes the packs of all lanes in one thread; ``observe`` is called after each pack."""

    def __init__(self, observe: Callable[[Computed], object] = lambda computed: None) -> None:
        self._observe = observe
        self._lanes: list[Lane] = []
        self._changed = Condition()
        self._stopping = False
        self._thread = Thread(target=self._work, name="protea-engine", daemon=True)

    def add(self, lane: Lane) -> None:
        """Serve one more model."""
        self._lanes.append(lane)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self) -> None:
        """End after the pack that is being computed; what waits is refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """The number of passes that wait."""
        with self._changed:
            return sum(map(len, self._lanes))

    def submit(self, lane: Lane, ticket: Ticket, jobs: list[Job[Any]]) -> _Batch:
        """Queue jobs of one request."""
        batch, now = _Batch(ticket, [None] * len(jobs), len(jobs)), time.monotonic()
        with self._changed:
            if self._stopping:
                raise RefusedError("the service has ended", 503, "draining", retry_after=10)
            lane.add(ticket.client, (_Pass(job, batch, place, now) for place, job in enumerate(jobs)))
            self._changed.notify_all()
        return batch

    def runner(self, lane: Lane, ticket: Ticket) -> SharedRunner:
        """What computes the passes of one request."""
        return SharedRunner(self, lane, ticket)

    def _work(self) -> None:
        while (lane := self._next_lane()) is not None:
            # An accelerator computes one pack ahead while packs of the same model wait.
            packs = self._packs(lane)
            current: list[list[_Pass]] = []
            try:
                for (passes, began), results in lane.runner.each(
                    ((entry, (one.job for one in self._noted(entry[0], current))) for entry in packs), apart=True
                ):
                    current.pop(0)
                    self._deliver(lane, passes, results, began)
            except Exception as error:  # any failure belongs to the requests of these packs, never to the service
                for passes in current:
                    self._fail(passes, error)

    @staticmethod
    def _noted(passes: list[_Pass], current: list[list[_Pass]]) -> list[_Pass]:
        current.append(passes)
        return passes

    def _next_lane(self) -> Lane | None:
        """The lane of the pass that has waited longest; ``None`` at the end."""
        with self._changed:
            while True:
                if self._stopping:
                    return None
                waiting = [lane for lane in self._lanes if lane.oldest is not None]
                if waiting:
                    return min(waiting, key=lambda lane: lane.oldest or 0.0)
                self._changed.wait()

    def _packs(self, lane: Lane) -> Iterator[tuple[list[_Pass], float]]:
        """The packs of a lane until it is empty or another lane has waited longer."""
        while True:
            with self._changed:
                mine = lane.oldest
                others = [other.oldest for other in self._lanes if other is not lane and other.oldest is not None]
                if mine is None or self._stopping or any(other < mine for other in others):
                    return
                passes = lane.next_pack()
            if passes:
                yield passes, time.monotonic()

    def _deliver(self, lane: Lane, passes: list[_Pass], results: list[Result[Any]], began: float) -> None:
        now = time.monotonic()
        for one, result in zip(passes, results, strict=True):
            result.states = {key: _owned(value) for key, value in result.states.items()}
            self._give(one, result)
        tokens = sum(len(one.job.tokens) for one in passes)
        waited = tuple(began - one.since for one in passes)
        self._observe(Computed(lane.name, len(passes), tokens, now - began, waited))

    @staticmethod
    def _give(one: _Pass, result: Result[Any]) -> None:
        batch = one.batch
        batch.results[one.place] = result
        batch.missing -= 1
        batch.ticket.done(len(one.job.tokens))
        if not batch.missing:
            batch.done.set()

    @staticmethod
    def _fail(passes: list[_Pass], error: Exception) -> None:
        for one in passes:
            one.batch.failure = DeviceError(f"the pack could not be computed: {type(error).__name__}: {error}")
            one.batch.done.set()


class SharedRunner(Runner):
    """A runner for one request, whose packs are shared with other requests."""

    def __init__(self, engine: Engine, lane: Lane, ticket: Ticket) -> None:
        super().__init__(lane.model, lane.budget)
        self._engine, self._lane, self._ticket = engine, lane, ticket

    def _computed(self, packs: Iterable[list[Job[Any]]]) -> Iterator[list[Result[Any]]]:
        queued: deque[_Batch] = deque()
        for jobs in packs:
            if not jobs:
                yield []
                continue
            queued.append(self._engine.submit(self._lane, self._ticket, jobs))
            if len(queued) >= _AHEAD:
                yield queued.popleft().wait()
        while queued:
            yield queued.popleft().wait()


def _owned(value: Tensor) -> Tensor:
    """The tensor without the rest of a larger one that it is a part of, which it would keep in memory."""
    return value.clone() if value.untyped_storage().nbytes() > 2 * value.nbytes else value
