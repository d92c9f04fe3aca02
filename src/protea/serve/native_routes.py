"""The native routes: embeddings, logits, scores, contacts, perplexities and predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from protea.serve import native, schemas
from protea.serve.answer_formats import WRITERS, chosen, written
from protea.serve.answering import in_thread, noted, respond
from protea.serve.native import Work
from protea.serve.served import ServedAdapter, ServedModel
from protea.serve.service import Service
from protea.serve.strict_json import StrictRoute

_SCHEMA: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, in the format of the Accept header.",
        "content": {kind: {} if "json" in kind else _SCHEMA for kind in WRITERS if ";" not in kind},
    },
    **{
        code: {"description": text, "content": {"application/problem+json": {"schema": {"type": "object"}}}}
        for code, text in {
            400: "The body is not JSON.",
            401: "The key is missing or wrong.",
            404: "The model or adapter is not served.",
            406: "The format is not known.",
            408: "The body did not arrive in time.",
            413: "The request is too large.",
            415: "The body is not application/json, or compressed.",
            421: "The request is for another host.",
            422: "A value is wrong; sequence and position are named.",
            429: "The service is busy; Retry-After says when to try again.",
            503: "Models are being loaded, the service ends, or the request took too long.",
        }.items()
    },
}


def answers() -> dict[int | str, dict[str, Any]]:
    """The answers of a native route, for the OpenAPI description."""
    return dict(_ANSWERS)


async def answer(
    service: Service, request: Request, target: ServedModel | ServedAdapter, check: Callable[[], Work]
) -> Response:
    """Check a request, admit it, compute it, send it."""
    media_type = chosen(", ".join(request.headers.getlist("accept")))
    work = await in_thread(check)
    noted(request, model=target.name, sequences=work.sequences, tokens=work.tokens)
    ticket = service.admit(request, work.tokens)
    runner = service.engine.runner(target.lane, ticket)
    return await respond(request, service.gate, ticket, lambda: written(work.answer(runner), media_type), media_type)


def native_routes(service: Service) -> APIRouter:
    """The routes of a service."""
    router = APIRouter(
        prefix="/v1",
        tags=["native"],
        responses=answers(),
        default_response_class=Response,
        route_class=StrictRoute,
    )

    async def of_model(request: Request, body: Any, work: Callable[[ServedModel, Any], Work]) -> Response:
        model = service.ready.model(body.model)
        service.check_count(len(getattr(body, "sequences", ())) or len(getattr(body, "variants", ())))
        return await answer(service, request, model, partial(work, model, body))

    @router.post("/embed", summary="One vector per sequence")
    async def embed(request: Request, body: schemas.EmbedBody) -> Response:
        return await of_model(request, body, native.embed)

    @router.post("/residues", summary="One vector per residue")
    async def residues(request: Request, body: schemas.ResiduesBody) -> Response:
        return await of_model(request, body, native.residues)

    @router.post("/logits", summary="Log-probabilities of each residue")
    async def logits(request: Request, body: schemas.LogitsBody) -> Response:
        return await of_model(request, body, native.logits)

    @router.post("/score", summary="Effects of variants")
    async def score(request: Request, body: schemas.ScoreBody) -> Response:
        return await of_model(request, body, native.score)

    @router.post("/scan", summary="Effects of all single substitutions")
    async def scan(request: Request, body: schemas.ScanBody) -> Response:
        return await of_model(request, body, native.scan)

    @router.post("/contacts", summary="Contact maps")
    async def contacts(request: Request, body: schemas.ContactsBody) -> Response:
        return await of_model(request, body, native.contact_maps)

    @router.post("/perplexity", summary="How well the model predicts hidden residues")
    async def perplexity(request: Request, body: schemas.PerplexityBody) -> Response:
        return await of_model(request, body, native.perplexities)

    @router.post("/predict/{adapter}", summary="Predictions of an adapter")
    async def predict(request: Request, adapter: str, body: schemas.PredictBody) -> Response:
        served = service.ready.adapter(adapter)
        service.check_count(len(body.sequences))
        return await answer(service, request, served, partial(native.predict, served, body))

    return router
