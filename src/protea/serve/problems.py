"""What the service refuses, and how: each refusal has a status, a kind for programs, and one sentence for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from protea.errors import (
    CapabilityError,
    DeviceError,
    FastaError,
    NonFiniteError,
    ProteaError,
    SequenceTooLongError,
    UnknownResidueError,
    UsageError,
    VariantError,
)


class RefusedError(ProteaError):
    """A request that is not answered; ``kind`` names the reason, ``more`` are further members of the answer."""

    def __init__(
        self,
        message: str,
        status: int = 422,
        kind: str = "invalid",
        *,
        retry_after: float | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.more = status, kind, dict(more or {})
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))

    def __reduce__(self) -> Any:
        return _restored, (str(self), self.status, self.kind, self.retry_after, self.more)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def _restored(message: str, status: int, kind: str, retry_after: float | None, more: Mapping[str, Any]) -> RefusedError:
    return RefusedError(message, status, kind, retry_after=retry_after, more=more)


_STATUS: Final[Mapping[type[ProteaError], tuple[int, str]]] = {
    UnknownResidueError: (422, "unknown-residue"),
    SequenceTooLongError: (422, "sequence-too-long"),
    VariantError: (422, "variant"),
    CapabilityError: (422, "capability"),
    FastaError: (422, "sequences"),
    UsageError: (422, "invalid"),
    DeviceError: (413, "memory"),
    NonFiniteError: (500, "not-finite"),
}
_PLACE: Final = re.compile(r"sequence (?P<number>\d+)(?: \((?P<id>.*?)\))?: ")
# Messages name options of the commands; those of `protea fit-contacts` stay, as the service has no such route.
_OPTION: Final = re.compile(r"(?<!fit-contacts )--(\w+)(?: (?!POLICY)(\w+))?(?![\w-])")
_POSITION: Final = re.compile(r" at (?:position )?(\d+)")


def refusal(error: ProteaError) -> RefusedError:
    """The refusal that an error of the package is."""
    if isinstance(error, RefusedError):
        return error
    status, kind = next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), (500, "failed"))
    message = _OPTION.sub(lambda found: "=".join(filter(None, found.groups())), str(error))
    return RefusedError(message, status, kind, more=_places(message))


def _places(message: str) -> dict[str, Any]:
    """Number, from 0, and id of the sequence that a message names, and the position in it, from 1."""
    if (place := _PLACE.match(message)) is None:
        return {}
    named = {"sequence": int(place["number"])} | ({"id": place["id"]} if place["id"] else {})
    position = _POSITION.search(message, place.end())
    return named | ({"position": int(position[1])} if position else {})


def problem(refused: RefusedError, request_id: str) -> dict[str, Any]:
    """The body of an answer by RFC 9457 (``application/problem+json``)."""
    return {
        "type": f"urn:protea:{refused.kind}",
        "title": refused.kind.replace("-", " "),
        "status": refused.status,
        "detail": str(refused),
        "instance": f"urn:uuid:{request_id}",
        **refused.more,
    }


_OPENAI_KINDS: Final = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_TEI_KINDS: Final = {413: "Validation", 422: "Tokenizer", 424: "Backend", 429: "Overloaded", 503: "Unhealthy"}


def openai_error(refused: RefusedError) -> dict[str, Any]:
    """The body of an error as OpenAI writes it."""
    other = "server_error" if refused.status >= 500 else "invalid_request_error"
    kind = _OPENAI_KINDS.get(refused.status, other)
    parameter = refused.more.get("parameter")
    code = "model_not_found" if refused.kind == "unknown-model" else refused.kind.replace("-", "_")
    return {"error": {"message": str(refused), "type": kind, "param": parameter, "code": code}}


def tei_error(refused: RefusedError) -> dict[str, Any]:
    """The body of an error as text-embeddings-inference writes it."""
    return {"error": str(refused), "error_type": _TEI_KINDS.get(refused.status, "Validation")}


def nvidia_error(refused: RefusedError) -> dict[str, Any]:
    """The body of an error as NVIDIA's services write it."""
    return {"detail": str(refused)}
