"""A thin client of ``protea serve``: sequences in, arrays out, errors as this package's own."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from protea.errors import ProteaError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WAITS: Final = 8  # times that a busy service is asked again


class ServiceError(ProteaError):
    """The service refused a request, or cannot be reached; ``status`` is 0 then."""

    def __init__(self, message: str, status: int = 0, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.problem = status, dict(problem or {})

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.status, self.problem)


class Client:
    """A client of a service at ``url``; ``key`` is one of its API-key file.

    ``sequences`` are a list, or a mapping of ids to sequences; results come in the same form. A busy service is asked
    again after the time that it names. Options are those of the routes (``docs/serving.md``).
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, timeout: float = 600.0) -> None:
        self.url, self._key, self._timeout = url.rstrip("/"), key, timeout

    def models(self) -> list[str]:
        """Names of the served models."""
        return [str(model["id"]) for model in self._json("GET", "/v1/models")["data"]]

    def embed(self, sequences: Any, **options: Any) -> Any:
        """One float32 vector per sequence: ``[N, D]``, or by id."""
        return self._arrays("embed", sequences, options, "embedding", stacked=True)

    def residues(self, sequences: Any, **options: Any) -> Any:
        """One float32 array ``[L, D]`` per sequence."""
        return self._arrays("residues", sequences, options, "embedding")

    def logits(self, sequences: Any, **options: Any) -> Any:
        """Log-probabilities ``[L, letters]`` of each sequence."""
        return self._arrays("logits", sequences, options, "log_probabilities")

    def contacts(self, sequences: Any, **options: Any) -> Any:
        """A contact map ``[L, L]`` for each sequence."""
        return self._arrays("contacts", sequences, options, "contacts")

    def perplexity(self, sequences: Any, **options: Any) -> float:
        """Perplexity of all sequences together."""
        return float(self.call("perplexity", sequences=_listed(sequences), **options)["perplexity"])

    def score(self, sequence: str, variants: Sequence[str], **options: Any) -> NDArray[np.float64]:
        """Effects of variants ``[n]``; a variant that cannot be scored is NaN."""
        return self._scores(self.call("score", sequence=sequence, variants=list(variants), **options))

    def scan(self, sequence: str, **options: Any) -> NDArray[np.float64]:
        """Effects of all single substitutions ``[L, 20]``; the wild type's own letter is NaN."""
        import numpy as np

        return np.array(self.call("scan", sequence=sequence, **options)["matrix"], np.float64)

    def predict(self, adapter: str, sequences: Any, **options: Any) -> list[dict[str, Any]]:
        """The rows of an adapter's predictions."""
        answer = self.call(f"predict/{quote(adapter, safe='')}", sequences=_listed(sequences), **options)
        return list(answer["records"])

    def call(self, route: str, **body: Any) -> dict[str, Any]:
        """The whole JSON answer of a native route, with its notes."""
        return self._json("POST", f"/v1/{route}", body)

    def submit(self, fasta: str | Path, **options: Any) -> str:
        """Make a job of a FASTA file; returns its id. Options: what, model, adapter, format, pool, layers, long, ..."""
        data = Path(fasta).read_bytes()
        answer = self._send("POST", f"/v1/jobs?{urlencode(options)}", data, "text/x-fasta", "application/json")
        return str(json.loads(answer)["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """How far a job is."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}")

    def wait(self, job_id: str, *, every: float = 1.0) -> Iterator[dict[str, Any]]:
        """How far a job is, again and again until it ends; a ``ServiceError`` if it failed."""
        while True:
            job = self.job(job_id)
            yield job
            if job["state"] == "failed":
                raise ServiceError(f"the job failed: {job['error']}")
            if job["state"] == "done":
                return
            time.sleep(every)

    def fetch(self, job_id: str, output: str | Path) -> None:
        """Write the result of a job to a file."""
        Path(output).write_bytes(self._send("GET", f"/v1/jobs/{quote(job_id, safe='')}/result", None, "", "*/*"))

    def _arrays(self, route: str, sequences: Any, options: Any, name: str, *, stacked: bool = False) -> Any:
        import numpy as np

        body = json.dumps({"sequences": _listed(sequences), **options}).encode()
        data = self._send("POST", f"/v1/{route}", body, "application/json", "application/x-npz")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            ids = file["id"].tolist()
            names = sorted({key.partition("/")[0] for key in file.files if key.startswith(name)})
            columns = {
                column: file[column] if column in file.files else [file[f"{column}/{row}"] for row in range(len(ids))]
                for column in names
            }
        found = next(iter(columns.values())) if len(columns) == 1 else columns
        if isinstance(sequences, Mapping) and len(columns) == 1:
            return dict(zip(ids, found, strict=True))
        return found if stacked or len(columns) > 1 else list(found)

    @staticmethod
    def _scores(answer: Mapping[str, Any]) -> NDArray[np.float64]:
        import numpy as np

        scores = [row["model_score"] for row in answer["records"]]
        return np.array([np.nan if score is None else score for score in scores], np.float64)

    def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        return dict(json.loads(self._send(method, path, data, "application/json", "application/json")))

    def _send(self, method: str, path: str, data: bytes | None, kind: str, accept: str) -> bytes:
        headers = {"Accept": accept} | ({"Content-Type": kind} if data is not None else {})
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        for attempt in range(_WAITS):
            request = Request(f"{self.url}{path}", data, headers, method=method)
            try:
                with urlopen(request, timeout=self._timeout) as answer:
                    return bytes(answer.read())
            except HTTPError as error:
                with error:
                    text = error.read()
                wait = error.headers.get("Retry-After", "")
                if error.code in (429, 503) and wait.isdigit() and attempt < _WAITS - 1:
                    time.sleep(int(wait))
                    continue
                raise _refused(text, error.code) from None
            except (URLError, HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                raise ServiceError(f"{self.url}: cannot be reached: {reason}; start `protea serve` there") from error
        raise AssertionError("the last attempt returns or raises")


def _listed(sequences: Any) -> list[Any]:
    if isinstance(sequences, str):
        return [sequences]
    if isinstance(sequences, Mapping):
        return [{"id": str(name), "sequence": text} for name, text in sequences.items()]
    return list(sequences)


def _refused(text: bytes, status: int) -> ServiceError:
    try:
        problem = json.loads(text)
        message = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        problem, message = {}, text[:200].decode(errors="replace")
    return ServiceError(message, status, problem)
