"""Shards of one output laid end to end: what one process would have written."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protea.embed.journal import Journal, differences
from protea.embed.outputs import REPORT_HEADER, check_place, move_into_place, write_beside, write_error
from protea.embed.settings import PROVENANCE
from protea.embed.stores import kind_of, open_store, read_store
from protea.embed.survey import Totals
from protea.errors import OutputError, ResumeError


def find_shards(output: Path) -> list[Path]:
    """The shards of an output, in order.

    Raises:
        OutputError: there are none, some are missing, or they are of different numbers of shards.
    """
    pattern = re.compile(rf"{re.escape(output.stem)}\.shard-(\d+)-of-(\d+){re.escape(output.suffix)}")
    found = {match: path for path in output.parent.iterdir() if (match := pattern.fullmatch(path.name))}
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


def merge(output: Path, *, overwrite: bool = False) -> Totals:
    """Write an output from its shards, which stay.

    Args:
        output: the path that was given to ``--shard`` runs.
        overwrite: replace the output if it exists.

    Returns:
        Counts of the whole.

    Raises:
        OutputError: shards are missing or of different runs, or the output exists or cannot be written.
    """
    try:
        check_place(output, overwrite=overwrite)
        shards = find_shards(output)
        contents = [read_store(shard) for shard in shards]
        provenance = _common(output, [each.provenance for each in contents], shards)
        with Journal([output]) as journal:
            if journal.progress is not None:
                raise ResumeError(f"{output}: an unfinished run is writing it; finish that first")
            store = open_store(kind_of(output, "output"), journal.folders[0], contents[0].layout, None)
            try:
                for each in contents:
                    for entry, arrays in each.records:
                        store.write(entry, arrays)
                complete = store.finish(provenance)
            finally:
                store.abandon()
            reports = [shard.with_name(f"{shard.name}.report.tsv").read_bytes() for shard in shards]
            write_beside(output, b"".join(report.removeprefix(REPORT_HEADER) for report in reports), provenance)
            move_into_place(complete, output)
            journal.remove()
    except (OSError, KeyError, ValueError) as error:
        raise write_error(error, output) from error
    return Totals(**provenance[PROVENANCE]["counts"])


def _common(output: Path, each: list[dict[str, Any]], shards: list[Path]) -> dict[str, Any]:
    """The provenance that all shards share, with their counts added up."""
    counts = [Totals(**one[PROVENANCE]["counts"]) for one in each]
    flat = [{**one, **one[PROVENANCE], "shard": None, "device": None, PROVENANCE: None, "counts": None} for one in each]
    for other, shard in zip(flat[1:], shards[1:], strict=True):
        if changed := differences(flat[0], other):
            raise OutputError(f"{output}: {shards[0].name} and {shard.name} are of different runs ({changed})")
    total = {name: sum(getattr(count, name) for count in counts) for name in asdict(counts[0])}
    return each[0] | {"shard": None, PROVENANCE: each[0][PROVENANCE] | {"counts": total}}
