"""Write the results of a GPU run: one line of JSON for each, and one Markdown summary of all lines.

``results.jsonl`` grows by one object per line, and ``summary.md`` is written again after every line, so that both are
complete whenever the machine is taken away. In each line ``part`` names the part that wrote it, and ``kind`` is
``status`` for the end of a part, else the name of the table that the line belongs to.

Usage: python benchmarks/gpu/records.py OUT PART STATUS SECONDS BOUND [--reason TEXT | --log FILE]
       where STATUS is ok, failed, skipped or "out of time"
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
SUMMARY = "summary.md"
STATUS = "status"
STATUSES = ("ok", "failed", "skipped", "out of time")
REASON_CHARACTERS = 400

Row = dict[str, Any]


def append(out: Path, part: str, kind: str, **values: Any) -> None:
    """Add a line and write the summary again.

    Args:
        out: the folder of both files.
        part: the part that writes.
        kind: the table that the line belongs to.
        values: the results; ``None`` for values that are not known on this machine.
    """
    out.mkdir(parents=True, exist_ok=True)
    row = {"part": part, "kind": kind, **values}
    with (out / RESULTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    summarise(out)


def read(out: Path) -> list[Row]:
    """Return all lines so far."""
    path = out / RESULTS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summarise(out: Path) -> None:
    """Write the summary of all lines so far."""
    kinds: dict[str, list[Row]] = {}
    for row in read(out):
        kinds.setdefault(row["kind"], []).append(row)
    pieces = [f"# GPU run\n\nWritten {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}.\n"]
    last = sorted(kinds, key=lambda kind: kind == STATUS)
    pieces += [f"## {kind}\n\n{table(kinds[kind])}" for kind in last]
    # Two parts can write at the same time; each renames a file of its own.
    aside = out / f".{SUMMARY}.{os.getpid()}"
    aside.write_text("\n".join(pieces), encoding="utf-8")
    aside.replace(out / SUMMARY)


def table(rows: list[Row]) -> str:
    """Format rows as a Markdown table, with a column for every key that occurs."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "kind"))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(shown(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """Format a value as a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return " ".join(str(value).split()).replace("|", "\\|")


def last_line(log: Path) -> str:
    """Return the last line of a part's output that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    told = [line.strip() for line in lines if line.strip()]
    return told[-1][:REASON_CHARACTERS] if told else "no output"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("part")
    parser.add_argument("status", choices=STATUSES)
    parser.add_argument("seconds", type=float)
    parser.add_argument("bound", type=float)
    parser.add_argument("--reason")
    parser.add_argument("--log", type=Path, help="its last line is the reason")
    given = parser.parse_args()
    reason = given.reason or (last_line(given.log) if given.log else None)
    values = {"status": given.status, "seconds": given.seconds, "bound": given.bound, "reason": reason}
    append(given.out, given.part, STATUS, **values)
    print(f"{given.part}: {given.status}, {given.seconds:.0f} s of {given.bound:.0f}{f': {reason}' if reason else ''}")


if __name__ == "__main__":
    main()
