"""The outputs of an embedding run: places, layouts, and the space they take."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from protea.embed.prepare import EncodedRecord
from protea.embed.settings import EmbedSettings
from protea.embed.stores import RESIDUES, Array, ArrayLayout, is_output_folder, kind_of
from protea.embed.survey import Totals
from protea.errors import NonFiniteError, OutputError
from protea.infer.runner import FloatArray
from protea.output import check_output, check_space, put_in_place, report_path, run_path, write_report, write_run
from protea.text import bytes_text

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class EmbeddingOutput:
    """One file or folder that a run writes.

    Attributes:
        path: its final place.
        kind: its format.
        layout: kinds, layers, width and type of its arrays.
    """

    path: Path
    kind: str
    layout: ArrayLayout

    def bytes_for(self, totals: Totals) -> int:
        """Bytes of disk, at least. Parquet needs the space twice while its parts are joined."""
        return self.layout.bytes(totals.embedded, totals.residues) * (2 if self.kind == "parquet" else 1)

    def converted(self, array: FloatArray, encoded: EncodedRecord) -> Array:
        """An array in the stored type.

        Raises:
            NonFiniteError: a value is too large for that type.
        """
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


def outputs_of(settings: EmbedSettings, layers: tuple[int, ...], width: int) -> list[EmbeddingOutput]:
    """The outputs that the settings name, the sequences' output first; one folder may serve both.

    Raises:
        UsageError: a suffix names no format.
    """
    outputs = []
    for path in settings.outputs:
        kind = kind_of(path, "-o" if path == settings.sequences else "-r")
        kinds = settings.pool if path == settings.sequences else ()
        if path == settings.residues:
            kinds = (*kinds, RESIDUES)
        compression = settings.compression if kind == "h5" else None
        place = path if settings.shard is None else settings.shard.output(path)
        outputs.append(EmbeddingOutput(place, kind, ArrayLayout(kinds, layers, width, settings.store, compression)))
    return outputs


def check_place(path: Path, kind: str, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        OutputError: it cannot be written there.
    """
    check_output(path, overwrite=overwrite, ours=is_output_folder if kind == "folder" else None)


def check_space_left(outputs: Iterable[EmbeddingOutput], total: Totals, done: Totals) -> None:
    """Compare the space for what is still to be written with the free space.

    Raises:
        OutputError: it does not fit.
    """
    needed = {output.path: output.bytes_for(total) - output.bytes_for(done) for output in outputs}
    check_space(needed, "free some, write elsewhere, or pass --store float16")


def publish(complete: Path, output: Path, rows: Iterable[Sequence[object]], provenance: Mapping[str, Any]) -> None:
    """Give a complete output its name, once its report and its run file are beside it."""
    aside = complete.with_name(output.name)
    write_report(aside, rows)
    write_run(aside, provenance)
    for written in (report_path(aside), run_path(aside)):
        put_in_place(written, output.with_name(written.name))
    put_in_place(complete, output)


def run_error(error: OSError, output: Path, missing: int | None = None, *, kept: bool = False) -> OutputError:
    """The message for a run that the operating system stopped.

    Args:
        error: as raised.
        output: what was being written.
        missing: bytes still to be written; ``None`` if unknown.
        kept: whether a commit exists to continue from.
    """
    if error.errno in _FULL:
        space = "free some" if missing is None else f"free {bytes_text(missing)}"
        work = "finished work is kept" if kept else "nothing was finished yet"
        return OutputError(f"{output}: the disk is full; {work}: {space} and run the same command again")
    return OutputError(f"{error.filename or output}: cannot be read or written: {error.strerror or error}")
