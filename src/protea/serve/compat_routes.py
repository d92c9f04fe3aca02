"""Routes of other services, for clients that know those: OpenAI, text-embeddings-inference, NVIDIA.

A vector is the mean over the residues of the last layer, without BOS and EOS; it is normalised only where the peer's
route says so. Errors have the peer's form. Everything else that differs is in ``docs/serving.md``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

import h5py
import numpy as np
from fastapi import APIRouter, Request, Response

import protea
from protea.embed import embeddings
from protea.embed.embeddings import Asked, Embedding
from protea.embed.prepare import EncodedRecord, Long, RecordPolicies
from protea.errors import UnknownResidueError
from protea.infer.runner import FloatArray, Runner
from protea.letters import ReportRow
from protea.serve import schemas
from protea.serve.answer_formats import JSON, as_json, rows_as_json
from protea.serve.answering import in_thread, noted, respond
from protea.serve.native import prepared, records_of
from protea.serve.problems import RefusedError, refusal
from protea.serve.served import ServedModel
from protea.serve.service import Service
from protea.serve.strict_json import StrictRoute

_OPENAI_INPUTS: Final = 2048
_NVIDIA_LENGTH: Final = 1024
_NVIDIA_NAMES: Final = {
    "esm2-650m": "esm2_t33_650M_UR50D",
    "esm2-3b": "esm2_t36_3B_UR50D",
    "esm2-15b": "esm2_t48_15B_UR50D",
}


def _encoded(model: ServedModel, sequences: Sequence[str], long: Long) -> list[EncodedRecord]:
    """Encoded sequences; letters outside the alphabet and what would be left out are refused: peers report neither."""
    rows: list[ReportRow] = []
    policies = RecordPolicies(long=long, unknown="error")
    try:
        return prepared(records_of(sequences), model.lane.model, policies, rows)
    except UnknownResidueError as error:
        refused = refusal(error)
        what = str(refused).partition("; correct the record")[0]  # what follows are options of other routes
        raise RefusedError(
            f"{what}; correct the sequence; /v1/embed can replace or skip it",
            refused.status,
            refused.kind,
            more=refused.more,
        ) from error


async def _answer(
    service: Service, request: Request, model: ServedModel, encoded: list[EncodedRecord], residues: bool, write: Any
) -> Response:
    module = model.lane.model
    asked = Asked(layers=(module.config.num_hidden_layers,), poolings=("mean",), residues=residues)
    tokens = sum(record.tokens for record in encoded)
    noted(request, model=model.name, sequences=len(encoded), tokens=tokens)
    ticket = service.admit(request, tokens)
    runner: Runner = service.engine.runner(model.lane, ticket)

    def pieces() -> Iterator[bytes]:
        yield from write(embeddings.embed(runner, encoded, asked), tokens)

    return await respond(request, service.gate, ticket, pieces, getattr(write, "media_type", JSON))


def _check_width(given: int | None, model: ServedModel) -> None:
    width = model.lane.model.config.hidden_size
    if given not in (None, width):
        raise RefusedError(
            f"dimensions={given}: this model gives {width}, and cutting vectors short would not keep their meaning",
            400,
            "dimensions",
            more={"parameter": "dimensions"},
        )


def openai_routes(service: Service) -> APIRouter:
    """``/v1/embeddings`` and ``/v1/models``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=StrictRoute)

    @router.get("/models", summary="Served models")
    async def models() -> dict[str, Any]:
        served = service.ready
        kinds = {"object": "model", "created": 0, "owned_by": "protea"}
        return {
            "object": "list",
            "data": [{"id": name, **kinds} for name in served.models],
            "adapters": list(served.adapters),
        }

    @router.post("/embeddings", summary="Embeddings, as OpenAI's")
    async def create(request: Request, body: schemas.OpenAIBody) -> Response:
        model = service.ready.model(body.model)
        _check_width(body.dimensions, model)
        inputs = [body.input] if isinstance(body.input, str) else body.input
        if not inputs or not all(isinstance(text, str) for text in inputs):
            raise RefusedError(
                "input: give a sequence or a list of them as text; token ids are those of another alphabet",
                400,
                "invalid",
                more={"parameter": "input"},
            )
        if len(inputs) > _OPENAI_INPUTS:
            raise RefusedError(
                f"input: {len(inputs):,} sequences; at most {_OPENAI_INPUTS:,}",
                400,
                "too-many-sequences",
                more={"parameter": "input"},
            )
        service.check_count(len(inputs))
        encoded = await in_thread(partial(_encoded, model, inputs, "truncate"))

        def write(found: Iterator[Embedding], tokens: int) -> Iterator[bytes]:
            def vector(values: FloatArray) -> Any:
                if body.encoding_format == "base64":
                    return base64.b64encode(values.astype("<f4").tobytes()).decode()
                return values.tolist()

            data = [
                {"object": "embedding", "index": number, "embedding": vector(one.pooled["mean"][0])}
                for number, one in enumerate(found)
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            yield as_json({"object": "list", "data": data, "model": model.name, "usage": usage})

        return await _answer(service, request, model, encoded, False, write)

    return router


def tei_routes(service: Service) -> APIRouter:
    """The routes of text-embeddings-inference, for the first model."""
    router = APIRouter(tags=["text-embeddings-inference"], route_class=StrictRoute)

    async def of(request: Request, body: schemas.TeiBody, residues: bool) -> Response:
        model = service.ready.model(None)
        _check_width(body.dimensions, model)
        if body.prompt_name is not None:
            raise RefusedError("prompt_name: protein models have no prompts; leave it out", 422, "invalid")
        if body.truncation_direction.lower() == "left" and body.truncate:
            raise RefusedError("truncation_direction: only Right is known; the beginning is kept", 422, "invalid")
        inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        if not inputs:
            raise RefusedError("inputs: give at least one sequence", 422, "invalid")
        service.check_count(len(inputs))
        encoded = await in_thread(partial(_encoded, model, inputs, "truncate" if body.truncate else "error"))

        def write(found: Iterator[Embedding], _: int) -> Iterator[bytes]:
            for number, one in enumerate(found):
                values = one.pooled["mean"][0] if one.residues is None else one.residues[0]
                if body.normalize and one.residues is None:
                    values = normalised(values)
                yield (b"," if number else b"[") + rows_as_json(values)
            yield b"]"

        return await _answer(service, request, model, encoded, residues, write)

    @router.post("/embed", summary="Embeddings, as text-embeddings-inference's")
    async def embed(request: Request, body: schemas.TeiBody) -> Response:
        return await of(request, body, False)

    @router.post("/embed_all", summary="Vectors of residues, as text-embeddings-inference's")
    async def embed_all(request: Request, body: schemas.TeiBody) -> Response:
        return await of(request, body, True)

    @router.get("/info", summary="Facts about the first model")
    async def info() -> dict[str, Any]:
        model, settings = service.ready.model(None), service.settings
        module = model.lane.model
        return {
            "model_id": model.name,
            "model_sha": model.sha256,
            "model_dtype": module.precision,
            "model_type": {"embedding": {"pooling": "mean"}},
            "max_concurrent_requests": settings.max_requests,
            "max_input_length": module.trained_tokens,
            "max_batch_tokens": model.lane.budget,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_sequences,
            "auto_truncate": False,
            "tokenization_workers": 1,
            "version": protea.__version__,
        }

    return router


def normalised(values: FloatArray) -> FloatArray:
    """A vector of length 1, as text-embeddings-inference makes it."""
    length = np.sqrt(np.square(values, dtype=np.float64).sum())
    unit: FloatArray = (values / max(length, 1e-12)).astype(np.float32)
    return unit


def nvidia_routes(service: Service) -> APIRouter:
    """NVIDIA's route for ESM-2; models are known by NVIDIA's names and by those of the service."""
    router = APIRouter(prefix="/v1/biology", tags=["NVIDIA"], default_response_class=Response, route_class=StrictRoute)

    @router.post("/{owner}/{name}", summary="Embeddings of sequences and residues, as NVIDIA's")
    async def esm2(request: Request, owner: str, name: str, body: schemas.NvidiaBody) -> Response:
        known = _NVIDIA_NAMES.get(name, name)
        served = service.ready.models
        model = service.ready.model(next((one for one in served if one.rpartition("/")[2] == known), known))
        for number, sequence in enumerate(body.sequences):
            if not 1 <= len(sequence) <= _NVIDIA_LENGTH:
                raise RefusedError(
                    f"sequence {number}: {len(sequence):,} residues; this route takes 1 to {_NVIDIA_LENGTH:,}",
                    422,
                    "sequence-too-long",
                )
        long: Long = "full" if model.lane.model.max_tokens is None else "error"
        encoded = await in_thread(partial(_encoded, model, body.sequences, long))
        return await _answer(service, request, model, encoded, True, _Archive(body.format))

    return router


class _Archive:
    """Writes NVIDIA's arrays: ``embeddings`` ``[N, D]`` and ``representations`` ``[N, L, D]``, zeros behind the end."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.media_type = "application/octet-stream" if kind == "npz" else "application/x-hdf5"

    def __call__(self, found: Iterator[Embedding], _: int) -> Iterator[bytes]:
        every = list(found)
        residues = [one.residues[0] for one in every if one.residues is not None]
        padded = np.zeros((len(every), max(map(len, residues)), residues[0].shape[1]), np.float32)
        for row, values in zip(padded, residues, strict=True):
            row[: len(values)] = values
        arrays = {"embeddings": np.stack([one.pooled["mean"][0] for one in every]), "representations": padded}
        whole = io.BytesIO()
        if self._kind == "npz":
            np.savez(whole, embeddings=arrays["embeddings"], representations=arrays["representations"])
        else:
            with h5py.File(whole, "w") as file:
                for name, values in arrays.items():
                    file[name] = values
        yield whole.getvalue()
