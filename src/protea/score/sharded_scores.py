"""The merge of the shards of ``protea score``, which are neighbouring rows of one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

from protea.errors import OutputError
from protea.journal import differences
from protea.output import WRITTEN, read_run, report_path
from protea.rerun import PLOT
from protea.score.variant_table import REPORT, SHARD, failed_rows
from protea.shards import check_shard
from protea.tables import Beside, check_output, join_tables

_OWN: Final = (SHARD, WRITTEN)


class MergedScores(NamedTuple):
    """Counts of shards, of rows that could not be scored, and of all lines of the report."""

    shards: int
    failed: int
    told: int


def merge_scores(output: Path, shards: list[Path], *, overwrite: bool = False) -> MergedScores:
    """Write a table from its shards, in order, with the report and the run file of one process; the shards stay.

    An output that is of these shards already ends as that of ``score_variants``: with a ``FinishedError``, or with an
    ``OutputError`` if rows could not be scored.
    """
    runs: list[dict[str, Any]] = []
    reports: list[str] = []
    for shard in shards:
        check_shard(shard)
        runs.append({name: value for name, value in read_run(shard).items() if name not in _OWN})
        try:
            reports.append(report_path(shard).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{shard}: its report is missing or damaged; run that shard again") from error
    for run, shard in zip(runs[1:], shards[1:], strict=True):
        if changed := differences(runs[0], run):
            raise OutputError(f"{output}: {shards[0].name} and {shard.name} are of different runs ({changed})")
    if others := [shard.name for shard, report in zip(shards, reports, strict=True) if report != reports[0]]:
        raise OutputError(f"{output}: {shards[0].name} and {others[0]} have other reports; run them again")
    lines = [line.split("\t") for line in reports[0].splitlines()[1:]]
    failed = sum(bool(line[0]) for line in lines)
    models = runs[0].pop("models", {})
    run = {**runs[0], **failed_rows(failed), "models": models, PLOT: None}
    check_output(output, run, lambda: models, overwrite=overwrite)
    join_tables(output, shards, Beside(REPORT, lines, run))
    return MergedScores(len(shards), failed, len(lines))
