"""The bodies of requests. Names, defaults and meanings of options are those of the commands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from protea.embed.prepare import Long
from protea.letters import Gaps, Unknown
from protea.score.expected import LongProtein

_UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def _printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("an id has at least one sign and no control characters")
    return text


Id = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
Method = Literal["masked-marginals", "wildtype-marginals", "pseudo-likelihood", "pseudo-likelihood-sum"]
_MOST_MEMBERS = 50
Number = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class RequestPart(BaseModel):
    """What requests give. The first fault ends the check: a body of a million faults would need gigabytes otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _few_members(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > _MOST_MEMBERS:
            raise ValueError(f"an object of {len(given):,} members; at most {_MOST_MEMBERS} are read")
        return given


class Named(RequestPart):
    """A sequence with its id."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    sequence: str


class Body(RequestPart):
    """What every request may say."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str | None, Field(max_length=500, description="A served model; by default the first.")] = None
    unknown: Annotated[Unknown, Field(description="A letter outside the alphabet: x (replace), error, skip.")] = "x"
    gaps: Annotated[Gaps, Field(description="Gaps of an alignment: keep (as residues) or drop.")] = "keep"


class SequencesBody(Body):
    """Sequences, without ids (they are then numbers from 0) or with them."""

    sequences: Annotated[
        list[str | Named], Field(min_length=1, fail_fast=True, examples=[[_UBIQUITIN, {"id": "a", "sequence": "MK"}]])
    ]


class EmbedBody(SequencesBody):
    """One vector per sequence."""

    pool: Annotated[list[Literal["mean", "max", "std", "bos"]], Field(min_length=1, fail_fast=True)] = ["mean"]
    layers: Annotated[list[Number], Field(min_length=1, max_length=200, fail_fast=True)] = [-1]
    long: Annotated[Long, Field(description="A sequence over the model's length.")] = "truncate"


class ResiduesBody(SequencesBody):
    """One vector per residue."""

    layers: Annotated[list[Number], Field(min_length=1, max_length=200, fail_fast=True)] = [-1]
    long: Long = "truncate"


class LogitsBody(SequencesBody):
    """Log-probabilities of each residue, and the entropy of the prediction."""

    long: Long = "truncate"


class ContactsBody(SequencesBody):
    """Contact maps."""


class PredictBody(SequencesBody):
    """Predictions of an adapter; policies are by default those of its training."""

    unknown: Unknown | None = None  # type: ignore[assignment]
    gaps: Gaps | None = None  # type: ignore[assignment]
    long: Long | None = None


class PerplexityBody(SequencesBody):
    """Perplexity of masked residues, or with ``pseudo`` of each residue masked by itself."""

    pseudo: bool = False
    masking: Annotated[str, Field(max_length=100)] = "standard"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    long: Annotated[Long | None, Field(description="By default truncate, and window with pseudo.")] = None


class ProteinBody(Body):
    """One protein whose variants are scored."""

    sequence: Annotated[str, Field(min_length=1, examples=[_UBIQUITIN])]
    method: Method = "masked-marginals"
    offset: Annotated[Number, Field(description="Number of the first residue.")] = 1
    long: LongProtein = "window"


class ScoreBody(ProteinBody):
    """Effects of variants."""

    variants: Annotated[
        list[Annotated[str, Field(max_length=2000)]], Field(min_length=1, fail_fast=True, examples=[["M1A", "Q2L:I3V"]])
    ]


class ScanBody(ProteinBody):
    """Effects of all single substitutions."""

    positions: Annotated[str | None, Field(max_length=10_000, examples=["1-3"])] = None


class OpenAIBody(RequestPart):
    """OpenAI's request for embeddings."""

    model: Annotated[str, Field(max_length=500)]
    input: Annotated[str | list[Any], Field(examples=[[_UBIQUITIN]])]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class TeiBody(RequestPart):
    """text-embeddings-inference's request."""

    inputs: Annotated[str | Annotated[list[str], Field(fail_fast=True)], Field(examples=[[_UBIQUITIN]])]
    normalize: bool = True
    truncate: bool | None = False
    truncation_direction: Literal["Left", "Right", "left", "right"] = "Right"
    prompt_name: str | None = None
    dimensions: int | None = None


class NvidiaBody(RequestPart):
    """NVIDIA's request for ESM-2."""

    sequences: Annotated[list[str], Field(min_length=1, max_length=32, fail_fast=True, examples=[[_UBIQUITIN]])]
    format: Literal["npz", "h5"] = "npz"
