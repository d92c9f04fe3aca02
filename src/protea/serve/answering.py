"""From a computed answer to HTTP: in a thread, a piece at a time, and no longer than the client listens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from protea.serve.admission import Gate, Ticket
from protea.serve.problems import RefusedError
from protea.serve.safety import Receive, Scope, Send

Value = TypeVar("Value")

_END: Final = b""


async def in_thread(function: Callable[[], Value]) -> Value:
    """The result of a function that computes or waits."""
    return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)


async def while_connected(request: Request, ticket: Ticket, function: Callable[[], Value]) -> Value:
    """The result of a function in a thread; the ticket is cancelled if the client goes."""
    work = asyncio.ensure_future(in_thread(function))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            ticket.cancelled.set()
        return await work
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def respond(
    request: Request,
    gate: Gate,
    ticket: Ticket,
    pieces: Callable[[], Iterator[bytes]],
    media_type: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer with these pieces of bytes: whole if there is one piece, else as they are made.

    The first piece is made before anything is sent, so that an error until then is answered as such.
    """
    made: list[Iterator[bytes]] = []

    def first_two() -> list[bytes]:
        made.append(pieces())
        return [piece for piece in (next(made[0], _END), next(made[0], _END)) if piece]

    try:
        begun = await while_connected(request, ticket, first_two)
    except BaseException:
        ticket.close()
        raise
    if len(begun) < 2:
        ticket.close()
        return Response(b"".join(begun), media_type=media_type, headers=headers)
    return Pieces(begun, made[0], ticket, request, media_type, headers)


class Pieces(Response):
    """An answer that is made while it is sent; closes its ticket in any case."""

    def __init__(
        self,
        begun: list[bytes],
        rest: Iterator[bytes],
        ticket: Ticket,
        request: Request,
        media_type: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        super().__init__(None, media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._begun, self._rest, self._ticket, self._request = begun, rest, ticket, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all pieces."""
        gone = asyncio.ensure_future(_disconnected(self._request))
        gone.add_done_callback(lambda _: self._ticket.cancelled.set())
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in self._begun:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            while piece := await in_thread(lambda: next(self._rest, _END)):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (RefusedError, TimeoutError) as error:
            scope["state"]["kind"] = getattr(error, "kind", "slow")
            raise ConnectionAbortedError(f"the answer was broken off: {error}") from error
        finally:
            gone.cancel()
            self._ticket.close()


def noted(request: Request, **facts: Any) -> None:
    """Remember facts about a request for the access log."""
    for name, value in facts.items():
        setattr(request.state, name, value)
