"""What every request passes through: limits on what is sent and how slowly, keys, request ids, the access log.

Plain ASGI, so that bodies are counted as they arrive and nothing is buffered.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from starlette.exceptions import HTTPException

from protea.errors import UsageError
from protea.serve.admission import Gate
from protea.serve.problems import RefusedError
from protea.serve.service_metrics import Metrics
from protea.text import bytes_text, printable

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS: Final = frozenset(
    ("/", "/docs", "/openapi.json", "/health", "/v1/health/live", "/v1/health/ready", "/page.js", "/docs.js")
)
"""Paths that need no key: they say nothing about models or users."""

JOBS: Final = "/v1/jobs"

_LOCAL_NAMES: Final = frozenset(("localhost", "127.0.0.1", "[::1]", "::1"))
_PLAIN: Final = (b"", b"identity")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """Limits on one request, and on the bodies of all requests together.

    ``send_seconds`` is the time that a client may take to receive a piece of an answer.
    """

    body_bytes: int = 16 << 20
    job_bytes: int = 1 << 30
    all_bytes: int = 512 << 20
    body_seconds: float = 60.0
    head_seconds: float = 10.0
    send_seconds: float = 60.0


@dataclass(frozen=True)
class Keys:
    """The keys of an API-key file, one a line: a key, or a name, a blank and a key; ``#`` begins a comment."""

    names: Mapping[bytes, str]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read the file; a ``UsageError`` if it holds no key, or one that is easy to guess."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"--api-key-file {path}: cannot be read ({error})") from error
        names: dict[bytes, str] = {}
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) > 2 or len(words[-1]) < 16:
                raise UsageError(f"--api-key-file {path}, line {number}: write a key of 16 or more signs, or NAME KEY")
            digest = sha256(words[-1].encode())
            # Not the line's number: jobs belong to a name, and a line that is put in moves the others.
            names[digest.digest()] = words[0] if len(words) == 2 else f"key-{digest.hexdigest()[:8]}"
        if not names:
            raise UsageError(f"--api-key-file {path}: holds no key; write one a line")
        return cls(names)

    def owner(self, authorization: str) -> str | None:
        """The name of a ``Bearer`` key; ``None`` if it is not known. Takes the same time for every wrong key."""
        kind, _, key = authorization.partition(" ")
        given = sha256(key.strip().encode(errors="replace")).digest()
        found = [name for known, name in self.names.items() if hmac.compare_digest(known, given)]
        return found[0] if found and kind.lower() == "bearer" else None


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def log_line(values: Mapping[str, Any]) -> None:
    """One line of the access log, as JSON, on standard error; once nobody reads that, the service goes on without."""
    try:
        sys.stderr.write(json.dumps(values) + "\n")
    except BrokenPipeError:
        # What is still buffered goes there, too; Python would try to write it at its end, and exit with code 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@dataclass
class Guard:
    """The outermost application."""

    app: App
    gate: Gate
    metrics: Metrics
    keys: Keys | None
    limits: Limits = field(default_factory=Limits)
    log: Callable[[Mapping[str, Any]], None] = log_line
    _arriving: int = 0
    _paths: set[str] = field(default_factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        state = scope.setdefault("state", {})
        state["request_id"] = given.decode() if _REQUEST_ID.fullmatch(given) else str(uuid4())
        state["client"] = (scope.get("client") or ("unknown",))[0]
        request = _Request(self, scope, receive, send)
        try:
            state["refused"] = refused = self._refused(scope, headers) or await self._not_now(scope, request)
            if refused is not None and not request.whole:
                state["unread"] = b"content-length" in headers or b"transfer-encoding" in headers
            await self.app(scope, request.receive, request.send)
        except (ConnectionAbortedError, TimeoutError):
            pass  # the client has gone, or is too slow; the server closes the connection
        finally:
            self.gate.entering -= state.pop("entering", 0)
            self._arriving -= request.counted
            self._finished(scope, request)

    def _refused(self, scope: Scope, headers: Mapping[bytes, bytes]) -> RefusedError | None:
        """The reason why a request is not even read."""
        if self.keys is not None and scope["path"] not in OPEN_PATHS:
            owner = self.keys.owner(headers.get(b"authorization", b"").decode("latin-1"))
            if owner is None:
                return RefusedError("the key is missing or wrong; send Authorization: Bearer KEY", 401, "unauthorized")
            scope["state"]["client"] = owner
        if self.keys is None:
            # A page of another site may point its own name at this machine; its requests bear that name.
            host = headers.get(b"host", b"localhost").decode("latin-1").lower()
            if re.sub(r":\d+$", "", host) not in _LOCAL_NAMES:
                return RefusedError(f"this service answers to localhost, not to {host[:100]!r}", 421, "wrong-host")
        if headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] != "GET":
            return RefusedError("pages of other sites may not use this service", 403, "cross-site")
        if scope["method"] in ("POST", "PUT") and headers.get(b"content-encoding", b"").lower() not in _PLAIN:
            return RefusedError("compressed bodies are not taken; send the body as it is", 415, "encoding")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most_bytes(scope):
            return self.too_large(scope)
        return None

    async def _not_now(self, scope: Scope, request: _Request) -> RefusedError | None:
        """The reason why nothing more is computed now. The body passes by unread, so that the connection lives on."""
        if scope["method"] != "POST" or scope["path"] == JOBS:
            return None
        try:
            self.gate.check_open()
            self.gate.check_room()
        except RefusedError as refused:
            return await request.passed_by() or refused
        return None

    def most_bytes(self, scope: Scope) -> int:
        """The limit on the body of a request."""
        return self.limits.job_bytes if scope["path"] == JOBS else self.limits.body_bytes

    def too_large(self, scope: Scope) -> RefusedError:
        """The refusal of a body that is too large."""
        most, more = bytes_text(self.most_bytes(scope)), bytes_text(self.limits.job_bytes)
        return RefusedError(f"the body is too large; at most {most} are taken, {JOBS} takes {more}", 413, "too-large")

    def arrived(self, scope: Scope, size: int) -> None:
        """Count bytes of a body that is held in memory; a refusal if all bodies together are too large."""
        self._arriving += size
        if self._arriving > self.limits.all_bytes:
            raise refused_http(RefusedError("too many bodies arrive at once; try again", 429, "busy", retry_after=2))

    def _route(self, scope: Scope) -> str:
        """The route of a request; of one that was refused at the door, if its path has led to a route before."""
        path, route = scope["path"], getattr(scope.get("route"), "path", None)
        if route is not None and route == path:
            self._paths.add(path)
        return str(route or (path if path in self._paths else "unknown"))

    def _finished(self, scope: Scope, request: _Request) -> None:
        state = scope["state"]
        route = self._route(scope)
        seconds = time.monotonic() - request.began
        self.metrics.requests.labels(route, str(request.status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if state.get("kind"):
            self.metrics.rejected.labels(state["kind"]).inc()
        self.log(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": state["request_id"],
                "client": printable(str(state["client"])),
                "method": scope["method"] if scope["method"].isalpha() else "?",
                "route": route,
                "status": request.status,
                "ms": round(1000 * seconds, 1),
                "received": request.received,
                "sent": request.sent,
            }
            | {name: state[name] for name in ("model", "sequences", "tokens", "kind") if state.get(name) is not None}
        )


def refused_http(refused: RefusedError) -> HTTPException:
    """A refusal that FastAPI passes on while it reads a body."""
    error = HTTPException(refused.status, str(refused))
    error.__cause__ = refused
    return error


class _Request:
    """Counts what one request sends and receives, and ends it if its client is too slow."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard, self._scope, self._receive, self._send = guard, scope, receive, send
        self.began = time.monotonic()
        self.status = self.received = self.sent = self.counted = 0
        self._reading = self._counting = True

    @property
    def whole(self) -> bool:
        """Whether all of the body has come."""
        return not self._reading

    async def passed_by(self) -> RefusedError | None:
        """Read the body and keep nothing; the refusal of one that is too large or too slow."""
        self._counting = False
        try:
            while self._reading:
                await self.receive()
        except HTTPException as error:
            if isinstance(error.__cause__, RefusedError):
                return error.__cause__
            raise
        return None

    async def receive(self) -> MutableMapping[str, Any]:
        """The next part of the body."""
        if not self._reading:
            return await self._receive()
        guard = self._guard
        left = self.began + guard.limits.body_seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(0.001, left)):  # ``wait_for`` would let others run although all is there
                message = await self._receive()
        except TimeoutError:
            slow = RefusedError("the body did not arrive in time", 408, "slow")
            raise refused_http(slow) from slow
        size = len(message.get("body", b""))
        self.received += size
        self._reading = bool(message.get("more_body", False))
        if self.received > guard.most_bytes(self._scope):
            raise refused_http(guard.too_large(self._scope))
        if self._counting and self._scope["path"] != JOBS:
            self.counted += size
            guard.arrived(self._scope, size)
            if not self._reading and self._scope["method"] == "POST":
                self._scope["state"]["entering"] = self.received
                guard.gate.entering += self.received
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            identity = self._scope["state"]["request_id"].encode()
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", identity),
                (b"x-content-type-options", b"nosniff"),
            ]
        self.sent += len(message.get("body", b""))
        async with asyncio.timeout(self._guard.limits.send_seconds):
            await self._send(message)
