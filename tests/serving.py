"""A service in a thread of the test's process, with the bundled model."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

from protea.serve.server import serve
from protea.serve.service import Service, ServiceSettings

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A service that runs, and plain HTTP to it."""

    service: Service
    port: int
    lines: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 120
    ) -> Answered:
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body, sent = json.dumps(body).encode(), {"Content-Type": "application/json"} | sent
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Answered(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, accept: str = "application/json", **headers: str) -> Answered:
        return self.ask("POST", path, body, {"Accept": accept} | headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def running(**settings: Any) -> Iterator[Running]:
    """Run a service until the block ends; it must end by itself then."""
    lines: list[Mapping[str, Any]] = []
    service = Service(ServiceSettings(port=0, **settings), lines.append)
    told: list[str] = []
    started, stop = threading.Event(), threading.Event()

    def tell(message: str) -> None:
        told.append(message)
        started.set()

    failures: list[BaseException] = []

    def work() -> None:
        try:
            serve(service, tell=tell, stop=stop)
        except BaseException as error:
            failures.append(error)
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(120)
    try:
        if failures:
            raise failures[0]
        yield Running(service, int(told[0].rpartition(":")[2]), lines)
    finally:
        stop.set()
        thread.join(120)
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of a condition that is looked at again and again."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError("it took too long")
        time.sleep(0.02)
    return value
