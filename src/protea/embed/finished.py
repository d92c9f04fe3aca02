"""Finished outputs of an earlier run: whether a run would write them again, and what an update keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from protea.embed.outputs import EmbeddingOutput
from protea.embed.prepare import EncodedRecord, Prepared, fingerprint_after
from protea.embed.settings import PROVENANCE, EmbedSettings
from protea.embed.stores import Arrays, Contents, StoredRecord, sequence_hash
from protea.errors import OutputError, ProteaError
from protea.journal import REFUSED
from protea.letters import ReportRow
from protea.output import WRITTEN
from protea.records import InputColumns, read_records
from protea.text import counted

_PLACES: Final = ("inputs", "id_column", "sequence_column", "sequences", "residues", "logits")
"""Settings that name files. The input is compared by its fingerprint, and outputs may be moved."""

_SHOWN: Final = 3  # names in a note; the report lists all


def identity(settings: EmbedSettings, model_files: Mapping[str, str], computed_in: str) -> dict[str, Any]:
    """What the arrays of a run depend on, apart from its input, as run files record it."""
    options = {name: value for name, value in settings.shown().items() if name not in _PLACES}
    return options | {"model_files": dict(model_files), "computed_in": computed_in}


def input_fingerprint(inputs: Iterable[str], columns: InputColumns) -> str:
    """The fingerprint of all records, as run files record it; reads the whole input once."""
    fingerprint = b""
    for record in read_records(inputs, columns):
        fingerprint = fingerprint_after(fingerprint, record)
    return fingerprint.hex()


def check_complete(
    outputs: Sequence[EmbeddingOutput], wanted: Mapping[str, Any], advice: str = REFUSED
) -> dict[str, Any]:
    """The provenance of finished outputs, if a run with the ``wanted`` settings would write each of them.

    Otherwise an ``OutputError`` says what differs, is missing, or is damaged; it ends with the ``advice``.
    """
    from protea.rerun import check_finished, check_intact

    for output in outputs:
        recorded = check_finished(output.path, wanted, advice)
        check_intact(output.path, recorded.pop(WRITTEN, {}))
        contents = opened(output)
        if contents.provenance != recorded or contents.layout.kinds != output.layout.kinds:
            raise OutputError(
                f"{output.path}: exists already and holds other arrays than its run file and this command say; choose "
                "another name or pass --overwrite"
            )
    return dict(recorded[PROVENANCE])


@contextmanager
def reading(path: Path, problem: str, advice: str) -> Iterator[None]:
    """Turn any error of a reader into an ``OutputError``; each format has its own exceptions for damaged files."""
    try:
        yield
    except ProteaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(f"{path}: {problem} ({reason}); {advice}") from error


def opened(output: EmbeddingOutput) -> Contents:
    """A finished output; ``OutputError`` if it is damaged."""
    with reading(output.path, "exists already and is damaged", "pass --overwrite to compute again"):
        return output.contents()


class Former:
    """The finished outputs that an update replaces, open for reading.

    Keeps about a kilobyte a record in memory; CSV and NPZ are read whole.
    """

    def __init__(self, outputs: Sequence[EmbeddingOutput]) -> None:
        self._stored: list[dict[str, tuple[StoredRecord, Callable[[], Arrays]]]] = []
        self.provenances: list[dict[str, Any]] = []
        for output in outputs:
            contents = opened(output)
            self._stored.append({record.id: (record, read) for record, read in contents.entries})
            self.provenances.append(contents.provenance[PROVENANCE])
            if not all(record.sequence_sha256 for record, _ in self._stored[-1].values()):
                raise OutputError(
                    f"{output.path}: an older version wrote it, without a hash of each sequence; --update cannot tell "
                    "which sequences changed; pass --overwrite instead to compute all again"
                )
        self._gone = dict.fromkeys(name for stored in self._stored for name in stored)
        self._new = 0
        self._changed: list[str] = []

    def marked(self, items: Iterable[Prepared]) -> Iterator[Prepared]:
        """The items, in which a record that is kept has no passes through the model, and is one token of its pack."""
        for item in items:
            yield item if item.encoded is None else item._replace(encoded=self._mark(item.encoded))

    def arrays(self, record_id: str) -> list[Arrays]:
        """The arrays of a record that is kept, for each output."""
        return [stored[record_id][1]() for stored in self._stored]

    def change(self, encoded: EncodedRecord) -> tuple[ReportRow, ...]:
        """The row of the report about a computed record: one if its sequence has changed."""
        name = encoded.record.id
        return (ReportRow(name, "recomputed", "its sequence has changed"),) if self._knows(name) else ()

    def removed(self) -> list[ReportRow]:
        """A row for each record that is no longer in the input, once all items were marked."""
        return [ReportRow(name, "removed", "no longer in the input") for name in self._gone]

    def summary(self) -> str:
        """What the update does, once all items were marked."""
        none = [] if self._changed else ["no new or changed sequences"]
        parts = [f"{counted(self._new, 'new sequence')} computed"] if self._new else none
        for what, names in (("changed and computed again", self._changed), ("no longer in the input", [*self._gone])):
            if names:
                more = ", ..." if len(names) > _SHOWN else ""
                parts.append(f"{len(names):,} {what} ({', '.join(names[:_SHOWN])}{more})")
        return f"update: {'; '.join(parts)}"

    def _mark(self, encoded: EncodedRecord) -> EncodedRecord:
        name = encoded.record.id
        self._gone.pop(name, None)
        if self._keeps(encoded):
            return replace(encoded, windows=(), tokens=1)
        if self._knows(name):
            self._changed.append(name)
        else:
            self._new += 1
        return encoded

    def _knows(self, name: str) -> bool:
        return any(name in stored for stored in self._stored)

    def _keeps(self, encoded: EncodedRecord) -> bool:
        record = encoded.record
        known = [stored[record.id][0] for stored in self._stored if record.id in stored]
        if len(known) < len(self._stored):
            return False
        current = (len(encoded.ids), encoded.truncated_from, sequence_hash(record.sequence))
        return all((old.length, old.truncated_from, old.sequence_sha256) == current for old in known)
