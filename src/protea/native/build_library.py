"""Build the native library from the C++ files of this folder; also a program.

``kernels.cpp`` is compiled once for each instruction set of a platform, as ``PROTEA_SET``. ``library.cpp``, which
chooses among them, is compiled for every processor of the platform; it sees ``PROTEA_SETS(X)``, which is
``X(avx512) X(avx2)`` and so on, the best first. A file of facts lies beside the library: the hash of the sources, so
that a library of older sources is never used, and the hash of the library, so that a damaged file is never loaded.

The file uses the standard library alone and imports nothing of this package, because the installation runs it too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
FLAGS: Final = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC"),
    *("-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-g0"),
)
COMPILERS: Final = ("c++", "g++", "clang++")
NOT_BUILT: Final = "protea: the native library was not built; Protea works without it, more slowly"
SECONDS: Final = 600.0
"""Limit for one run of the compiler."""

_AVX2: Final = ("-mavx2", "-mfma")
_AVX512: Final = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


@dataclass(frozen=True)
class Target:
    """A platform: its instruction sets with their flags, the best first, and its names elsewhere."""

    name: str
    sets: Mapping[str, Sequence[str]]
    zig: str
    wheel: str

    @property
    def library(self) -> str:
        """The file name of the library."""
        return f"library-{self.name}.so"

    @property
    def local_wheel(self) -> str:
        """The platform in the name of a wheel that is built on this machine for itself."""
        return self.wheel if self.name.startswith("darwin") else self.name.replace("-", "_")

    @property
    def facts(self) -> str:
        """The file name of the facts about the library."""
        return f"library-{self.name}.json"


TARGETS: Final = (
    Target(
        "linux-x86_64",
        {
            "avx512bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
            "avx512vnni": (*_AVX512, "-mavx512vnni"),
            "avx512": _AVX512,
            "avx2vnni": (*_AVX2, "-mavxvnni"),
            "avx2": _AVX2,
        },
        zig="x86_64-linux-gnu.2.28",
        wheel="manylinux_2_28_x86_64",
    ),
    Target("linux-aarch64", {"neon": ()}, zig="aarch64-linux-gnu.2.28", wheel="manylinux_2_28_aarch64"),
    Target("darwin-arm64", {"neon": ()}, zig="aarch64-macos.11.0", wheel="macosx_11_0_arm64"),
)


@dataclass(frozen=True)
class Facts:
    """What is known of a library: hashes of its sources and of itself, its instruction sets, and its compiler."""

    sources: str
    library: str
    sets: list[str]
    compiler: str
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Facts:
        """Read a file of facts; ``OSError`` or ``ValueError`` if there is none or it is damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name} is damaged") from error


class BuildError(Exception):
    """The reason why there is no library, in one line."""


def find_target(name: str | None = None) -> Target:
    """The platform with a name, or the one that Python runs on; ``BuildError`` if the sources are not for it."""
    name = name or f"{sys.platform}-{platform.machine()}"
    for target in TARGETS:
        if target.name == name:
            return target
    raise BuildError(f"the native library is not for {name}, but for {', '.join(target.name for target in TARGETS)}")


def sources_hash(folder: Path = FOLDER) -> str:
    """The hash of all that a library is made from: the C++ files and this file."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h"), folder / Path(__file__).name]):
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_compiler() -> list[str]:
    """The command in ``$CXX``, the first compiler on the path, or Zig, which ``pip install ziglang`` brings."""
    wanted = wanted_compiler()
    for name, *arguments in [wanted] if wanted else [[name] for name in COMPILERS]:
        program = shutil.which(name)
        if program is not None:
            return [program, *arguments]
    if wanted:
        raise BuildError(
            f"CXX={os.environ['CXX']}: there is no program {wanted[0]} on the path; correct CXX or unset it"
        )
    if zig := _find_zig():
        return zig
    raise BuildError(f"there is no C++ compiler: no {', '.join(COMPILERS)} on the path")


def wanted_compiler() -> list[str]:
    """The command in ``$CXX``, if there is one."""
    command = os.environ.get("CXX", "")
    try:
        return shlex.split(command)
    except ValueError as error:
        raise BuildError(f"CXX={command}: {error}; correct CXX or unset it") from error


def find_cross_compiler() -> list[str]:
    """Zig, which compiles for every platform and for old versions of glibc: from ``$CXX``, or where it is installed."""
    wanted = wanted_compiler()
    if zig := wanted if wanted and _is_zig(wanted) else _find_zig():
        return zig
    raise BuildError("a library for a named platform needs Zig, which `pip install ziglang` brings")


def _find_zig() -> list[str] | None:
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    program = shutil.which("zig")
    return [program, "c++"] if program else None


def _is_zig(command: list[str]) -> bool:
    return "ziglang" in command or Path(command[0]).stem == "zig"


def build(target: Target, to: Path, command: list[str], *, sources: Path = FOLDER) -> Facts:
    """Build the library for a platform into a folder; only Zig compiles for another platform than this machine's.

    An instruction set that the compiler does not know is left out. Raises ``BuildError`` with the reason.
    """
    compiler = _run([*command, "--version"]).partition("\n")[0].strip()
    if _is_zig(command):
        command = [*command, "-target", target.zig, "-fno-sanitize=undefined"]
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=to) as scratch:
            sets, left_out = _known_sets(target, command, Path(scratch))
            library = _compile(sets, target, command, sources, Path(scratch))
            facts = Facts(sources_hash(sources), file_hash(library), list(sets), compiler, left_out)
            described = Path(scratch, target.facts)
            described.write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
            library.replace(to / target.library)
            described.replace(to / target.facts)
    except OSError as error:
        raise BuildError(f"{error.filename or to}: {error.strerror or error}") from error
    return facts


def _known_sets(target: Target, command: list[str], scratch: Path) -> tuple[dict[str, Sequence[str]], dict[str, str]]:
    """The instruction sets that the compiler knows, and why it does not know the others."""
    empty = scratch / "empty.cpp"
    empty.touch()
    known, left_out = dict(target.sets), {}
    for name, flags in target.sets.items():
        try:
            _run([*command, *FLAGS, *flags, "-c", str(empty), "-o", str(scratch / "empty.o")])
        except BuildError as error:
            left_out[name] = str(error)
            del known[name]
    if not known:
        raise BuildError(next(iter(left_out.values())))
    return known, left_out


def _compile(
    sets: Mapping[str, Sequence[str]], target: Target, command: list[str], sources: Path, scratch: Path
) -> Path:
    """Compile all parts, several at a time, and link them. The same compiler gives the same bytes every time."""
    every = f"-DPROTEA_SETS(X)={' '.join(f'X({name})' for name in sets)}"
    parts: dict[str, tuple[str, Sequence[str]]] = {"library": ("library.cpp", (every,))}
    for name, flags in sets.items():
        parts[name] = ("kernels.cpp", (*flags, f"-DPROTEA_SET={name}"))

    def compile_part(name: str) -> str:
        source, flags = parts[name]
        # The folder's own name for the file, not its path: paths would end up in the library.
        _run([*command, *FLAGS, *flags, "-c", source, "-o", str(scratch / f"{name}.o")], folder=sources)
        return f"{name}.o"

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_part, parts))
    # Nothing of C++'s own library is used, so that no library is needed but C's.
    needed = ["-s", "-nostdlib++"] if _is_zig(command) else [] if target.name == "darwin-arm64" else ["-Wl,--as-needed"]
    _run([*command, "-shared", *objects, *needed, "-lm", "-o", target.library], folder=scratch)
    return scratch / target.library


def _run(command: list[str], folder: Path | None = None) -> str:
    """The output of a compiler; ``BuildError`` if it does not start, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {command[0]} does not run: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"the C++ compiler {command[0]} failed: {first.strip()}")
    return done.stdout


def is_current(target: Target, folder: Path = FOLDER) -> bool:
    """Whether a folder holds an undamaged library of the sources beside this file."""
    try:
        facts = Facts.read(folder / target.facts)
        return facts.sources == sources_hash() and facts.library == file_hash(folder / target.library)
    except (OSError, ValueError):
        return False


def build_named(name: str | None, to: Path) -> Facts:
    """Build the library for a named platform, or for this machine with the compiler that it has."""
    return build(find_target(name), to, find_cross_compiler() if name else find_compiler())


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the library for this machine, unless it is there, or for a named platform."""
    parser = argparse.ArgumentParser(prog="build_library", description="Build Protea's native library.")
    parser.add_argument("--target", metavar="NAME", help="Platform, as linux-aarch64; needs Zig (pip install ziglang).")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="DIR", help="Folder that receives the library.")
    parser.add_argument("--force", action="store_true", help="Build the library even if it is there.")
    options = parser.parse_args(arguments)
    try:
        if not options.target and not options.force and is_current(find_target(), options.to):
            return 0
        facts = build_named(options.target, options.to)
    except BuildError as error:
        print(f"{NOT_BUILT}: {error}", file=sys.stderr)
        return 1
    print(f"protea: the native library is built: {', '.join(facts.sets)}; {facts.compiler}")
    for name, reason in facts.left_out.items():
        print(f"protea: the native library lacks {name}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
