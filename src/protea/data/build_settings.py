"""The settings of builds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from protea.data.mmseqs import CLUSTER_FLAGS, MEMBER_FLAGS, REVERSE_FLAGS, SEARCH_FLAGS, split_flags
from protea.errors import UsageError
from protea.letters import Unknown

Side = Literal["train", "valid"]
"""The split whose sequences are the queries of the filter's search."""

Absent = Literal["error", "skip"]
"""Policy for a member that the mapping names and the sequences lack: an error, or the member is skipped."""

Empty = Literal["error", "representative", "drop"]
"""Policy for a training cluster without members: an error, its representative becomes its member, or it is dropped."""

_CHOICES = {"unknown": Unknown, "search_from": Side, "absent": Absent, "empty": Empty}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What all builds have in common. ``docs/data.md`` describes the options of the same names."""

    output: Path
    alphabet: str = "esm"
    valid: str = "0.5%"
    test: str = "0"
    seed: int = 0
    filtered: bool = True
    search_from: Side = "train"
    filter_flags: str | None = None
    unknown: Unknown = "x"
    min_length: int = 1
    max_length: int | None = None
    leave_out: str | None = None
    absent: Absent = "error"
    empty: Empty = "error"
    mmseqs: str = "mmseqs"
    threads: int | None = None

    def check(self) -> None:
        """Raise a ``UsageError`` if a value is not allowed; the alphabet is checked where it is used."""
        for name in ("filter_flags", "member_flags", "cluster_flags"):
            split_flags(getattr(self, name, None) or "")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(choices):
                raise UsageError(f"--{name.replace('_', '-')} {value}: use {', '.join(get_args(choices))}")
        sample_size("valid", self.valid, 0)
        sample_size("test", self.test, 0)
        if self.min_length < 1:
            raise UsageError(f"--min-length {self.min_length}: use at least 1")
        if self.max_length is not None and self.max_length < self.min_length:
            raise UsageError(
                f"--min-length {self.min_length} exceeds --max-length {self.max_length}; no sequence would be kept"
            )
        try:
            re.compile(self.leave_out or "")
        except re.error as error:
            raise UsageError(f"--leave-out {self.leave_out!r} is not a regular expression: {error}") from error

    @property
    def flags(self) -> str:
        """Flags for ``mmseqs search``."""
        return self.filter_flags or (SEARCH_FLAGS if self.search_from == "train" else REVERSE_FLAGS)

    def plan(self, command: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest's description of the command."""
        values = asdict(self)
        for name in ("output", "mmseqs", "threads"):
            del values[name]
        return {"command": command, **{name: _file_names(value) for name, value in inputs.items()}, **values}


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(BuildSettings):
    """Settings of a build that clusters twice: the representatives of the first clustering are the members."""

    member_flags: str = MEMBER_FLAGS
    cluster_flags: str = CLUSTER_FLAGS


def sample_size(name: str, text: str, total: int) -> int:
    """The number of clusters that ``5000`` or ``0.5%`` of ``total`` means."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise UsageError(f"--{name} {text}: give a number of clusters, or a percentage as in 0.5%")
    return int(match[1]) if match[1] else int(total * float(match[2]) / 100)


def _file_names(value: Any) -> Any:
    """Paths without their folders, so that the manifest does not depend on where the inputs were."""
    if isinstance(value, list):
        return [_file_names(path) for path in value]
    return Path(value).name if isinstance(value, str | Path) else value
