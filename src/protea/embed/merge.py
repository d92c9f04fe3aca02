"""The shards of one output, joined to what one process would have written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protea.embed.outputs import check_place, publish, run_error
from protea.embed.run_journal import RunJournal
from protea.embed.settings import PROVENANCE
from protea.embed.stores import Contents, kind_of, open_store, read_store
from protea.embed.survey import Totals
from protea.errors import OutputError, ProteaError, ResumeError
from protea.journal import differences
from protea.output import report_path


def find_shards(output: Path) -> list[Path]:
    """The shards of an output, in order.

    Raises:
        OutputError: there are none, some are missing, or their numbers of shards differ.
    """
    pattern = re.compile(rf"{re.escape(output.stem)}\.shard-(\d+)-of-(\d+){re.escape(output.suffix)}")
    paths = output.parent.iterdir() if output.parent.is_dir() else iter(())
    matches = {match: path for path in paths if (match := pattern.fullmatch(path.name))}
    if not matches:
        raise OutputError(f"{output}: no shards {output.stem}.shard-1-of-N{output.suffix} beside it")
    counts = {int(match[2]) for match in matches}
    if len(counts) > 1:
        sets = " and of ".join(map(str, sorted(counts)))
        raise OutputError(f"{output}: there are shards of {sets}; remove those that do not belong to it")
    by_number = {int(match[1]): path for match, path in matches.items()}
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
    """Write an output from its shards. The shards stay.

    Args:
        output: the path that was given to the ``--shard`` runs.
        shards: in order; by default those beside the output.
        overwrite: replace the output if it exists.
        settings: stored in the output instead of the shards' own.

    Returns:
        Counts of the whole output.

    Raises:
        UsageError: the suffix names no format.
        OutputError: shards are missing, damaged or of different runs, or the output exists or cannot be written.
    """
    kind = kind_of(output, "merge")
    try:
        check_place(output, kind, overwrite=overwrite)
        shards = find_shards(output) if shards is None else shards
        contents = [_open(shard, kind) for shard in shards]
        provenance = _common(output, [content.provenance for content in contents], shards) | dict(settings or {})
        rows = [row for shard in shards for row in _report(shard)]
        with RunJournal([output]) as journal:
            if journal.state is not None:
                raise ResumeError(f"{output}: an unfinished run is writing it; finish that run first")
            store = open_store(kind, journal.folders[0], contents[0].layout, None)
            try:
                for shard, content in zip(shards, contents, strict=True):
                    with _reading(shard):
                        for record, arrays in content.records:
                            store.write(record, arrays)
                complete = store.finish(provenance)
            finally:
                store.abandon()
            publish(complete, output, rows, provenance)
            journal.remove()
    except OSError as error:
        raise run_error(error, output) from error
    return Totals(**provenance[PROVENANCE]["counts"])


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    """Name the shard in whatever its reader raises; each format has its own exceptions for damaged files."""
    try:
        yield
    except ProteaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(f"{shard}: damaged, or not a shard of Protea's ({reason}); run that shard again") from error


def _open(shard: Path, kind: str) -> Contents:
    with _reading(shard):
        return read_store(shard, kind)


def _report(shard: Path) -> list[list[str]]:
    with _reading(shard):
        return [line.split("\t") for line in report_path(shard).read_text(encoding="utf-8").splitlines()[1:]]


def _common(output: Path, provenances: list[dict[str, Any]], shards: list[Path]) -> dict[str, Any]:
    """The provenance that all shards share, with the sums of their counts."""
    shared = []
    for provenance, shard in zip(provenances, shards, strict=True):
        with _reading(shard):
            own = {"shard": None, "device": None, PROVENANCE: None, "counts": None}
            shared.append({**provenance, **provenance[PROVENANCE], **own})
    for plan, shard in zip(shared[1:], shards[1:], strict=True):
        if changed := differences(shared[0], plan):
            raise OutputError(f"{output}: {shards[0].name} and {shard.name} are of different runs ({changed})")
    counts = [Totals(**provenance[PROVENANCE]["counts"]) for provenance in provenances]
    total = {name: sum(getattr(count, name) for count in counts) for name in asdict(counts[0])}
    return provenances[0] | {"shard": None, PROVENANCE: provenances[0][PROVENANCE] | {"counts": total}}
