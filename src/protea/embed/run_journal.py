"""The journal of an embedding run: its plan, its report, and how far it is.

The first output's work folder holds the journal. It is replaced in one step at each commit, so whatever moment the
process is killed at, the journal and the stores it describes agree. Every folder says which run it belongs to, so that
two runs that have one output in common cannot take each other's files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Self
from uuid import uuid4

from protea.embed.survey import Totals
from protea.errors import ResumeError
from protea.journal import JOURNAL, WorkFolder, damaged_journal
from protea.letters import ReportRow
from protea.text import printable

_REPORT: Final = "report.tsv"
_OWNER: Final = "owner.json"
_FORMAT: Final = 1


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        groups: number of the next group.
        records: records read from the input before it.
        fingerprint: of those records, in hexadecimal.
        totals: counts so far.
        stores: what each store needs to continue.
        finished: whether everything is written, and only moving into place may be left.
    """

    groups: int
    records: int = 0
    fingerprint: str = ""
    totals: Totals = field(default_factory=Totals)
    stores: tuple[dict[str, Any], ...] = ()
    finished: bool = False


class RunJournal:
    """The journal of one run, locked against others.

    Args:
        outputs: what the run writes; the journal lies with the first.
        restart: ignore what an unfinished run left; it is removed when the new run begins.

    Attributes:
        plan: of the unfinished run; ``None`` if there is none.
        state: of the unfinished run; ``None`` if there is none.

    Raises:
        ResumeError: another process works on one of the outputs, one of them belongs to an unfinished run with other
            outputs, or the journal is damaged.
        OutputError: a work folder cannot be made.
    """

    def __init__(self, outputs: list[Path], *, restart: bool = False) -> None:
        self.plan: dict[str, Any] | None = None
        self.state: RunState | None = None
        self._run = uuid4().hex
        self._reported = 0
        with ExitStack() as undo, ExitStack() as open_files:
            self._open_files = open_files
            self._works: list[WorkFolder] = []
            for output in outputs:
                work = open_files.enter_context(WorkFolder(output))
                self._works.append(work)
                if work.is_new:
                    undo.callback(work.remove)
            if not restart:
                self._read()
                for work in self._works:
                    self._check_owner(work)
            self._report: BinaryIO = open_files.enter_context((self._works[0].path / _REPORT).open("ab"))
            self._undo, self._open_files = undo.pop_all(), open_files.pop_all()

    @property
    def folders(self) -> list[Path]:
        """The work folder of each output."""
        return [work.path for work in self._works]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the locks; remove new folders that hold nothing to continue from."""
        self._open_files.close()
        self._undo.close()

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Store the plan of a new run, or cut the report back to the state of the unfinished run.

        Raises:
            ResumeError: a folder of the unfinished run is missing.
        """
        for work in self._works:
            if self.state is not None and _owner(work.path) is None:
                raise ResumeError(
                    f"{work.path}: the files of an unfinished run are missing; pass --overwrite to start again"
                )
        self._undo.pop_all()
        if self.state is None:
            self.plan = dict(plan)
            for work in self._works:
                work.clear()
                self._undo.callback(work.remove)
                owner = {"run": self._run, "journal": str(self._works[0].path.resolve())}
                (work.path / _OWNER).write_text(json.dumps(owner))
            self._report = self._open_files.enter_context((self._works[0].path / _REPORT).open("ab"))
        self._report.truncate(self._reported)

    def add_rows(self, rows: Iterable[ReportRow]) -> None:
        """Add rows to the report."""
        self._report.write("".join("\t".join(map(printable, row)) + "\n" for row in rows).encode())

    def commit(self, state: RunState) -> None:
        """Store how far the run is, once the stores have committed."""
        self._report.flush()
        os.fsync(self._report.fileno())
        size = os.fstat(self._report.fileno()).st_size
        self._works[0].commit(
            {"format": _FORMAT, "run": self._run, "plan": self.plan, "report": size, "progress": asdict(state)}
        )
        self.state = state
        self._undo.pop_all()

    def rows(self) -> list[list[str]]:
        """The rows of the report so far."""
        self._report.flush()
        text = (self._works[0].path / _REPORT).read_text(encoding="utf-8")
        return [line.split("\t") for line in text.splitlines()]

    def remove(self) -> None:
        """Remove the work folders, the one with the journal last."""
        for work in reversed(self._works):
            work.remove()

    def _read(self) -> None:
        entry = self._works[0].read()
        if entry is None:
            return
        try:
            if entry["format"] != _FORMAT:
                raise ValueError(f"format {entry['format']}")
            state = entry["progress"]
            self._run, self.plan, self._reported = entry["run"], entry["plan"], entry["report"]
            self.state = RunState(**{**state, "totals": Totals(**state["totals"]), "stores": tuple(state["stores"])})
        except (ValueError, KeyError, TypeError) as error:
            raise damaged_journal(self._works[0].output, error) from error

    def _check_owner(self, work: WorkFolder) -> None:
        """Refuse a folder that belongs to a run with another journal."""
        owner = _owner(work.path)
        if owner is not None and owner.run != self._run:
            first_output = owner.journal.name.removeprefix(".").removesuffix(".partial")
            raise ResumeError(
                f"{work.output}: belongs to an unfinished run of {first_output} and other outputs; finish that run "
                "first, or pass --overwrite to start again"
            )


class _Owner(NamedTuple):
    run: str
    journal: Path


def _owner(folder: Path) -> _Owner | None:
    """The unfinished run that a work folder belongs to; ``None`` if that run has no commit yet."""
    try:
        stored = json.loads((folder / _OWNER).read_text())
        owner = _Owner(stored["run"], Path(stored["journal"]))
        journal = json.loads((owner.journal / JOURNAL).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return owner if journal.get("run") == owner.run else None
