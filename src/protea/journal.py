"""Records of runs: those of an unfinished one, from which the same command continues, and those of a finished one.

Until an output ``OUT`` is complete, the folder ``.OUT.partial`` lies beside it. It is locked, so that one process at a
time works on an output. Its ``journal.json`` says how far the work is; it is replaced in one step.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self, TextIO

from protea.errors import OutputError, ResumeError
from protea.output import read_run, report_path, run_path, write_durably, write_failure

JOURNAL: Final = "journal.json"
_LOCK: Final = "lock"
_ABSENT: Final = "nothing"
_OF_MODEL: Final = re.compile(r"models (.+) (?:files (.+)|computed_in)")
_HASH: Final = re.compile("[0-9a-f]{32,}")

REFUSED: Final = "choose another name or pass --overwrite"


def lock(path: Path, output: Path) -> TextIO:
    """Open the lock file of an output. One process at a time holds it, until it closes the file or ends."""
    try:
        stream = path.open("w")
    except OSError as error:
        raise write_failure(error, output) from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise ResumeError(f"{output}: another process is writing it; wait for it, or name another output") from error
    except BaseException:
        stream.close()
        raise
    return stream


class WorkFolder:
    """The locked folder ``.OUT.partial`` of one output; a ``ResumeError`` if another process works on the output."""

    def __init__(self, output: Path) -> None:
        self.output, self.path = output, work_path(output)
        self.is_new = not self.path.exists()
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise write_failure(error, output) from error
        self._lock = lock(self.path / _LOCK, output)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; the folder stays."""
        self._lock.close()

    def read(self) -> dict[str, Any] | None:
        """The journal of an unfinished run; ``None`` if there is none."""
        path = self.path / JOURNAL
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise damaged_journal(self.output, error) from error

    def commit(self, values: Mapping[str, Any]) -> None:
        """Replace the journal."""
        write_durably(self.path / JOURNAL, json.dumps(values))

    def clear(self) -> None:
        """Remove everything in the folder but the lock."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def work_path(output: Path) -> Path:
    """The folder of an unfinished output."""
    return output.with_name(f".{output.name}.partial")


def damaged_journal(output: Path, error: Exception) -> ResumeError:
    """The message for a journal that cannot be read."""
    return ResumeError(
        f"{output}: the journal of an unfinished run, {work_path(output) / JOURNAL}, cannot be read ({error}); "
        "pass --overwrite to start again"
    )


def read_finished(output: Path) -> dict[str, Any]:
    """The run file of an output that exists; an ``OutputError`` if it or the report is missing or damaged."""
    for path in (report_path(output), run_path(output)):
        if not path.is_file():
            raise OutputError(f"{output}: exists already, without {path.name} beside it; {REFUSED}")
    return read_run(output)


def complete(output: Path) -> str:
    """What a command says of an output that is finished already."""
    return f"{output}: complete, nothing to do"


def leaves(values: Mapping[str, Any], left_out: Iterable[str] = (), prefix: str = "") -> dict[str, Any]:
    """The values, those of mappings under the names of both, as in ``models esm2 computed_in``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name not in left_out:
            inner = isinstance(value, Mapping)
            flat |= leaves(value, left_out, f"{prefix}{name} ") if inner else {f"{prefix}{name}": value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The differences of two plans, as in ``dtype float32 -> bfloat16; the input has changed``."""
    old, new = leaves(old), leaves(new)
    names = [name for name in {**old, **new} if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
    before, after = (sorted({match[1] for name in plan if (match := _OF_MODEL.fullmatch(name))}) for plan in (old, new))
    if before and after and before != after:
        names = ["models", *(name for name in names if not _OF_MODEL.fullmatch(name))]
        old, new = {**old, "models": before}, {**new, "models": after}
    return "; ".join(_difference(name, _value(old, name), _value(new, name)) for name in names)


def _difference(name: str, before: str, after: str) -> str:
    if not any(map(_HASH.fullmatch, (before, after))):
        return f"{name} {before} -> {after}"
    if name == "input":
        return "the input has changed"
    match = _OF_MODEL.fullmatch(name)
    owner = f" of the model {match[1]}" if match else ""
    return f"the weights {(match and match[2]) or name.rpartition(' ')[2]}{owner} have changed"


def _value(plan: Mapping[str, Any], name: str) -> str:
    value = plan.get(name, _ABSENT)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
