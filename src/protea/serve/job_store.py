"""Jobs: whole FASTA files that are computed beside the requests, and that a killed service continues.

Each has a folder with the input, what was asked, and the unfinished output, which is the one of its command: those of
``protea embed`` and ``protea predict`` continue as theirs do, the others begin again. A job exists when ``job.json`` is
on disk; requests name jobs by ids, which are looked up in memory and never become paths.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any, Final
from uuid import uuid4

from protea.errors import ProteaError, UsageError
from protea.output import report_path, write_durably
from protea.progress import Progress
from protea.serve.admission import Ticket
from protea.serve.job_kinds import Computation, Means
from protea.serve.problems import RefusedError, refusal

_RECORD: Final = "job.json"
_INPUT: Final = "input.fasta"
_MOST: Final = 1000  # unfinished jobs
_LOOK_SECONDS: Final = 60.0


@dataclass
class StoredJob(Progress):
    """A job: what was asked, and how far it is.

    ``state`` is queued, running, done, failed or cancelled; ``done`` and ``total`` count residues, of scores
    passes.
    """

    id: str
    client: str
    what: str
    target: str
    suffix: str
    options: dict[str, Any]
    state: str = "queued"
    created: float = 0.0
    finished: float | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    done: int = 0
    total: int | None = None
    task: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    def shown(self) -> dict[str, Any]:
        """The job as its client sees it."""
        return {name: value for name, value in asdict(self).items() if name != "client"}

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        """Note the current task."""
        self.task, self.total, self.done = task, total, done

    def advance(self, amount: int = 1) -> None:
        """Note how far it is."""
        self.done += amount

    def note(self, message: str) -> None:
        """Keep what a user should know."""
        self.notes.append(message)


class JobStore:
    """The jobs of a service, in a folder that only it uses."""

    def __init__(self, folder: Path, keep_hours: float) -> None:
        self._folder, self._keep = folder, keep_hours * 3600
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--jobs {folder}: another service uses this folder; name another one") from error
        except OSError as error:
            raise UsageError(f"--jobs {folder}: {error.strerror}; name a folder that can be written") from error
        self._jobs = {job.id: job for job in sorted(self._read(), key=lambda job: job.created)}
        self._changed = Condition()
        self._stopping = False
        self._means: Means | None = None
        self._ticket: Ticket | None = None
        self._running: StoredJob | None = None
        self._thread = Thread(target=self._work, name="protea-jobs", daemon=True)

    # --- for requests ----------------------------------------------------------------------------------------------

    def upload_folder(self) -> Path:
        """A new folder that is no job yet."""
        with self._changed:
            if sum(not job.ended for job in self._jobs.values()) >= _MOST:
                raise RefusedError(f"{_MOST:,} jobs wait; try again later", 429, "busy", retry_after=60)
        folder = self._folder / uuid4().hex
        folder.mkdir(mode=0o700)
        return folder

    @staticmethod
    def input_of(folder: Path) -> Path:
        """Where the input of a job is written."""
        return folder / _INPUT

    def add(self, folder: Path, client: str, what: str, target: str, suffix: str, options: dict[str, Any]) -> StoredJob:
        """Make a job of a folder with its input; when this returns, the job survives a kill."""
        job = StoredJob(folder.name, client, what, target, suffix, options, created=time.time())
        self._save(job)
        with self._changed:
            self._jobs[job.id] = job
            self._changed.notify_all()
        return job

    def get(self, name: str, client: str) -> StoredJob:
        """A job of a client."""
        job = self._jobs.get(name)
        if job is None or job.client != client:
            raise RefusedError(
                f"there is no job {name[:64]!r}; results are kept {self._keep / 3600:g} hours", 404, "unknown-job"
            )
        return job

    def of(self, client: str) -> list[StoredJob]:
        """All jobs of a client, the oldest first."""
        return [job for job in list(self._jobs.values()) if job.client == client]

    def result(self, job: StoredJob) -> Path:
        """The path of a job's output."""
        return self._folder / job.id / f"result.{job.suffix}"

    def report(self, job: StoredJob) -> Path:
        """The path of the report of what was changed, cut or left out."""
        return report_path(self.result(job))

    def remove(self, job: StoredJob) -> None:
        """Cancel a job and remove its files."""
        with self._changed:
            self._jobs.pop(job.id, None)
            job.state = "cancelled"
            with suppress(OSError):  # a kill from now on does not bring it back
                self._save(job)
            if self._running is job and self._ticket is not None:
                self._ticket.cancelled.set()
            else:
                shutil.rmtree(self._folder / job.id, ignore_errors=True)

    # --- for the service -------------------------------------------------------------------------------------------

    def start(self, means: Means) -> None:
        """Begin to compute jobs, first those that an earlier service has left."""
        self._means = means
        self._thread.start()

    def pause(self) -> None:
        """Stop computing; unfinished jobs continue with the next service."""
        with self._changed:
            self._stopping = True
            if self._ticket is not None:
                self._ticket.cancelled.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def stop(self) -> None:
        """Stop, and leave the folder to another service."""
        self.pause()
        os.close(self._lock)

    def _read(self) -> list[StoredJob]:
        jobs = []
        for folder in self._folder.iterdir():
            if len(folder.name) != 32 or not folder.is_dir():
                continue
            record = folder / _RECORD
            if not record.exists():
                if {item.name for item in folder.iterdir()} <= {_INPUT, f".{_RECORD}.unfinished"}:
                    shutil.rmtree(folder, ignore_errors=True)  # an upload that a kill cut short; it was never accepted
                continue
            try:
                job = StoredJob(**json.loads(record.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UsageError(f"--jobs: {record}: is no job of this version; move {folder} elsewhere") from error
            if job.state == "cancelled":
                shutil.rmtree(folder, ignore_errors=True)
                continue
            job.state = job.state if job.ended else "queued"
            jobs.append(job)
        return jobs

    def _save(self, job: StoredJob) -> None:
        folder = self._folder / job.id
        if folder.is_dir():
            write_durably(folder / _RECORD, json.dumps(asdict(job)))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._expire()
                job = next((job for job in self._jobs.values() if not job.ended), None)
                if self._stopping:
                    return
                if job is None:
                    self._changed.wait(_LOOK_SECONDS)
                    continue
                assert self._means is not None
                self._running, self._ticket = job, self._means.gate.for_job(f"job of {job.client}")
                job.state = "running"
                with suppress(OSError):  # on a full disk the job still gets its error, and the thread lives on
                    self._save(job)
            self._run(self._means, job, self._ticket)

    def _run(self, means: Means, job: StoredJob, ticket: Ticket) -> None:
        error: str | None = None
        try:
            source = self._folder / job.id / _INPUT
            Computation(means, ticket, job, job.target, job.options, source, self.result(job))(job.what)
        except ProteaError as failure:
            error = str(refusal(failure)).replace(f"{self._folder / job.id}{os.sep}", "")
        except Exception as failure:  # a job must not end the others
            error = f"{type(failure).__name__}: {failure}"
        finally:
            ticket.close()
        with self._changed:
            self._running = self._ticket = None
            if job.id not in self._jobs:  # it was removed while it ran
                shutil.rmtree(self._folder / job.id, ignore_errors=True)
            elif not self._stopping or error is None:
                job.state, job.error = "done" if error is None else "failed", error
                job.finished = time.time()
                with suppress(OSError):
                    self._save(job)

    def _expire(self) -> None:
        for job in list(self._jobs.values()):
            if job.finished is not None and time.time() - job.finished > self._keep:
                del self._jobs[job.id]
                shutil.rmtree(self._folder / job.id, ignore_errors=True)
