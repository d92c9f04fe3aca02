"""The application: all routes, and one form of errors for each group of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Final

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import protea
from protea.errors import ProteaError
from protea.serve.answer_formats import JSON, as_json
from protea.serve.answering import noted
from protea.serve.compat_routes import nvidia_routes, openai_routes, tei_routes
from protea.serve.job_routes import job_routes
from protea.serve.native_routes import native_routes
from protea.serve.problems import RefusedError, nvidia_error, openai_error, problem, refusal, tei_error
from protea.serve.safety import Guard
from protea.serve.service import Service
from protea.text import printable

_STATIC: Final = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
_STATIC_DOCS: Final = {"/docs": ("docs.html", "text/html"), "/docs.js": ("docs.js", "text/javascript")}
_POLICY: Final = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_PEERS: Final[dict[str, Callable[[RefusedError], dict[str, Any]]]] = {
    "/v1/embeddings": openai_error,
    "/v1/models": openai_error,
    "/embed": tei_error,
    "/embed_all": tei_error,
    "/info": tei_error,
}
_NVIDIA: Final = "/v1/biology/"
_KINDS: Final = {400: "bad-request", 404: "not-found", 405: "method-not-allowed", 415: "media-type"}
_TEI_STATUS: Final = {"unknown-residue": 422, "sequence-too-long": 413}


def application(service: Service) -> Guard:
    """The application of a service, with all limits around it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        limiter = anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = service.settings.max_requests + 40
        yield

    app = FastAPI(
        title="Protea",
        version=protea.__version__,
        summary="Protein language models: embeddings, scores, contacts, predictions.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    for routes in (native_routes, job_routes, openai_routes, tei_routes, nvidia_routes):
        app.include_router(routes(service))
    _add_health(app, service)
    _add_static(app)

    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ProteaError, _refused)
    app.add_exception_handler(UnicodeEncodeError, _half)
    app.add_exception_handler(Exception, _failed)
    keys = service.keys
    return Guard(_Refusing(app), service.gate, service.metrics, keys, service.settings.limits, service.log)


class _Refusing:
    """Answers what the guard has refused before the application reads anything."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = scope.get("state", {}).get("refused") if scope["type"] == "http" else None
        if refused is None:
            # The server sends only the head of an answer to HEAD, so that routes need not know it.
            asked = {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope
            await self._app(asked, receive, send)
            scope["route"] = asked.get("route")
        else:
            await error_response(Request(scope), refused)(scope, receive, send)


def error_response(request: Request, refused: RefusedError) -> Response:
    """The answer to a refused request, in the form of its group of routes."""
    path, status = request.scope["path"], refused.status
    noted(request, kind=refused.kind)
    form = _PEERS.get(path, nvidia_error if path.startswith(_NVIDIA) else None)
    if form is None:
        body, media_type = problem(refused, request.state.request_id), "application/problem+json"
    else:
        body, media_type = form(refused), JSON
        if form is tei_error:
            status = _TEI_STATUS.get(refused.kind, status)
        elif form is openai_error and status == 422:
            status = 400
    ends = status in (408, 413) or getattr(request.state, "unread", False)
    headers = refused.headers | ({"Connection": "close"} if ends else {})
    return Response(as_json(body), status, headers, media_type)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProteaError)
    return error_response(request, refusal(error))


async def _half(request: Request, error: Exception) -> Response:
    return error_response(request, RefusedError("a text holds half of a character (a lone surrogate); correct it"))


async def _failed(request: Request, error: Exception) -> Response:
    kind = type(error).__name__
    return error_response(request, RefusedError(f"the service failed: {kind}; its log says more", 500, "failed"))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, RefusedError):
        return error_response(request, error.__cause__)
    status, detail = error.status_code, str(error.detail)
    if status == 404:
        detail = f"there is no route {request.scope['path'][:100]}; /docs lists all"
    elif status == 405:
        detail = f"this route does not take {request.method[:20]}; /docs says what it takes"
    response = error_response(request, RefusedError(printable(detail), status, _KINDS.get(status, "http")))
    response.headers.update(error.headers or {})
    return response


async def _invalid(request: Request, error: Exception) -> Response:
    """What is wrong with a body, by its place; values are not repeated, since they may be long."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(one["type"] == "json_invalid" for one in found):
        reason = found[0].get("ctx", {}).get("error", "it cannot be read")
        return error_response(request, RefusedError(f"the body is not JSON: {reason}", 400, "json"))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == JSON or kind.endswith("+json")
    if not is_json and request.method == "POST" and found[0]["loc"] == ("body",):
        refused = RefusedError("send the body as Content-Type: application/json", 415, "media-type")
        return error_response(request, refused)
    faults = [{"place": ".".join(map(str, one["loc"]))[:200], "message": one["msg"][:1000]} for one in found[:20]]
    detail = "; ".join(f"{fault['place']}: {fault['message']}" for fault in faults[:5])
    return error_response(request, RefusedError(printable(detail)[:2000], 422, "invalid", more={"errors": faults}))


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["health"], summary="Whether requests are taken")
    @app.get("/v1/health/ready", tags=["health"], summary="Whether requests are taken")
    async def ready() -> dict[str, str]:
        service.gate.check_open()
        return {"status": "ready"}

    @app.get("/v1/health/live", tags=["health"], summary="Whether the process lives")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/metrics", tags=["health"], summary="Numbers for Prometheus")
    @app.get("/v1/metrics", tags=["health"], summary="Numbers for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_static(app: FastAPI) -> None:
    """The page and the documentation: files of the package, without anything from a network."""
    for path, (name, kind) in (_STATIC | _STATIC_DOCS).items():
        content = (files("protea.serve") / name).read_bytes()
        headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}

        app.add_api_route(path, _static(content, kind, headers), include_in_schema=False)


def _static(content: bytes, kind: str, headers: dict[str, str]) -> Callable[[], Any]:
    async def serve() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return serve
