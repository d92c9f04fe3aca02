"""The native library: compute kernels in C++ for the instruction sets of many processors, in one file.

The installation builds it (``build_library.py``), or a wheel brings it. Without it everything works, more slowly.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Final

import torch

from protea.errors import UsageError, warn
from protea.native.build_library import FOLDER, BuildError, Facts, Target, file_hash, find_target, sources_hash

VERSION: Final = 2
"""The version of the library's interface: what ``protea_version`` returns."""

CHOICE: Final = "PROTEA_INSTRUCTION_SET"
"""An environment variable with the instruction set to use instead of the best, or ``none``."""

BUILD: Final = shlex.join([sys.executable, str(FOLDER / "build_library.py")])
"""The command that builds the library."""


class _UnusableError(Exception):
    """The library is there but must not be used, for the reason in the message."""


def library() -> ctypes.CDLL | None:
    """The library, if there is one for this machine; gives one note if it is there but damaged, foreign or too old."""
    return _loaded()[0]


def reason() -> str | None:
    """Why there is no library, in one line without the names of its functions; ``None`` if there is one."""
    return _loaded()[1]


def facts() -> Facts | None:
    """What is known of the library that ``library`` returns."""
    return Facts.read(FOLDER / find_target().facts) if library() is not None else None


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    chosen = os.environ.get(CHOICE, "")
    if chosen == "none":
        return None, f"{CHOICE}=none switches it off"
    try:
        target = find_target()
    except BuildError as error:
        return None, str(error)
    path = FOLDER / target.library
    if not path.exists():
        return None, f"it is not installed: {path} is missing; with a C++ compiler, `{BUILD}` builds it"
    try:
        found = _open(target, path)
    except _UnusableError as error:
        warn(f"the native library is not used, which costs speed: {error}; `{BUILD}` builds it again")
        return None, f"{error}; `{BUILD}` builds it again"
    sets = Facts.read(FOLDER / target.facts).sets
    if found.protea_instruction_set() is None:
        return None, f"this processor has none of the instruction sets {', '.join(sets)}"
    if chosen and found.protea_use(os.fsencode(chosen)):
        # The best last: the library stays with it.
        usable = [name for name in reversed(sets) if not found.protea_use(name.encode())][::-1]
        raise UsageError(
            f"{CHOICE}={chosen}: the native library has no such instruction set, or this processor lacks it; "
            f"leave it out, or give one of: {', '.join(usable)}, none"
        )
    return found, None


def _open(target: Target, path: Path) -> ctypes.CDLL:
    """Load the library, after a check that it is whole: a damaged one could end the process."""
    try:
        facts = Facts.read(path.with_name(target.facts))
        if facts.library != file_hash(path):
            raise _UnusableError(f"{path} is damaged or was replaced")
        if facts.sources != sources_hash(path.parent):
            raise _UnusableError(f"{path} was built from other sources than those beside it")
        found = ctypes.CDLL(str(path))
        found.protea_instruction_set.restype = ctypes.c_char_p
        version = found.protea_version()
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: it lacks a function
        raise _UnusableError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
    if version != VERSION:
        raise _UnusableError(f"{path} has version {version}, not {VERSION}")
    return found


def instruction_set() -> str | None:
    """The instruction set that the library uses on this processor."""
    found = library()
    return None if found is None else str(found.protea_instruction_set().decode())


@cache
def parallel() -> int | None:
    """The address of ``GOMP_parallel`` in PyTorch's OpenMP, or nothing if it has none.

    Threads of a second OpenMP would compete with PyTorch's for the cores.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "libomp.dylib"):
        try:
            return ctypes.cast(ctypes.CDLL(str(folder / name)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
