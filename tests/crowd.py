"""Clients of a service in a process of their own, with few allocations: ``python tests/crowd.py < ORDER > FOUND``.

ORDER is a JSON object, see ``Order``; FOUND is one, see ``Crowd.found``. The clients are asyncio protocols on plain
sockets, and requests are made before the clock starts, so that a thousand of them measure the service and not
themselves; ``late`` says by how much the process itself was late.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

_PULSE = 0.05


@dataclass
class Order:
    """What the clients shall do.

    Attributes:
        port: of the service, on 127.0.0.1.
        bodies: JSON bodies of requests.
        path: that all requests are sent to.
        clients: that ask at a time, each on a connection of its own; ignored with a rate.
        seconds: for which random bodies are sent; without it each body is sent once, in order.
        rate: requests a second, at random moments, whether earlier ones were answered or not.
        expected: answers' vectors by body; they must be equal to the bit.
        pause: least seconds before a refused client asks again; the most is three times as much.
        seed: of all random draws.
    """

    port: int
    bodies: list[str]
    path: str = "/v1/embed"
    clients: int = 16
    seconds: float | None = None
    rate: float | None = None
    expected: list[list[list[float]]] | None = None
    pause: float = 0.5
    seed: int = 1


@dataclass
class Crowd:
    """All clients, and what they saw."""

    order: Order
    codes: Counter[int] = field(default_factory=Counter)
    taken: dict[int, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    late: list[float] = field(default_factory=list)

    async def run(self) -> dict[str, Any]:
        """Ask, and return what was seen."""
        order = self.order
        self.loop, self.random = asyncio.get_running_loop(), random.Random(order.seed)
        self.requests = [_request(order.path, body.encode()) for body in order.bodies]
        self.idle: deque[_Client] = deque()
        self.open = 0
        self.began = time.perf_counter()
        self.end = None if order.seconds is None else self.began + order.seconds
        self.unasked = iter(range(len(self.requests)))
        pulse = asyncio.ensure_future(self._pulse())
        if order.rate is None:
            await asyncio.gather(*(self._connect(self.next()) for _ in range(order.clients)))
        else:
            await self._arrivals(order.rate)
        while self.open:
            await asyncio.sleep(0.01)
        pulse.cancel()
        return self.found(time.perf_counter() - self.began)

    def next(self) -> int | None:
        """The number of the next request; ``None`` at the end."""
        if self.end is None:
            return next(self.unasked, None)
        return self.random.randrange(len(self.requests)) if time.perf_counter() < self.end else None

    async def _connect(self, number: int | None, due: float | None = None) -> None:
        if number is not None:
            self.open += 1
            await self.loop.create_connection(lambda: _Client(self, number, due), "127.0.0.1", self.order.port)

    async def _arrivals(self, rate: float) -> None:
        due = time.perf_counter()
        while (number := self.next()) is not None:
            due += self.random.expovariate(rate)
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if self.idle:
                self.open += 1
                self.idle.pop().ask(number, due)
            else:
                await self._connect(number, due)

    async def _pulse(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(_PULSE)
            self.late.append(time.perf_counter() - began - _PULSE)

    def answered(self, client: _Client, status: int, body: bytes, seconds: float) -> None:
        """Note an answer and send the client on."""
        self.codes[status] += 1
        self.taken.setdefault(status, []).append(seconds)
        expected = self.order.expected
        if status == 200 and expected is not None:
            rows = [row["embedding"] for row in json.loads(body)["records"]]
            if not np.array_equal(np.array(rows, np.float32), np.array(expected[client.number], np.float32)):
                self.wrong.append(f"request {client.number}")
        elif status not in (200, 429):
            self.wrong.append(f"{status} {body[:200]!r}")
        if self.order.rate is not None:
            self.open -= 1
            self.idle.append(client)
        elif status == 429:
            self.loop.call_later(self.order.pause * (1 + 2 * self.random.random()), self.again, client)
        else:
            self.again(client)

    def again(self, client: _Client) -> None:
        """The next request of a client, or the end of it."""
        number = self.next()
        if number is None:
            self.open -= 1
            client.close()
        else:
            client.ask(number, None)

    def gone(self, client: _Client) -> None:
        """Note a connection that was lost before its answer."""
        self.open -= 1
        self.lost += 1

    def found(self, seconds: float) -> dict[str, Any]:
        """Answers by status, percentiles 50, 99 and 100 of their seconds, faults, and the process's own delays."""

        def shown(values: list[float]) -> list[float]:
            return [round(float(value), 4) for value in np.percentile(values, [50, 99, 100])] if values else []

        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": round(seconds, 3),
            "answers": {str(code): count for code, count in sorted(self.codes.items())},
            "taken": {str(code): shown(values) for code, values in sorted(self.taken.items())},
            "wrong": self.wrong[:5],
            "lost": self.lost,
            "late": shown(self.late),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        }


class _Client(asyncio.Protocol):
    """One connection: one request at a time."""

    def __init__(self, crowd: Crowd, number: int, due: float | None) -> None:
        self._crowd, self.number, self._due = crowd, number, due
        self._received = bytearray()
        self._waits = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.ask(self.number, self._due)

    def ask(self, number: int, due: float | None) -> None:
        """Send a request; its time counts from when it was due."""
        self.number, self._began = number, time.perf_counter() if due is None else due
        if self._transport.is_closing():
            self._crowd.gone(self)
            return
        self._waits = True
        self._transport.write(self._crowd.requests[number])

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if (head := received.find(b"\r\n\r\n")) < 0:
            return
        at = received.find(b"content-length: ", 0, head)
        if at < 0:
            if not received.endswith(b"0\r\n\r\n"):
                return
            end = len(received)
        else:
            end = head + 4 + int(received[at + 16 : received.find(b"\r", at)])
            if len(received) < end:
                return
        status, body = int(received[9:12]), bytes(received[head + 4 : end])
        received.clear()
        self._waits = False
        self._crowd.answered(self, status, body, time.perf_counter() - self._began)

    def connection_lost(self, error: Exception | None) -> None:
        if self._waits:
            self._crowd.gone(self)
        elif self in self._crowd.idle:
            self._crowd.idle.remove(self)

    def close(self) -> None:
        self._transport.close()


def _request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def started(order: Order) -> Any:
    """A process of such clients; ``finished`` gives what they saw."""
    import subprocess

    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(order)).encode())
    process.stdin.close()
    return process


def finished(process: Any) -> dict[str, Any]:
    """What the clients of a process saw."""
    text = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0
    found: dict[str, Any] = json.loads(text)
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(Crowd(Order(**json.load(sys.stdin))).run())))
