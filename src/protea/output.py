"""Outputs: checked early, written under another name, then renamed, with a report and a run file beside them.

At whatever moment a process is killed, an output is absent, or complete: the old one or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import yaml

from protea.errors import OutputError, ProteaWarning
from protea.letters import ReportRow
from protea.progress import SILENT, Progress
from protea.text import bytes_text, printable

REPORT_HEADER: Final = ReportRow._fields
WRITTEN: Final = "written"  # name in a run file, of what ``measured`` says of the output
_LONGEST_NAME: Final = 255 - len(".problems.tsv")
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def report_path(path: Path) -> Path:
    """The path of an output's report: ``OUT.report.tsv``."""
    return path.with_name(f"{path.name}.report.tsv")


def run_path(path: Path) -> Path:
    """The path of the settings of an output's run: ``OUT.run.yaml``."""
    return path.with_name(f"{path.name}.run.yaml")


def check_output(
    path: Path, *, overwrite: bool = False, ours: Callable[[Path], bool] | None = None, beside: bool = False
) -> None:
    """Refuse an output that cannot be written, before any work is done.

    For an output that is a folder, ``ours`` tells whether Protea may replace an existing path. With ``beside``, the
    report and the run file are checked too.
    """
    if path.name in ("", ".."):
        raise OutputError(f"{path}: does not end in the name of a file or folder; add one")
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write in the folder {path.parent}; name another one")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise OutputError(f"{path}: the name is too long; use at most {_LONGEST_NAME} bytes")
    if ours is not None and os.path.lexists(path) and (path.is_symlink() or not ours(path)):
        raise OutputError(f"{path}: exists and was not written by this command; name another folder")
    for place in (path, report_path(path), run_path(path)) if beside else (path,):
        if place.is_dir() and (ours is None or place != path):
            raise OutputError(f"{place}: is a folder; name a file")
        if os.path.lexists(place) and not overwrite:
            raise OutputError(f"{place}: exists already; choose another name or pass --overwrite")


def note_what_is_replaced(path: Path) -> None:
    """Warn of a report and a run file beside an output that does not exist; the new output brings its own."""
    for place in (report_path(path), run_path(path)):
        if os.path.lexists(place) and not os.path.lexists(path):
            warnings.warn(f"{place} is of an output that is gone; it will be replaced", ProteaWarning, stacklevel=3)


def check_space(needed: Mapping[Path, int], advice: str) -> None:
    """Refuse outputs that need more bytes than their disks have; ``advice`` says what the user can do then."""
    by_disk: Counter[int] = Counter()
    for path, size in needed.items():
        by_disk[path.parent.stat().st_dev] += size
    for path in needed:
        free, total = shutil.disk_usage(path.parent).free, by_disk[path.parent.stat().st_dev]
        if total > free:
            raise OutputError(f"{path}: needs {bytes_text(total)} more of disk, {bytes_text(free)} are free; {advice}")


@contextmanager
def staged(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write an output under another name. It gets its own name only when it is complete.

    Yields the path to write at. Files beside that path are moved just before it, so that an output always has
    them. Missing parent folders are created, and removed again if the work fails. With ``overwrite``, an existing
    output and the files beside it are replaced; an empty folder always is. What a killed process has left aside is
    removed, with a warning.
    """
    made: list[Path] = []
    aside, lock = None, None
    try:
        if not overwrite:
            _refuse_existing(target)
        made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        aside, lock = _folder_aside(target)
        yield aside / target.name
        written = sorted(aside.iterdir(), key=lambda path: path.name == target.name)
        for path in written:
            if not overwrite:
                _refuse_existing(target.parent / path.name)
        for path in written:
            put_in_place(path, target.parent / path.name)
    except OSError as error:
        raise write_failure(error, target) from error
    finally:
        if aside is not None and lock is not None:
            shutil.rmtree(aside, ignore_errors=True)
            os.close(lock)
        with suppress(OSError):  # a folder that is not empty stays
            for folder in made:
                folder.rmdir()


def _folder_aside(target: Path) -> tuple[Path, int]:
    """A new folder beside the target, locked while the descriptor is open; removes those that killed runs have left.

    An interrupt before the return leaves a folder that nobody holds, which the next run removes.
    """
    stem = os.fsencode(target.name)[:200].decode(errors="ignore")
    for number in count(1):
        folder = target.parent / f".{stem}.{number}"
        if folder.exists() and not _removed_dead(folder, target):
            continue
        with suppress(FileExistsError):  # another process has just made it
            folder.mkdir(mode=0o700)
            descriptor = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # some network disks know no locks; there, nobody removes the folder of another
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)  # another process has taken it, before it was locked, for one left behind
    raise AssertionError("numbers do not end")


def _removed_dead(folder: Path, target: Path) -> bool:
    """Remove a folder aside, if no process holds it and it has nothing in it but an output of that name."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stem = target.stem.lstrip(".")  # some formats have parts, hidden or with other endings
        if not all(path.name.lstrip(".").startswith(stem) for path in folder.iterdir()):
            return False
        shutil.rmtree(folder)
    except OSError:  # a living process holds it
        return False
    finally:
        os.close(descriptor)
    warnings.warn(f"{folder}: removed; a killed run had left it", ProteaWarning, stacklevel=5)
    return True


def put_in_place(complete: Path, path: Path) -> None:
    """Give a complete file or folder its name, in place of an older one."""
    if not path.is_dir() or path.is_symlink():
        complete.replace(path)
        return
    # A folder cannot be replaced in one step. After a kill between the two, the old one still exists, hidden.
    old = path.with_name(f".{os.fsencode(path.name)[:200].decode(errors='ignore')}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    complete.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_report(path: Path, rows: Iterable[Sequence[object]], header: Sequence[str] = REPORT_HEADER) -> None:
    """Write ``OUT.report.tsv``: one line per row, cells without tabs or control characters."""
    lines = ("\t".join(printable(str(cell)) for cell in row) for row in rows)
    report_path(path).write_text("\n".join(["\t".join(header), *lines, ""]), encoding="utf-8")


def write_run(path: Path, settings: Mapping[str, Any]) -> None:
    """Write ``OUT.run.yaml``: the settings and circumstances of the run, as plain values."""
    write_durably(run_path(path), yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def read_run(path: Path) -> dict[str, Any]:
    """The contents of ``OUT.run.yaml``; ``OutputError`` if there is none, or if it is damaged."""
    place = run_path(path)
    try:
        return dict(yaml.safe_load(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise OutputError(f"{path}: its run file {place} is missing or damaged") from error


def write_durably(path: Path, content: str | bytes) -> None:
    """Write or replace a small file; after a crash of the machine it holds the old content or the new one."""
    aside = path.with_name(f".{path.name}.unfinished")
    with aside.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_BLOCK: Final = 1 << 20  # bytes that are hashed at a time


def sha256(path: Path, progress: Progress = SILENT) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    progress.begin(f"hashing {path.name}", path.stat().st_size)
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
            progress.advance(size)
    return digest.hexdigest()


def measured(path: Path, *, hashed: bool = True) -> dict[str, Any]:
    """Size and, if ``hashed``, SHA-256 of a file, by which it is known later; of a folder, the size of its files."""
    files = path.rglob("*") if path.is_dir() else [path]
    size = {"bytes": sum(part.stat().st_size for part in files if part.is_file())}
    return size | {"sha256": sha256(path)} if hashed and path.is_file() else size


def fingerprint(paths: Iterable[str | Path]) -> str | None:
    """A hash of the contents of files, in their order; ``None`` if one is missing, or can be read only once."""
    files = [Path(path) for path in paths]
    known = all(map(os.path.isfile, files))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest() if known else None


def write_failure(error: OSError, path: Path, advice: str = "") -> OutputError:
    """The error to raise for an output that the operating system did not write; ``advice`` begins with a semicolon."""
    reason = error.strerror or " ".join(str(error).split())
    if error.errno in _DISK_FULL:
        reason += f" ({bytes_text(shutil.disk_usage(path.parent).free)} are free)"
    return OutputError(f"{path}: cannot be written: {reason}{advice}")


def _refuse_existing(path: Path) -> None:
    # A link, dangling or not, could not be replaced by a finished folder.
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise OutputError(f"{path}: exists already; remove it or choose another name")
