"""``/v1/jobs``: whole FASTA files in, files out, with progress as server-sent events."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse, JSONResponse, StreamingResponse

from protea.embed.embeddings import check_poolings, resolve_layers
from protea.embed.prepare import Duplicates, Long
from protea.embed.settings import parse
from protea.fasta import disguise
from protea.letters import Gaps, Unknown
from protea.serve.answer_formats import as_json
from protea.serve.answering import in_thread
from protea.serve.job_store import SUFFIXES, JobStore, StoredJob
from protea.serve.native_routes import answers
from protea.serve.problems import RefusedError
from protea.serve.service import Service

_EVENT_SECONDS = 0.5


class JobQuery(BaseModel):
    """What a job computes; options are those of ``protea embed`` and ``protea predict``."""

    model_config = ConfigDict(extra="forbid")

    what: Literal["embed", "residues", "logits", "predict"] = "embed"
    model: Annotated[str | None, Field(max_length=500)] = None
    adapter: Annotated[str | None, Field(max_length=500)] = None
    format: Literal["parquet", "h5", "csv", "tsv", "npz"] = "parquet"
    pool: Annotated[str, Field(max_length=100)] = "mean"
    layers: Annotated[str, Field(max_length=1000)] = "-1"
    long: Long | None = None
    unknown: Unknown | None = None
    gaps: Gaps | None = None
    duplicates: Duplicates = "error"


def job_routes(service: Service) -> APIRouter:
    """The routes of a service."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=answers(), default_response_class=Response)

    def store() -> JobStore:
        if service.jobs is None:
            raise RefusedError(
                "this service keeps nothing on disk, so it takes no jobs; start it with --jobs FOLDER", 501, "no-jobs"
            )
        return service.jobs

    @router.post(
        "",
        status_code=202,
        summary="Compute a FASTA file",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"text/x-fasta": {"schema": {"type": "string"}, "example": ">a\nMKTAYIAKQR\n"}},
            }
        },
    )
    async def create(request: Request, query: Annotated[JobQuery, Query()]) -> Response:
        jobs = store()
        target, options = _checked(service, query)
        folder = await in_thread(jobs.upload_folder)
        try:
            await _receive(request, jobs.input_of(folder))
            args = (folder, request.state.client, query.what, target, query.format, options)
            job = await in_thread(lambda: jobs.add(*args))
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise RefusedError(f"the job cannot be kept: {error.strerror}", 507, "disk") from error
            raise
        return JSONResponse(job.shown(), 202, {"Location": f"/v1/jobs/{job.id}"})

    @router.get("", summary="All jobs of the client")
    async def every(request: Request) -> Response:
        return JSONResponse({"jobs": [job.shown() for job in store().of(request.state.client)]})

    @router.get("/{job_id}", summary="How far a job is")
    async def one(request: Request, job_id: str) -> Response:
        return JSONResponse(store().get(job_id, request.state.client).shown())

    @router.delete("/{job_id}", status_code=204, summary="Cancel a job and remove its files")
    async def remove(request: Request, job_id: str) -> Response:
        job = store().get(job_id, request.state.client)
        await in_thread(lambda: store().remove(job))
        return Response(status_code=204)

    @router.get("/{job_id}/events", summary="Progress, as server-sent events")
    async def events(request: Request, job_id: str) -> Response:
        job = store().get(job_id, request.state.client)
        return StreamingResponse(_events(service, job), media_type="text/event-stream")

    @router.get("/{job_id}/result", summary="The output file")
    async def result(request: Request, job_id: str) -> Response:
        job = _finished(store().get(job_id, request.state.client))
        return FileResponse(store().result(job), filename=f"{job.id}.{job.suffix}")

    @router.get("/{job_id}/report", summary="What was changed, cut or left out")
    async def report(request: Request, job_id: str) -> Response:
        job = _finished(store().get(job_id, request.state.client))
        return FileResponse(store().report(job), media_type="text/tab-separated-values")

    return router


def _checked(service: Service, query: JobQuery) -> tuple[str, dict[str, Any]]:
    """The name of the model or adapter, and the options; refuses now what would fail later."""
    if query.format not in SUFFIXES[query.what]:
        raise RefusedError(f"format={query.format}: {query.what} writes {', '.join(SUFFIXES[query.what])}")
    policies = {"long": query.long, "unknown": query.unknown, "gaps": query.gaps}
    options: dict[str, Any] = {name: value for name, value in policies.items() if value is not None}
    options["duplicates"] = query.duplicates
    if query.what == "predict":
        if query.adapter is None:
            raise RefusedError("adapter: name the adapter that predicts")
        return service.ready.adapter(query.adapter).name, options
    model = service.ready.model(query.model)
    options |= {"pool": query.pool, "layers": query.layers}
    settings = parse({**options, "inputs": ["input.fasta"], "sequences": "result.parquet"}, "the job")
    resolve_layers(settings.layers, model.lane.model)
    check_poolings(settings.pool, model.lane.model.alphabet.frame)
    if query.what == "logits":
        model.lane.model.require("logits")
    return model.name, options


async def _receive(request: Request, path: Path) -> None:
    """Write the body to disk as it arrives; refuses what is not FASTA by its first bytes."""
    begun = False
    with path.open("wb") as file:
        async for part in request.stream():
            if part and not begun:
                begun = True
                if reason := disguise(part):
                    raise RefusedError(f"the body {reason}")
                if not part.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b">"):
                    raise RefusedError("the body is not FASTA, which begins with '>'; compressed files are not taken")
            await in_thread(lambda part=part: file.write(part))  # type: ignore[misc]
    if not begun:
        raise RefusedError("the body is empty; send a FASTA file")


def _finished(job: StoredJob) -> StoredJob:
    if job.state == "failed":
        raise RefusedError(f"the job failed: {job.error}", 409, "job-failed")
    if job.state != "done":
        raise RefusedError(f"the job is {job.state}; wait until it is done", 409, "job-unfinished", retry_after=5)
    return job


async def _events(service: Service, job: StoredJob) -> AsyncIterator[bytes]:
    last = b""
    while True:
        now = as_json(job.shown())
        if now != last:
            yield b"event: " + (b"end" if job.ended else b"progress") + b"\ndata: " + now + b"\n\n"
            last = now
        if job.ended or service.gate.draining:
            return
        await asyncio.sleep(_EVENT_SECONDS)
