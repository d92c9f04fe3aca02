"""The compiled library: compiled into the user's cache, and loaded only if no other user could have written it."""

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
# The instructions that the source uses, as /proc/cpuinfo spells them; the compiler omits "_".
CPU_FLAGS: Final = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
# No -march=native, so that machines that share a home folder can share the file.
FLAGS: Final = (
    *("-std=c++17", "-O2", "-fno-tree-vectorize", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-w", "-mfma"),
    *(f"-m{flag.replace('_', '')}" for flag in CPU_FLAGS),
)
COMPILERS: Final = ("c++", "g++", "clang++")
_SECONDS: Final = 300.0  # the compiler usually takes three
_CPU_INFO: Final = Path("/proc/cpuinfo")


class UnavailableError(Exception):
    """The reason why there is no library, in one line."""


def load() -> ctypes.CDLL:
    """The library, compiled if it is not in the cache; ``UnavailableError`` if this machine cannot."""
    _check_machine()
    command = _compiler()
    try:
        folder = _cache_folder()
        key = hashlib.sha256(SOURCE.read_bytes())
        key.update("\0".join((*command, _run([*command, "--version"]), *FLAGS)).encode())
        path = folder / f"attention-{key.hexdigest()[:32]}.so"
        if not path.exists():
            _compile(command, path)
        with _trusted(path) as trusted:
            return ctypes.CDLL(trusted)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
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
    """The command in ``$CXX``, or the first compiler on the path."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name, *arguments in [wanted] if wanted else [[name] for name in COMPILERS]:
        program = shutil.which(name)
        if program is not None:
            return [program, *arguments]
    names = wanted[0] if wanted else ", ".join(COMPILERS)
    raise UnavailableError(f"there is no C++ compiler: no {names} on the path")


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says to ignore relative paths.
    cache = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    folder = cache / "protea" / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _compile(command: list[str], path: Path) -> None:
    """Compile under a temporary name and rename, so that several processes may compile at once."""
    handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".so.part", dir=path.parent)
    os.close(handle)
    try:
        _run([*command, *FLAGS, str(SOURCE), "-lm", "-o", name])
        Path(name).chmod(0o700)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """The output of a compiler; ``UnavailableError`` if it does not start, fails or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=_SECONDS, check=False
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
    """A path to load a file from, after a check that no other user could have written the file or its folder.

    The path leads through the opened folder, so nobody can swap the folder after the check. It ends in the file's name
    because the loader treats libraries with equal names as one.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for checked, status in ((path.parent, os.fstat(folder)), (path, os.lstat(path.name, dir_fd=folder))):
            ours = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not ours or stat.S_ISLNK(status.st_mode):
                raise UnavailableError(f"another user could have written {checked}; delete it")
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


_used: ctypes.CDLL | None = None


def use(library: ctypes.CDLL | None) -> None:
    """Set the library that attention uses in this process, or ``None``."""
    global _used  # noqa: PLW0603
    _used = library


def compiled() -> ctypes.CDLL | None:
    """The library that attention uses, if any."""
    return _used
