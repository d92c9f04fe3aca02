"""The outputs of an embedding run, and the journal of how far it is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Self
from uuid import uuid4

import numpy as np

from protea.embed.embeddings import Embedding, entropy
from protea.embed.prepare import EncodedRecord
from protea.embed.settings import EmbedSettings
from protea.embed.stores import (
    ENTROPY,
    LOG_PROBABILITIES,
    PREDICTIONS,
    RESIDUES,
    Array,
    ArrayLayout,
    Arrays,
    Contents,
    EmbeddingStore,
    State,
    StoredRecord,
    is_output_folder,
    kind_of,
    open_store,
    read_store,
    sequence_hash,
)
from protea.embed.survey import Totals
from protea.errors import NonFiniteError, OutputError, ResumeError
from protea.infer.runner import FloatArray
from protea.journal import JOURNAL, WorkFolder, damaged_journal
from protea.letters import ReportRow
from protea.models.encoder import Encoder
from protea.output import WRITTEN, check_output, measured, put_in_place, report_path, run_path, write_report, write_run
from protea.text import bytes_text, printable

_TIMES: Final = {"parquet": 2, "npz": 2, "csv": 3}
"""Bytes of disk for a byte of arrays; 1 for the other formats."""

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REPORT: Final = "report.tsv"
_OWNER: Final = "owner.json"
_FORMAT: Final = 1


@dataclass(frozen=True)
class EmbeddingOutput:
    """One file or folder that a run writes: its final place, its format and the form of its arrays."""

    path: Path
    kind: str
    layout: ArrayLayout

    def open(self, folder: Path, state: State | None) -> EmbeddingStore:
        """The store that writes this output in a work folder."""
        return open_store(self.kind, folder, self.layout, state)

    def contents(self) -> Contents:
        """The finished output, as read."""
        return read_store(self.path, self.kind)

    def bytes_for(self, totals: Totals) -> int:
        """Bytes of disk, at least. Parquet and NPZ need the space twice while their parts are joined."""
        return self.layout.bytes(totals.embedded, totals.residues) * _TIMES.get(self.kind, 1)

    def arrays(self, embedding: Embedding) -> Arrays:
        """The arrays of a record that this output stores."""
        computed = dict(embedding.pooled)
        if embedding.residues is not None:
            computed[RESIDUES] = embedding.residues
        if embedding.log_probabilities is not None:
            computed[LOG_PROBABILITIES] = embedding.log_probabilities[None]
            computed[ENTROPY] = entropy(embedding.log_probabilities)[None]
        return {kind: self._converted(computed[kind], embedding.encoded) for kind in self.layout.kinds}

    def _converted(self, array: FloatArray, encoded: EncodedRecord) -> Array:
        """An array in the stored type; ``NonFiniteError`` if a value is too large for that type."""
        if self.layout.dtype == "float32":
            return array
        with np.errstate(over="ignore"):
            narrow: Array = array.astype(self.layout.dtype)
        if not np.isfinite(narrow).all():
            raise NonFiniteError(
                f"{encoded.record.place}: values up to {np.abs(array).max():.0f} exceed float16's largest, 65,504; "
                "use --store float32"
            )
        return narrow


def outputs_of(settings: EmbedSettings, layers: tuple[int, ...], model: Encoder) -> list[EmbeddingOutput]:
    """The outputs that the settings name, the sequences' output first; one folder may serve ``-o`` and ``-r``."""
    outputs = []
    for path in settings.outputs:
        kind = kind_of(path, settings.option(path))
        compression = settings.compression if kind == "h5" else None
        kinds = settings.pool if path == settings.sequences else ()
        if path == settings.residues:
            kinds = (*kinds, RESIDUES)
        layout = ArrayLayout(kinds, layers, model.config.hidden_size, settings.store, compression)
        if path == settings.logits:
            model.require("logits")
            letters, last = model.alphabet.residues, model.config.num_hidden_layers
            layout = ArrayLayout(PREDICTIONS, (last,), len(letters), "float32", compression, letters)
        place = path if settings.shard is None else settings.shard.output(path)
        outputs.append(EmbeddingOutput(place, kind, layout))
    return outputs


def stored_record(encoded: EncodedRecord) -> StoredRecord:
    """What the outputs keep of a record beside its arrays."""
    record = encoded.record
    sha = sequence_hash(record.sequence)
    return StoredRecord(record.id, record.description, len(encoded.ids), encoded.truncated_from, sha)


def check_place(path: Path, kind: str, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    check_output(path, overwrite=overwrite, ours=is_output_folder if kind == "folder" else None)


def publish(complete: Path, output: Path, rows: Iterable[Sequence[object]], provenance: Mapping[str, Any]) -> None:
    """Give a complete output its name, once its report and its run file are beside it."""
    aside = complete.with_name(output.name)
    write_report(aside, rows)
    # Residues may take hundreds of gigabytes, and hashing them longer than computing them: the size must do.
    write_run(aside, {**provenance, WRITTEN: measured(complete, hashed=False)})
    for written in (report_path(aside), run_path(aside)):
        put_in_place(written, output.with_name(written.name))
    put_in_place(complete, output)


def run_error(error: OSError, output: Path, missing: int = 0, *, kept: bool = False) -> OutputError:
    """The error for a run that the operating system stopped.

    ``missing`` is the number of bytes still to be written, 0 if unknown; ``kept`` says whether a commit exists.
    """
    if error.errno in _FULL:
        space = "free some" if not missing else f"free {bytes_text(missing)}"
        work = "finished work is kept" if kept else "nothing was finished yet"
        return OutputError(f"{output}: the disk is full; {work}: {space} and run the same command again")
    return OutputError(f"{error.filename or output}: cannot be read or written: {error.strerror or error}")


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        groups: number of the next group.
        records: number of records before that group; ``fingerprint`` is a hash of these records, in hexadecimal.
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
    """The journal of one run, locked against others; ``plan`` and ``state`` are those of an unfinished run, if any.

    The first output's work folder holds it. It is replaced in one step at each commit, so the journal and its stores
    agree whenever the process is killed. Every folder says which run it belongs to, so that two
    runs that have one output in common cannot take each other's files. With ``restart``, what an unfinished run left is
    ignored, and removed when the new run begins.
    """

    def __init__(self, outputs: list[Path], *, restart: bool = False) -> None:
        self.plan: dict[str, Any] | None = None
        self.state: RunState | None = None
        self._run = uuid4().hex
        self._reported = 0
        with ExitStack() as undo, ExitStack() as open_files:
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
        """Store the plan of a new run, or cut the report back to the state of the unfinished run."""
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
        if owner is not None and owner["run"] != self._run:
            first_output = Path(owner["journal"]).name.removeprefix(".").removesuffix(".partial")
            raise ResumeError(
                f"{work.output}: belongs to an unfinished run of {first_output} and other outputs; finish that run "
                "first, or pass --overwrite to start again"
            )


def _owner(folder: Path) -> dict[str, str] | None:
    """The unfinished run that a work folder belongs to; ``None`` if that run has no commit yet."""
    try:
        owner: dict[str, str] = json.loads((folder / _OWNER).read_text())
        journal = json.loads((Path(owner["journal"]) / JOURNAL).read_text())
        return owner if journal["run"] == owner["run"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
