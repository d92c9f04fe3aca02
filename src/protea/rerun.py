"""A finished command given again: what its record must hold, and the comparison with what the command would record.

The record is the run file of a table, the manifest of a store, or ``contact-head.json``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from protea.errors import FinishedError, OutputError, PartlyFailedError
from protea.journal import REFUSED, complete, differences, leaves, read_finished
from protea.letters import ReportRow
from protea.output import WRITTEN, measured, read_run, report_path, write_run

INPUT: Final = "input"
FAILED: Final = "failed"
PLOT: Final = "plot"
"""Names in records of runs: of the ``fingerprint`` of all input files; of what made the command fail, in words,
although it wrote the output; and of the path of the picture that it drew, if any."""

REMOVE: Final = "remove it or choose another name"
_VARYING: Final = ("version", "torch", "computed_on", "threads", FAILED, PLOT, WRITTEN)
"""What may differ between two runs of the same command."""
_FILES: Final = ("inputs", "proteins", "table", "folder")
"""Settings that name input files, whose content counts."""


def end_finished(
    output: Path,
    recorded: Mapping[str, Any],
    wanted: Mapping[str, Any],
    advice: str = REFUSED,
    files: Iterable[str] = _FILES,
) -> NoReturn:
    """End a command whose output exists: ``FinishedError`` if the same command wrote it, else ``OutputError``.

    It is a ``PartlyFailedError`` if the same command wrote the output and failed in part.

    ``wanted`` is what the run would record, as plain values: all that the output depends on, and ``INPUT``; settings
    called as in ``files`` name its files. ``WRITTEN`` is recorded of the output, or of each file in a folder.
    """
    plot = wanted.get(PLOT)
    old, new = (_comparable(values, set(files)) for values in (recorded, wanted))
    if wanted[INPUT] is None:
        raise OutputError(f"{output}: exists already; the input is missing or a pipe, so it is not compared; {advice}")
    # A setting that only one of the two has, such as a seed, follows from another one that differs.
    shared = [name for name in old if name in new]
    if any(old[name] != new[name] for name in shared):
        old, new = ({name: values[name] for name in shared} for values in (old, new))
    check_same(output, old, new, advice)
    written = recorded.get(WRITTEN) or {}
    for part, known in (written if written and output.is_dir() else {"": written}).items():
        check_intact(output, known, advice, part)
    if plot is not None and (plot != recorded.get(PLOT) or not Path(plot).exists()):
        raise OutputError(f"{plot}: was not drawn with {output}, or is gone; pass --overwrite to make both")
    if reason := recorded.get(FAILED):
        report = report_path(output)
        see = report if report.exists() else output
        raise PartlyFailedError(f"{output}: the same command wrote it before and failed in part: {reason}; see {see}")
    raise FinishedError(complete(output))


def check_finished(output: Path, wanted: Mapping[str, Any], advice: str = REFUSED) -> dict[str, Any]:
    """The run file of a finished output, if the output is what a run with the ``wanted`` settings would write.

    ``wanted`` names what the contents depend on: options, the SHA-256 of weights, a fingerprint of the input. The run
    file holds them at its top or under ``provenance``. An ``OutputError`` says what differs, or which file is missing.
    """
    recorded = read_finished(output)
    inner = recorded.get("provenance")
    old = {**(inner if isinstance(inner, dict) else {}), **recorded}
    check_same(output, {name: old[name] for name in wanted if name in old}, wanted, advice)
    return recorded


def check_intact(output: Path, known: Mapping[str, Any], advice: str = REFUSED, part: str = "") -> None:
    """Refuse a finished output if it, or a file in it, is not what ``measured`` said of it when it was written."""
    path = output / part
    now = measured(path, hashed="sha256" in known) if path.exists() else {}
    if now != known:
        size, before = (f"{values['bytes']:,} bytes" if values else "nothing" for values in (now, known))
        fault = "another SHA-256" if size == before else f"{size} instead of {before}"
        fault = f"{part}: {fault}" if part else fault
        raise OutputError(f"{output}: exists already and is damaged, or not what the run wrote ({fault}); {advice}")


def check_same(output: Path, old: Mapping[str, Any], new: Mapping[str, Any], advice: str) -> None:
    """Refuse an output of another run; the error says what differs, and ends with the ``advice``."""
    if changed := differences(old, new):
        raise OutputError(f"{output}: exists already, of another run ({changed}); {advice}")


def _comparable(values: Mapping[str, Any], files: Container[str]) -> dict[str, Any]:
    """What two runs must share: settings by their values, and of names of files only how many there are."""
    flat = leaves(values, _VARYING)
    named = {name: value if isinstance(value, list) else [value] for name, value in flat.items() if name in files}
    return flat | {name: len(value) - value.count(None) for name, value in named.items()}


def record_plot(output: Path | None, plot: Path) -> None:
    """Write into the run file of an output, if there is one, that its picture is complete too."""
    if output is not None:
        write_run(output, {**read_run(output), PLOT: str(plot)})


def failed(rows: Iterable[ReportRow]) -> dict[str, str]:
    """What a run file says of ``FAILED`` if a command fails because it skipped some of its input."""
    count = sum(row.what == "skipped" for row in rows)
    return {FAILED: f"it skipped some of its input ({count:,})"} if count else {}
