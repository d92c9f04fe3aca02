"""Shards of one output laid end to end: what one process would have written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protea.embed.journal import Journal, differences
from protea.embed.outputs import REPORT_HEADER, check_place, move_into_place, write_beside, write_error
from protea.embed.settings import PROVENANCE
from protea.embed.stores import Contents, kind_of, open_store, read_store
from protea.embed.survey import Totals
from protea.errors import OutputError, ProteaError, ResumeError


def find_shards(output: Path) -> list[Path]:
    """The shards of an output, in order.

    Raises:
        OutputError: there are none, some are missing, or they are of different numbers of shards.
    """
    pattern = re.compile(rf"{re.escape(output.stem)}\.shard-(\d+)-of-(\d+){re.escape(output.suffix)}")
    entries = output.parent.iterdir() if output.parent.is_dir() else iter(())
    found = {match: path for path in entries if (match := pattern.fullmatch(path.name))}
    if not found:
        raise OutputError(f"{output}: no shards {output.stem}.shard-1-of-N{output.suffix} beside it")
    counts = {int(match[2]) for match in found}
    if len(counts) > 1:
        raise OutputError(f"{output}: shards of {' and of '.join(map(str, sorted(counts)))}; remove those of one set")
    by_number = {int(match[1]): path for match, path in found.items()}
    count = counts.pop()
    if missing := [number for number in range(1, count + 1) if number not in by_number]:
        raise OutputError(f"{output}: shard {', '.join(map(str, missing))} of {count} is missing; run it first")
    return [by_number[number] for number in range(1, count + 1)]


def merge(
    output: Path,
    shards: list[Path] | None = None,
    *,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Totals:
    """Write an output from its shards, which stay.

    Args:
        output: the path that was given to ``--shard`` runs.
        shards: in order; by default those that lie beside the output.
        overwrite: replace the output if it exists.
        settings: to note in the output in place of the shards' own.

    Returns:
        Counts of the whole.

    Raises:
        UsageError: the suffix names no format.
        OutputError: shards are missing, damaged or of different runs, or the output exists or cannot be written.
    """
    kind = kind_of(output, "merge")
    try:
        check_place(output, kind, overwrite=overwrite)
        shards = find_shards(output) if shards is None else shards
        contents = [_open(shard, kind) for shard in shards]
        provenance = _common(output, [each.provenance for each in contents], shards) | dict(settings or {})
        reports = b"".join(_report(shard) for shard in shards)
        with Journal([output]) as journal:
            if journal.progress is not None:
                raise ResumeError(f"{output}: an unfinished run is writing it; finish that first")
            store = open_store(kind, journal.folders[0], contents[0].layout, None)
            try:
                for shard, each in zip(shards, contents, strict=True):
                    with _reading(shard):
                        for entry, arrays in each.records:
                            store.write(entry, arrays)
                complete = store.finish(provenance)
            finally:
                store.abandon()
            write_beside(output, reports, provenance)
            move_into_place(complete, output)
            journal.remove()
    except OSError as error:
        raise write_error(error, output) from error
    return Totals(**provenance[PROVENANCE]["counts"])


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    """Whatever a reader raises on a damaged file, of which each format has its own kinds, names the shard."""
    try:
        yield
    except ProteaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(f"{shard}: damaged, or no shard of Protea's ({reason}); run that shard again") from error


def _open(shard: Path, kind: str) -> Contents:
    with _reading(shard):
        return read_store(shard, kind)


def _report(shard: Path) -> bytes:
    with _reading(shard):
        return shard.with_name(f"{shard.name}.report.tsv").read_bytes().removeprefix(REPORT_HEADER)


def _common(output: Path, each: list[dict[str, Any]], shards: list[Path]) -> dict[str, Any]:
    """The provenance that all shards share, with their counts added up."""
    plain = []
    for provenance, shard in zip(each, shards, strict=True):
        with _reading(shard):
            own = {"shard": None, "device": None, PROVENANCE: None, "counts": None}
            plain.append({**provenance, **provenance[PROVENANCE], **own})
    for other, shard in zip(plain[1:], shards[1:], strict=True):
        if changed := differences(plain[0], other):
            raise OutputError(f"{output}: {shards[0].name} and {shard.name} are of different runs ({changed})")
    counts = [Totals(**provenance[PROVENANCE]["counts"]) for provenance in each]
    total = {name: sum(getattr(count, name) for count in counts) for name in asdict(counts[0])}
    return each[0] | {"shard": None, PROVENANCE: each[0][PROVENANCE] | {"counts": total}}
