"""``/v1/jobs``: whole FASTA files in, files out, with progress as server-sent events."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse, JSONResponse, StreamingResponse

from protea.embed.prepare import Duplicates, Long
from protea.fasta import disguise
from protea.letters import Gaps, Unknown
from protea.serve.answer_formats import as_json
from protea.serve.answering import in_thread
from protea.serve.job_kinds import FORMS, Kind, check
from protea.serve.job_store import JobStore, StoredJob
from protea.serve.native_routes import answers
from protea.serve.problems import RefusedError
from protea.serve.schemas import Method, Number
from protea.serve.service import Service

_EVENT_SECONDS = 0.5


class JobQuery(BaseModel):
    """What a job computes; options are those of the commands, and each kind takes its own."""

    model_config = ConfigDict(extra="forbid")

    what: Kind = "embed"
    format: Annotated[Literal["parquet", "h5", "csv", "tsv", "npz"] | None, Field(description="Of the result.")] = None
    model: Annotated[str | None, Field(max_length=500)] = None
    adapter: Annotated[str | None, Field(max_length=500)] = None
    pool: Annotated[str, Field(max_length=100)] = "mean"
    layers: Annotated[str, Field(max_length=1000)] = "-1"
    variants: Annotated[str | None, Field(max_length=60_000, description="Of one protein, by comma.")] = None
    method: Method = "masked-marginals"
    offset: Number = 1
    min_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    min_separation: Annotated[int, Field(ge=1, le=100_000)] = 6
    pseudo: bool = False
    masking: Annotated[str, Field(max_length=100)] = "standard"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
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
        formats, given = FORMS[query.what].formats, query.model_dump(exclude_unset=True, exclude={"what", "format"})
        if query.format not in (None, *formats):
            raise RefusedError(f"format={query.format}: {query.what} writes {', '.join(formats)}")
        target, options = check(service.ready, query.what, given)
        folder = await in_thread(jobs.upload_folder)
        try:
            await _receive(request, jobs.input_of(folder))
            args = (folder, request.state.client, query.what, target, query.format or formats[0], options)
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
        return FileResponse(_there(store().result(job)), filename=f"{job.id}.{job.suffix}")

    @router.get("/{job_id}/report", summary="What was changed, cut or left out")
    async def report(request: Request, job_id: str) -> Response:
        job = _finished(store().get(job_id, request.state.client))
        return FileResponse(_there(store().report(job)), media_type="text/tab-separated-values")

    return router


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


def _there(path: Path) -> Path:
    if not path.exists():
        raise RefusedError("the job's files were removed; make the job again", 404, "unknown-job")
    return path


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
