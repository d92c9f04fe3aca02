"""What a run writes: places, layouts, the space they take, and what lies beside them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from protea.embed.journal import work_folder
from protea.embed.prepare import EncodedRecord
from protea.embed.settings import EmbedSettings
from protea.embed.stores import RESIDUES, Array, ArrayLayout, is_output_folder, kind_of
from protea.embed.survey import Totals
from protea.errors import NonFiniteError, OutputError
from protea.infer.runner import FloatArray

REPORT_HEADER: Final = b"id\twhat\tdetail\n"

_LONGEST_NAME: Final = 255 - len(".report.tsv")

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Output:
    """One file or folder that a run writes.

    Attributes:
        path: its final place.
        kind: its format.
        layout: what its arrays look like.
    """

    path: Path
    kind: str
    layout: ArrayLayout

    def needs(self, totals: Totals) -> int:
        """Bytes of disk, at least; Parquet's parts lie beside the whole for a moment."""
        return self.layout.bytes(totals.embedded, totals.residues) * (2 if self.kind == "parquet" else 1)

    def narrowed(self, array: FloatArray, encoded: EncodedRecord) -> Array:
        """An array in the type that is stored.

        Raises:
            NonFiniteError: a number is beyond that type.
        """
        if self.layout.dtype == "float32":
            return array
        with np.errstate(over="ignore"):
            narrow: Array = array.astype(self.layout.dtype)
        if not np.isfinite(narrow).all():
            raise NonFiniteError(
                f"{encoded.record.place}: values up to {np.abs(array).max():.0f}, beyond float16's 65,504; "
                "use --store float32"
            )
        return narrow


def outputs_of(settings: EmbedSettings, layers: tuple[int, ...], width: int) -> list[Output]:
    """What the settings name, the sequences' output first; a folder may be for both.

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
        outputs.append(Output(place, kind, ArrayLayout(kinds, layers, width, settings.store, compression)))
    return outputs


def check_place(path: Path, kind: str, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        OutputError: it exists and no unfinished run is writing it; it exists and is nothing that may be replaced; its
            folder does not exist; its name is too long for what lies beside it.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; create it first")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise OutputError(f"{path}: the name is too long; {_LONGEST_NAME} bytes leave room for the report beside it")
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and kind != "folder":
        raise OutputError(f"{path}: is a folder; name a file")
    if kind == "folder" and (path.is_symlink() or not is_output_folder(path)):
        # Whatever else is there is not ours to remove, --overwrite or not.
        raise OutputError(f"{path}: exists and is no folder of embeddings; name another")
    if not work_folder(path).exists():
        refuse_existing(path, overwrite=overwrite)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Do not replace an output unasked.

    Raises:
        OutputError: it exists.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")


def check_space(outputs: list[Output], total: Totals, done: Totals) -> None:
    """Compare what is still to be written with what is free.

    Raises:
        OutputError: it will not fit.
    """
    missing: dict[int, int] = {}
    for output in outputs:
        device = output.path.parent.stat().st_dev
        missing[device] = missing.get(device, 0) + output.needs(total) - output.needs(done)
    for output in outputs:
        free = shutil.disk_usage(output.path.parent).free
        needed = missing[output.path.parent.stat().st_dev]
        if needed > free:
            raise OutputError(
                f"{output.path}: needs {size(needed)} more of disk, {size(free)} are free; free some, write elsewhere, "
                "or pass --store float16"
            )


def write_beside(output: Path, report: bytes, provenance: Mapping[str, Any]) -> None:
    """``OUT.report.tsv`` and ``OUT.run.yaml``."""
    output.with_name(f"{output.name}.report.tsv").write_bytes(REPORT_HEADER + report)
    run_file = yaml.safe_dump(dict(provenance), sort_keys=False, allow_unicode=True)
    output.with_name(f"{output.name}.run.yaml").write_text(run_file, encoding="utf-8")


def move_into_place(complete: Path, output: Path) -> None:
    """Give a complete output its name, in place of an older one."""
    if output.is_dir():
        shutil.rmtree(output)
    complete.replace(output)


def write_error(error: Exception, output: Path, missing: int | None = None, *, kept: bool = False) -> OutputError:
    """What went wrong with reading or writing, in a line.

    Args:
        error: what was raised.
        output: what was being written.
        missing: bytes that were still to be written, if known.
        kept: finished work is there to go on from.
    """
    if getattr(error, "errno", None) in _FULL:
        needed = "make room" if missing is None else f"make room for {size(missing)} more"
        work = "finished work is kept" if kept else "nothing was finished yet"
        return OutputError(f"{output}: the disk is full; {work}: {needed} and run the same command again")
    place = getattr(error, "filename", None) or output
    return OutputError(f"{place}: cannot be read or written: {getattr(error, 'strerror', None) or error}")


def size(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
