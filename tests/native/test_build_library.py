"""The builder of the native library: what it compiles, its facts, and compilers that are missing, old or broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from messages import check_message
from protea.native import build_library
from protea.native.build_library import TARGETS, BuildError, Facts, Target

X86 = TARGETS[0]

KERNELS = """
#define JOIN(a, b) a##b
#define EXPAND(a, b) JOIN(a, b)
#define STRING(x) #x
#define TEXT(x) STRING(x)
extern "C" const char* const EXPAND(name_of_, PROTEA_SET);
extern "C" const char* const EXPAND(name_of_, PROTEA_SET) = TEXT(PROTEA_SET);
"""
LIBRARY = """
#define DECLARE(set) extern "C" const char* const name_of_##set;
#define NAME(set) name_of_##set,
PROTEA_SETS(DECLARE)
extern "C" __attribute__((visibility("default"))) const char* name(int i) {
    const char* const names[] = {PROTEA_SETS(NAME) ""};
    return names[i];
}
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A library of two files whose function gives the names of the instruction sets."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "kernels.cpp").write_text(KERNELS)
    (folder / "library.cpp").write_text(LIBRARY)
    return folder


@pytest.fixture
def to(tmp_path: Path) -> Path:
    folder = tmp_path / "to"
    folder.mkdir()
    return folder


def machine() -> Target:
    try:
        return build_library.find_target()
    except BuildError as error:
        pytest.skip(str(error))


def compiler() -> list[str]:
    try:
        return build_library.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def script(folder: Path, does: str) -> str:
    """A program in the place of a compiler; it should write to ``$out``."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\nfor out; do :; done\n[ "$out" = --version ] && {{ echo 1.0; exit; }}\n{does}\n')
    path.chmod(0o700)
    return str(path)


def names(library: Path, count: int) -> list[str]:
    code = (
        f"import ctypes; f = ctypes.CDLL({str(library)!r}).name; f.restype = ctypes.c_char_p\n"
        f"print(*(f(i).decode() for i in range({count})))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_every_set_is_compiled_and_known(sources: Path, to: Path) -> None:
    target = machine()
    facts = build_library.build(target, to, compiler(), sources=sources)
    assert {path.name for path in to.iterdir()} == {target.library, target.facts}
    assert facts == Facts.read(to / target.facts)
    assert [*facts.sets, *facts.left_out] == [*target.sets] or facts.left_out
    assert names(to / target.library, len(facts.sets)) == facts.sets
    assert facts.sources == build_library.sources_hash(sources)
    assert facts.library == build_library.file_hash(to / target.library)


def test_the_same_sources_give_the_same_bytes(sources: Path, to: Path, tmp_path: Path) -> None:
    """Two processes may then build at once: whichever file comes last, the hashes fit."""
    again = tmp_path / "again"
    again.mkdir()
    moved = shutil.copytree(sources, tmp_path / "moved")
    first, second = (
        build_library.build(machine(), folder, compiler(), sources=source)
        for folder, source in ((to, sources), (again, moved))
    )
    assert first == second


def test_the_hash_is_of_every_source(sources: Path) -> None:
    hashes = {build_library.sources_hash(sources)}
    for name in ("kernels.cpp", "library.cpp", "kernels.h", "build_library.py"):
        with (sources / name).open("a") as file:
            file.write("\n// changed\n")
        hashes.add(build_library.sources_hash(sources))
    (sources / "kernels.h").rename(sources / "other.h")
    hashes.add(build_library.sources_hash(sources))
    assert len(hashes) == 6
    (sources / "notes.txt").write_text("not a source")
    assert build_library.sources_hash(sources) in hashes


def test_sets_that_the_compiler_does_not_know_are_left_out(sources: Path, to: Path, tmp_path: Path) -> None:
    """An old compiler does not know the newest instructions."""
    if machine() is not X86:
        pytest.skip("the instruction sets of x86-64")
    real = " ".join(compiler())
    old = script(
        tmp_path,
        f'case "$*" in *bf16*) echo "error: unknown option \'-mavx512bf16\'" >&2; exit 1;; esac\nexec {real} "$@"',
    )
    facts = build_library.build(X86, to, [old], sources=sources)
    assert facts.sets == [name for name in X86.sets if name != "avx512bf16"]
    assert "unknown option '-mavx512bf16'" in facts.left_out["avx512bf16"]
    assert names(to / X86.library, len(facts.sets)) == facts.sets


def why_not(sources: Path, to: Path, command: str) -> str:
    before = sorted(to.iterdir())
    with pytest.raises(BuildError) as caught:
        build_library.build(X86, to, [command], sources=sources)
    assert "\n" not in str(caught.value)
    assert sorted(to.iterdir()) == before
    return str(caught.value)


def test_failing_compilers(sources: Path, to: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = script(tmp_path, "echo warning: hm >&2; echo 'x.cpp:1: error: no' >&2; exit 1")
    check_message("native.compiler_failed", why_not(sources, to, broken), compiler=broken)
    assert why_not(sources, to, script(tmp_path, "kill -9 $$")).endswith("failed: exit code -9")
    assert "does not run" in why_not(sources, to, str(tmp_path / "missing"))
    monkeypatch.setattr(build_library, "SECONDS", 0.1)
    assert "timed out" in why_not(sources, to, script(tmp_path, "exec sleep 10"))


def test_wrong_sources(sources: Path, to: Path) -> None:
    (sources / "kernels.cpp").write_text("int f( {")
    with pytest.raises(BuildError, match=r"kernels\.cpp"):
        build_library.build(machine(), to, compiler(), sources=sources)
    assert not list(to.iterdir())


def test_folders_that_cannot_be_written(sources: Path, tmp_path: Path) -> None:
    for to in (tmp_path / "missing", sources / "kernels.cpp"):
        with pytest.raises(BuildError, match=to.name):
            build_library.build(machine(), to, [script(tmp_path, "exit 1")], sources=sources)


def test_compilers_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_library, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError) as caught:
        build_library.find_compiler()
    check_message("native.no_compiler", caught.value)
    with pytest.raises(BuildError, match="needs Zig"):
        build_library.find_cross_compiler()
    for name in ("zig", "clang++", "c++"):
        (tmp_path / name).touch(mode=0o700)
        assert build_library.find_compiler()[0] == str(tmp_path / name)
    assert build_library.find_cross_compiler() == [str(tmp_path / "zig"), "c++"]
    monkeypatch.setattr(build_library, "find_spec", lambda name: name == "ziglang")
    assert build_library.find_cross_compiler() == [sys.executable, "-m", "ziglang", "c++"]
    monkeypatch.setenv("CXX", "clang++ -m64")
    assert build_library.find_compiler() == [str(tmp_path / "clang++"), "-m64"]
    monkeypatch.setenv("CXX", "missing++")
    with pytest.raises(BuildError) as caught:
        build_library.find_compiler()
    check_message("native.wrong_compiler", caught.value)
    monkeypatch.setenv("CXX", "'clang++")
    for find in (build_library.find_compiler, build_library.find_cross_compiler):
        with pytest.raises(BuildError, match=r"^CXX='clang\+\+: No closing quotation"):
            find()


def test_unknown_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_library.platform, "machine", lambda: "s390x")
    with pytest.raises(BuildError) as caught:
        build_library.find_target()
    check_message("native.platform", caught.value, machine=f"{sys.platform}-s390x")
    assert build_library.find_target("linux-aarch64").wheel == "manylinux_2_28_aarch64"


def test_the_program(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs without this package, builds what is missing or stale, and nothing else."""
    compiler()
    target = machine()
    program = shutil.copy(build_library.__file__, sources)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-E", str(program), *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "is built: " in done.stdout
    assert Facts.read(sources / target.facts).library == build_library.file_hash(sources / target.library)
    assert (run().stdout, run("--force").stdout) == ("", done.stdout)
    facts = json.loads((sources / target.facts).read_text())
    (sources / target.facts).write_text(json.dumps({**facts, "sources": "other"}))
    assert run().stdout == done.stdout
    (sources / target.library).write_bytes(b"damaged")
    assert run().stdout == done.stdout
    monkeypatch.setenv("CXX", "missing++")
    assert run().returncode == 0
    failed = run("--force")
    assert (failed.returncode, failed.stdout) == (1, "")
    check_message("native.not_built", failed.stderr)
    assert run().stdout == ""


def test_facts_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    for text in ("", "[]", "{}", '{"sources": "a", "more": 1}', "\x00", '"text"'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^facts\.json is damaged$"):
            Facts.read(path)
    with pytest.raises(OSError, match="missing"):
        Facts.read(tmp_path / "missing.json")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_zig_compiles_for_every_platform(target: Target, sources: Path, to: Path) -> None:
    if find_spec("ziglang") is None and shutil.which("zig") is None:
        pytest.skip("Zig is not installed: pip install ziglang")
    facts = build_library.build(target, to, build_library.find_cross_compiler(), sources=sources)
    assert facts.sets == [*target.sets]
    start = (to / target.library).read_bytes()[:20]
    if target.name.startswith("linux"):
        assert start[:4] == b"\x7fELF"
        assert int.from_bytes(start[18:20], "little") == {"x86_64": 62, "aarch64": 183}[target.name.split("-")[1]]
    else:
        assert start[:4] == bytes.fromhex("cffaedfe")
