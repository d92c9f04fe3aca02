"""The compiled library: found in the user's cache or compiled into it, never taken from anybody else.

Knows nothing of attention but the name of its source.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("attention.cpp")

CPU_FLAGS: Final = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
"""What ``/proc/cpuinfo`` calls the instructions that the source uses; the compiler spells the last without ``_``."""

FLAGS: Final = (
    *("-std=c++17", "-O2", "-fno-tree-vectorize", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-w", "-mfma"),
    *(f"-m{flag.replace('_', '')}" for flag in CPU_FLAGS),
)
"""Instructions by name rather than ``-march=native``: one file serves every machine that shares a home folder."""

COMPILERS: Final = ("c++", "g++", "clang++")

_SECONDS: Final = 300.0
"""A compiler that takes longer hangs; it needs three."""

_CPU_INFO: Final = Path("/proc/cpuinfo")


class UnavailableError(Exception):
    """Why there is no library, in one line."""


def load() -> ctypes.CDLL:
    """The library, compiled if the cache does not hold it.

    Raises:
        UnavailableError: it cannot be had on this machine.
    """
    _check_machine()
    command = _compiler()
    try:
        folder = _cache_folder()
        key = hashlib.sha256(SOURCE.read_bytes())
        key.update("\0".join((*command, _run([*command, "--version"]), *FLAGS)).encode())
        path = folder / f"attention-{key.hexdigest()[:32]}.so"
        if not path.exists():
            _compile(command, path)
        with _trusted(path) as opened:
            return ctypes.CDLL(opened)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of a user without one
        raise UnavailableError(f"compiled attention cannot be loaded: {error}") from error


def _check_machine() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"compiled attention is for Linux on x86-64, not {sys.platform} on {platform.machine()}")
    lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    present = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set[str]())
    missing = [flag for flag in CPU_FLAGS if flag not in present]
    if missing:
        raise UnavailableError(f"this processor lacks {', '.join(missing)}")


def _compiler() -> list[str]:
    """The command of ``$CXX``, else of the first compiler on the path."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for name, *arguments in [asked] if asked else [[name] for name in COMPILERS]:
        found = shutil.which(name)
        if found is not None:
            return [found, *arguments]
    raise UnavailableError(f"there is no C++ compiler: no {asked[0] if asked else ', '.join(COMPILERS)} on the path")


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    cache = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    folder = cache / "protea" / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _compile(command: list[str], path: Path) -> None:
    """Compile under another name and rename: processes that do it at once replace one another's equal files."""
    handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".so.part", dir=path.parent)
    os.close(handle)
    try:
        _run([*command, *FLAGS, str(SOURCE), "-lm", "-o", name])
        Path(name).chmod(0o700)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """What a compiler prints.

    Raises:
        UnavailableError: it cannot be started, fails or hangs.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the C++ compiler {command[0]} does not run: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise UnavailableError(f"the C++ compiler {command[0]} failed: {first.strip()}")
    return done.stdout


@contextmanager
def _trusted(path: Path) -> Iterator[str]:
    """A name under which to load a file, after checking that nobody else could have written it or its folder.

    It leads through the folder that was checked, wherever the folder's own path may lead by then. It ends in the
    file's name, which tells one build from another: the loader takes equal names for the same library.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for checked, status in ((path.parent, os.fstat(folder)), (path, os.lstat(path.name, dir_fd=folder))):
            ours = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not ours or stat.S_ISLNK(status.st_mode):
                raise UnavailableError(f"{checked} could be another user's work; delete it")
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


_used: ctypes.CDLL | None = None


def use(library: ctypes.CDLL | None) -> None:
    """Have attention use a library, or none; one switch for the process."""
    global _used  # noqa: PLW0603
    _used = library


def compiled() -> ctypes.CDLL | None:
    """The library that attention uses, if any."""
    return _used
