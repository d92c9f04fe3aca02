"""What builds of stores can be told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protea.data.assemble import Empty
from protea.data.encoding import RecordFilter, Unknown
from protea.data.manifest import alphabet_named
from protea.data.mapping import Absent
from protea.data.mmseqs import REVERSE_FLAGS, SEARCH_FLAGS, split_flags
from protea.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What all builds can be told.

    Attributes:
        output: the store's folder; must be new.
        alphabet: ``esm`` or ``esm-1nv``.
        valid: clusters for validation, a number or a percentage.
        test: clusters for testing, likewise.
        seed: of the sample.
        filtered: training clusters similar to a validation cluster are removed.
        search_from: ``train`` looks each training cluster up among the validation ones, as public pipelines do;
            ``valid`` the other way round, which is as many times faster as there are more of the former.
        filter_flags: of ``mmseqs search``; those of the direction by default.
        unknown: what becomes of residues outside the alphabet.
        min_length: residues a sequence must have.
        max_length: residues a sequence may have.
        leave_out: a regular expression of headers.
        absent: what becomes of members that are named and not there.
        empty: what becomes of training clusters without members.
        mmseqs: the program.
        threads: of the program.
    """

    output: Path
    alphabet: str = "esm"
    valid: str = "0.5%"
    test: str = "0"
    seed: int = 0
    filtered: bool = True
    search_from: str = "train"
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
        """See that every value can be meant.

        Raises:
            UsageError: one cannot.
        """
        alphabet_named(self.alphabet)
        split_flags(self.filter_flags or "")
        for name, value, known in (
            ("unknown", self.unknown, ("x", "error", "skip")),
            ("search-from", self.search_from, ("train", "valid")),
            ("absent", self.absent, ("error", "skip")),
            ("empty", self.empty, ("error", "representative", "drop")),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value}: use {', '.join(known)}")
        sample_size("valid", self.valid, 0)
        sample_size("test", self.test, 0)
        if self.min_length < 1 or (self.max_length is not None and self.max_length < self.min_length):
            raise UsageError(f"lengths from {self.min_length} to {self.max_length}: nothing would be taken")
        try:
            re.compile(self.leave_out or "")
        except re.error as error:
            raise UsageError(f"--leave-out {self.leave_out!r} is no regular expression: {error}") from error

    @property
    def flags(self) -> str:
        """Of ``mmseqs search``."""
        return self.filter_flags or (SEARCH_FLAGS if self.search_from == "train" else REVERSE_FLAGS)

    @property
    def policies(self) -> RecordFilter:
        """Which sequences are taken, and how."""
        return RecordFilter(
            unknown=self.unknown, min_length=self.min_length, max_length=self.max_length, leave_out=self.leave_out
        )

    def plan(self, command: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest says was run."""
        values = asdict(self)
        for name in ("output", "mmseqs", "threads"):
            del values[name]
        named = {name: _names(value) for name, value in inputs.items()}
        return {"command": command, **named, **values}


def sample_size(name: str, text: str, total: int) -> int:
    """How many of ``total`` clusters ``5000`` or ``0.5%`` are.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise UsageError(f"--{name} {text}: give a number of clusters, or a percentage as in 0.5%")
    return int(match[1]) if match[1] else int(total * float(match[2]) / 100)


def _names(value: Any) -> Any:
    """Files by their names alone, so that a store does not tell where it was made."""
    if isinstance(value, list | tuple):
        return [_names(each) for each in value]
    return Path(value).name if isinstance(value, str | Path) else value
