"""Which requests are taken: by the tokens that wait, never by a timer. One ticket for each request that is taken."""

from __future__ import annotations

import time
from threading import Event, Lock
from typing import Final

from protea.serve.problems import RefusedError
from protea.text import counted

_LEAST_RATE: Final = 100.0  # tokens a second, before anything was measured
_REMEMBERED: Final = 0.9  # share of the former rate in the mean


class Ticket:
    """A request that was taken: whose it is, until when it may take, and whether its client still waits."""

    def __init__(self, gate: Gate, client: str, tokens: int, seconds: float | None) -> None:
        self._gate, self.client, self.tokens = gate, client, tokens
        self.expires = None if seconds is None else time.monotonic() + seconds
        self.cancelled = Event()
        self._open = True

    @property
    def left(self) -> float | None:
        """Seconds until the request takes too long; ``None`` without a limit."""
        return None if self.expires is None else self.expires - time.monotonic()

    def done(self, tokens: int) -> None:
        """Give back the room of computed tokens."""
        with self._gate.lock:
            given = min(tokens, self.tokens)
            self.tokens -= given
            self._gate.tokens -= given

    def close(self) -> None:
        """End the request: what still waits is dropped."""
        self.cancelled.set()
        with self._gate.lock:
            if self._open:
                self._open = False
                self._gate.requests -= 1
                self._gate.tokens -= self.tokens
                self.tokens = 0


class Gate:
    """Lets requests in while there is room for their tokens.

    Once a request was refused for its tokens, the door stays shut until that many are free, at most ``pack``: under
    overload requests are then refused before their bodies are read, and short ones do not always pass long ones.

    Attributes:
        most_tokens: that may wait, of all requests together; those of a job are not counted.
        most_requests: that may be open at a time, since each has a thread.
        pack: tokens of the largest pack.
        entering: bytes of the bodies that are being checked, an estimate of their tokens: of a crowd that comes at
            once, those are refused at the door whose room the ones before them will fill.
        ready: whether models are loaded.
        draining: whether the service ends.
    """

    def __init__(self, most_tokens: int, most_requests: int, seconds: float | None) -> None:
        self.most_tokens, self.most_requests, self.seconds = most_tokens, most_requests, seconds
        self.tokens = self.requests = self.pack = self.entering = self._needed = 0
        self.ready = self.draining = False
        self.lock = Lock()
        self._rate = _LEAST_RATE

    def measured(self, tokens: int, seconds: float) -> None:
        """Learn how fast the service computes, for ``Retry-After``."""
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if self._rate == _LEAST_RATE else _REMEMBERED * self._rate + (1 - _REMEMBERED) * rate

    def check_open(self) -> None:
        """Refuse while models load and when the service ends."""
        if self.draining:
            raise RefusedError("the service is ending; try again later, or elsewhere", 503, "draining", retry_after=10)
        if not self.ready:
            raise RefusedError("models are still being loaded; try again soon", 503, "loading", retry_after=5)

    def check_room(self) -> None:
        """Refuse while nothing more can be taken."""
        if self.requests >= self.most_requests or self._room < max(self._needed, 1):
            raise self._busy()
        self._needed = 0

    @property
    def _room(self) -> int:
        return self.most_tokens - self.tokens - self.entering

    def _busy(self) -> RefusedError:
        return RefusedError(
            f"the service is busy: {self.tokens:,} tokens of {counted(self.requests, 'request')} wait; try again later",
            429,
            "busy",
            retry_after=self.tokens / self._rate,
        )

    def admit(self, client: str, tokens: int) -> Ticket:
        """A ticket for a request of so many tokens; a refusal if there is no room."""
        self.check_open()
        if tokens > self.most_tokens:
            raise RefusedError(
                f"the request has {tokens:,} tokens, and at most {self.most_tokens:,} may wait; send fewer or shorter "
                "sequences at a time, or make a job of them (/v1/jobs)",
                413,
                "too-many-tokens",
            )
        with self.lock:
            if self.tokens + tokens > self.most_tokens or self.requests >= self.most_requests:
                self._needed = min(tokens, self.pack)
                raise self._busy()
            self.tokens += tokens
            self.requests += 1
        return Ticket(self, client, tokens, self.seconds)

    def for_job(self, name: str) -> Ticket:
        """A ticket without a limit of time or room, for a job."""
        with self.lock:
            self.requests += 1
        return Ticket(self, name, 0, None)
