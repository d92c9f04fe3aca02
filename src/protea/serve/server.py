"""The process: listens, loads models, and on SIGTERM or SIGINT answers what it has taken before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from protea.device import keep_freed_memory
from protea.errors import ProteaError, UsageError
from protea.serve.application import application
from protea.serve.service import Service

_MOST_FILES: Final = 65536
_KEEP_ALIVE_SECONDS: Final = 20
_LOOK_SECONDS: Final = 0.05
_SWITCH_SECONDS: Final = 0.0005
_DRAIN_SECONDS: Final = 5.0  # beyond the timeout of requests


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections whose head does not arrive in time; uvicorn would wait forever."""

    head_seconds = 10.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio sets this only for sockets that name TCP, which those of uvicorn's listening socket do not. Without
        # it the second part of an answer waits for the client's delayed acknowledgement, 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waiting_for_head() and self._head_timer is None:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _waiting_for_head(self) -> bool:
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0] or self.cycle is None)

    def _watch(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._expired)

    def _unwatch(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expired(self) -> None:
        self._head_timer = None
        if self._waiting_for_head() and not self.transport.is_closing():
            body = b"the request did not arrive in time"
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn, with signals that drain the service first."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Drain on the first signal; end at once on the second."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._signalled) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, *_: object) -> None:
        if self._service.gate.draining:
            self.should_exit = self.force_exit = True
        self._service.drain()

    async def main_loop(self) -> None:
        """Serve until the service is drained: new requests get 503 while those in flight are answered."""
        serving = asyncio.ensure_future(super().main_loop())
        while not serving.done():
            await asyncio.sleep(_LOOK_SECONDS)
            gate = self._service.gate
            if gate.draining and not self.should_exit:
                jobs = self._service.jobs
                if jobs is not None:
                    await asyncio.to_thread(jobs.pause)
                waited = 0.0
                while gate.requests and waited < (gate.seconds or 0) + _DRAIN_SECONDS and not self.should_exit:
                    await asyncio.sleep(_LOOK_SECONDS)
                    waited += _LOOK_SECONDS
                self.should_exit = True
        await serving


def serve(service: Service, *, tell: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Listen, then load the models, and serve until a signal or ``stop``; raises what prevents the start."""
    settings = service.settings
    # So long the event loop waits for a thread that computes in Python, several times for each request; usually 5 ms.
    sys.setswitchinterval(_SWITCH_SECONDS)
    keep_freed_memory()  # before there are threads: they would get heaps of their own, which return memory all the time
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    listening = _listening(settings.host, settings.port)
    protocol = type("Protocol", (_Protocol,), {"head_seconds": settings.limits.head_seconds})
    config = uvicorn.Config(
        application(service),
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(settings.timeout + _DRAIN_SECONDS),
        proxy_headers=False,
    )
    server = _Server(config, service)
    failures: list[BaseException] = []

    def load() -> None:
        try:
            service.load()
            host, port = listening.getsockname()[:2]
            tell(f"serving {', '.join(settings.models)} on http://{host}:{port}")
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    def watch(event: threading.Event) -> None:
        event.wait()
        service.drain()

    loader = threading.Thread(target=load, name="protea-load", daemon=True)
    loader.start()
    if stop is not None:
        threading.Thread(target=watch, args=(stop,), daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        loader.join()
        service.stop()
        listening.close()
    for failure in failures:
        raise failure if isinstance(failure, ProteaError) else RuntimeError(str(failure)) from failure


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens; a ``UsageError`` if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(family[4][:2], family=family[0], backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {host} --port {port}: cannot listen there: {reason}; choose another port") from error
