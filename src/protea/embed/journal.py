"""What an unfinished run leaves behind so that the same command goes on where it stopped.

Beside each output ``OUT`` lies a folder ``.OUT.partial`` until the output is complete. The first output's folder holds
the journal: the plan, which a resumed run follows, and how far the work is. It is replaced in one step at each commit,
so whatever moment the process is killed at, the journal and the stores it describes agree. Every folder says whose it
is, so that runs which share one output of two cannot take each other's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Self
from uuid import uuid4

from protea.disk import lock, write_durably
from protea.embed.prepare import Note
from protea.embed.survey import Totals
from protea.errors import ResumeError

JOURNAL: Final = "journal.json"
_REPORT: Final = "report.tsv"
_LOCK: Final = "lock"
_OWNER: Final = "owner.json"
_FORMAT: Final = 1
_NO_PLAN: Final = "nothing"


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        groups: number of the group to go on with.
        records: records read from the input up to there.
        fingerprint: of those records, in hexadecimal.
        totals: counts so far.
        stores: what each store needs to go on.
        finished: all is written; only moving into place may be left.
    """

    groups: int
    records: int = 0
    fingerprint: str = ""
    totals: Totals = field(default_factory=Totals)
    stores: tuple[dict[str, Any], ...] = ()
    finished: bool = False


def work_folder(output: Path) -> Path:
    """Where an unfinished output is worked on."""
    return output.with_name(f".{output.name}.partial")


class Journal:
    """The journal of one run, locked against others.

    Args:
        outputs: what the run writes; the journal lies with the first.
        anew: take no notice of what an unfinished run left, and clear it away once the new one begins.

    Attributes:
        plan: of the unfinished run found, or ``None``.
        progress: of the unfinished run found, or ``None``.

    Raises:
        ResumeError: another process is at work on one of the outputs, an unfinished run of other outputs has left
            one of them, or the journal cannot be read.
        OSError: a folder cannot be written.
    """

    def __init__(self, outputs: list[Path], *, anew: bool = False) -> None:
        self.folders = [work_folder(output) for output in outputs]
        self.plan: dict[str, Any] | None = None
        self.progress: RunState | None = None
        self._run = uuid4().hex
        self._reported = 0
        with ExitStack() as undo, ExitStack() as locks:
            self._locks = locks
            for folder, output in zip(self.folders, outputs, strict=True):
                if not folder.exists():
                    folder.mkdir()
                    undo.callback(shutil.rmtree, folder, ignore_errors=True)
                self._lock(folder, output)
            path = self.folders[0] / JOURNAL
            if not anew:
                if path.exists():
                    self._read(path, outputs[0])
                self._check_owners(outputs)
            self._report: BinaryIO = self._locks.enter_context((self.folders[0] / _REPORT).open("ab"))
            self._undo, self._locks = undo.pop_all(), locks.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock; what this run created and nobody can go on from is removed."""
        self._locks.close()
        self._undo.close()

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Note the plan of a new run, or cut the report to where the unfinished one stands.

        Raises:
            ResumeError: a folder of the unfinished run is gone.
        """
        for folder in self.folders:
            if self.progress is not None and _owner(folder) is None:
                raise ResumeError(
                    f"{folder}: what an unfinished run had written is gone; pass --overwrite to start anew"
                )
        self._undo.pop_all()
        if self.progress is None:
            self.plan = dict(plan)
            self._clear()
            for folder in self.folders:
                self._undo.callback(shutil.rmtree, folder, ignore_errors=True)
                owner = {"run": self._run, "journal": str(self.folders[0].resolve())}
                (folder / _OWNER).write_text(json.dumps(owner))
            self._report = self._locks.enter_context((self.folders[0] / _REPORT).open("ab"))
        self._report.truncate(self._reported)

    def note(self, notes: tuple[Note, ...]) -> None:
        """Add lines to the report."""
        lines = ("\t".join(map(_field, note)) + "\n" for note in notes)
        self._report.write("".join(lines).encode())

    def commit(self, progress: RunState) -> None:
        """Note how far the run is, once the stores have committed."""
        self._report.flush()
        os.fsync(self._report.fileno())
        size = os.fstat(self._report.fileno()).st_size
        entry = {"format": _FORMAT, "run": self._run, "plan": self.plan, "report": size, "progress": asdict(progress)}
        write_durably(self.folders[0] / JOURNAL, json.dumps(entry))
        self.progress = progress
        self._undo.pop_all()

    def report(self) -> bytes:
        """The report so far, without its header."""
        self._report.flush()
        return (self.folders[0] / _REPORT).read_bytes()

    def remove(self) -> None:
        """Remove the work folders, the journal's last."""
        for folder in reversed(self.folders):
            shutil.rmtree(folder, ignore_errors=True)

    def _lock(self, folder: Path, output: Path) -> None:
        try:
            self._locks.enter_context(lock(folder / _LOCK))
        except BlockingIOError as error:
            raise ResumeError(
                f"{output}: another run is writing it; wait for that one, or name another output"
            ) from error

    def _clear(self) -> None:
        for folder in self.folders:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()

    def _check_owners(self, outputs: list[Path]) -> None:
        """See that no folder is of a run with another journal."""
        for folder, output in zip(self.folders, outputs, strict=True):
            owner = _owner(folder)
            if owner is not None and owner.run != self._run:
                other = owner.journal.name.removeprefix(".").removesuffix(".partial")
                raise ResumeError(
                    f"{output}: belongs to an unfinished run of {other} and other outputs; finish that one first, "
                    "or pass --overwrite to start anew"
                )

    def _read(self, path: Path, output: Path) -> None:
        try:
            entry = json.loads(path.read_text())
            known = entry["progress"]
            if entry["format"] != _FORMAT:
                raise ValueError(f"format {entry['format']}")
            self._run, self.plan, self._reported = entry["run"], entry["plan"], entry["report"]
            self.progress = RunState(**{**known, "totals": Totals(**known["totals"]), "stores": tuple(known["stores"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{output}: the journal of an unfinished run, {path}, cannot be read ({error}); "
                "pass --overwrite to start anew"
            ) from error


class _Owner(NamedTuple):
    run: str
    journal: Path


def _owner(folder: Path) -> _Owner | None:
    """The unfinished run that a work folder belongs to; ``None`` if it never came to its first commit."""
    try:
        noted = json.loads((folder / _OWNER).read_text())
        owner = _Owner(noted["run"], Path(noted["journal"]))
        journal = json.loads((owner.journal / JOURNAL).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return owner if journal.get("run") == owner.run else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two plans, as in ``dtype float32 -> bfloat16; long truncate -> window``."""
    names = [name for name in {**old, **new} if old.get(name, _NO_PLAN) != new.get(name, _NO_PLAN)]
    return "; ".join(f"{name} {_shown(old, name)} -> {_shown(new, name)}" for name in names)


def _shown(plan: Mapping[str, Any], name: str) -> str:
    value = plan.get(name, _NO_PLAN)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _field(text: str) -> str:
    """Text that cannot break a line or a column of the report: control characters become escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
