"""Shards: shares of one command's work, which many processes or machines compute, until they are joined to one output.

A command with ``--shard i/N`` writes ``OUT.shard-i-of-N``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from protea.errors import OutputError
from protea.output import WRITTEN, measured, read_run

_COMPRESSED: Final = (".gz", ".bz2", ".zst")

COMMAND: Final = "command"
"""Name in run files of the command that wrote an output; without it, it was ``embed``."""


class Shard(BaseModel):
    """One of several equal shares of the work, numbered from 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1)
    of: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def output(self, path: Path) -> Path:
        """The path of this shard of an output: ``OUT.shard-2-of-8.h5``."""
        stem, suffix = _parts(path)
        return path.with_name(f"{stem}.shard-{self.number}-of-{self.of}{suffix}")

    def part(self, weights: NDArray[Any]) -> range:
        """The places of this shard's units of work, from the work that each of all units takes.

        They are neighbours, so that joined shards give the whole output. A unit belongs to the share that its middle
        is in, so a shard differs from an equal share by a unit at most.
        """
        ends = np.cumsum(weights, dtype=np.float64)
        middles = ends - weights / 2
        total = max(1.0, float(ends[-1])) if len(ends) else 1.0
        owners = np.minimum(middles * self.of // total, self.of - 1)
        first, last = (int(np.searchsorted(owners, self.number - 1, side)) for side in ("left", "right"))
        return range(first, last)


def read_shard(text: str) -> Shard:
    """A shard from text such as ``3/8``; a ``ValueError`` says what is wrong."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ValueError("must be i/N with i from 1 to N, as in 3/8")
    return Shard(number=int(number), of=int(of))


def find_shards(output: Path) -> list[Path]:
    """The shards of an output, in order; ``OutputError`` if some are missing or belong to another number of shards."""
    stem, suffix = _parts(output)
    pattern = re.compile(rf"{re.escape(stem)}\.shard-(\d+)-of-(\d+){re.escape(suffix)}")
    paths = output.parent.iterdir() if output.parent.is_dir() else iter(())
    matches = {match: path for path in paths if (match := pattern.fullmatch(path.name))}
    if not matches:
        raise OutputError(f"{output}: no shards {stem}.shard-1-of-N{suffix} beside it")
    counts = {int(match[2]) for match in matches}
    if len(counts) > 1:
        sets = " and of ".join(map(str, sorted(counts)))
        raise OutputError(f"{output}: there are shards of {sets}; remove those that do not belong to it")
    by_number = {int(match[1]): path for match, path in matches.items()}
    count = counts.pop()
    if missing := [number for number in range(1, count + 1) if number not in by_number]:
        raise OutputError(f"{output}: shard {', '.join(map(str, missing))} of {count} is missing; run it first")
    return [by_number[number] for number in range(1, count + 1)]


def command_of(shard: Path) -> str:
    """The command that wrote a shard."""
    run = read_run(shard)
    inner = run.get("provenance")
    return str(run.get(COMMAND) or (inner.get(COMMAND) if isinstance(inner, dict) else None) or "embed")


def check_shard(shard: Path) -> None:
    """Refuse a finished shard that is not what its run wrote, by its size and, if it is recorded, its SHA-256."""
    known = read_run(shard).get(WRITTEN, {})
    if measured(shard, hashed="sha256" in known) != known:
        raise OutputError(f"{shard}: damaged, or not what its run wrote; run that shard again")


def _parts(path: Path) -> tuple[str, str]:
    """Stem and suffix; ``.csv.gz`` is one suffix."""
    inner = Path(path.stem).suffix if path.suffix in _COMPRESSED else ""
    return path.stem.removesuffix(inner), inner + path.suffix
