"""Routes that refuse JSON in which an object names a member twice; Python would keep the last one silently."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from protea.serve.problems import RefusedError


class StrictRoute(APIRoute):
    """A route with such a check of its bodies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function that answers a request."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return json.loads(await self.body(), object_pairs_hook=_once)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            reasons = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it is nested too deeply"}
            reason = reasons.get(type(error), "a number has too many digits")
            raise RefusedError(f"the body is not JSON: {reason}", 400, "json") from error


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) < len(members):
        counts = Counter(name for name, _ in members)
        twice = next(name for name, count in counts.items() if count > 1)
        raise RefusedError(f"the body names {twice[:100]!r} twice in one object; name it once")
    return found
