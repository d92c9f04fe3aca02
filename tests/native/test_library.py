"""The loader of the native library: what it loads, and files that are absent, stale, damaged or foreign."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from messages import check_message
from protea import native
from protea.errors import ProteaWarning, UsageError
from protea.native import build_library
from protea.native.build_library import BuildError, Target

LIBRARY = """
#include <cstring>
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int protea_version() { return VERSION; }
EXPORT const char* protea_instruction_set() { return NAME; }
EXPORT int protea_use(const char* name) { return strcmp(name, "baseline") != 0 && strcmp(name, "avx2") != 0; }
"""

Write = Callable[..., None]


@pytest.fixture
def target() -> Target:
    try:
        return build_library.find_target()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target) -> Iterator[Path]:
    """The folder of the package's library, empty, with nothing loaded from it yet."""
    folder = tmp_path / "native"
    folder.mkdir()
    monkeypatch.setattr(native, "FOLDER", folder)
    monkeypatch.delenv(native.CHOICE, raising=False)
    native._loaded.cache_clear()
    yield folder
    native._loaded.cache_clear()


@pytest.fixture
def write(folder: Path, target: Target) -> Write:
    """Return a function that builds a library in the folder."""

    def build(*, text: str = LIBRARY, version: int = native.VERSION, name: str = '"baseline"') -> None:
        (folder / "kernels.cpp").touch()
        (folder / "library.cpp").write_text(text.replace("VERSION", str(version)).replace("NAME", name))
        try:
            build_library.build(target, folder, build_library.find_compiler(), sources=folder)
        except BuildError as error:
            pytest.skip(str(error))

    return build


def refused(key: str, folder: Path) -> None:
    """Assert that the library is not used, with one note and the same reason."""
    for _ in range(2):  # the cache keeps nothing while warnings are errors
        with pytest.raises(ProteaWarning) as caught:
            native.library()
    path = folder / build_library.find_target().library
    check_message(f"native.{key}", str(caught.value), command=native.BUILD, path=path)
    with pytest.warns(ProteaWarning):
        assert native.library() is None
    assert native.library() is None, "a second note"
    reason = native.reason()
    assert reason is not None
    assert reason in str(caught.value)
    assert native.instruction_set() is None
    assert native.facts() is None


def test_loaded(write: Write, folder: Path, target: Target) -> None:
    write()
    assert native.reason() is None
    found = native.library()
    assert found is not None
    assert found is native.library()
    assert found.protea_version() == native.VERSION
    assert native.instruction_set() == "baseline"
    assert native.facts() == build_library.Facts.read(folder / target.facts)


def test_absent(folder: Path, target: Target) -> None:
    assert native.library() is None
    check_message("native.absent", native.reason() or "", command=native.BUILD, path=folder / target.library)


def test_another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_library.platform, "machine", lambda: "s390x")
    assert native.library() is None
    assert "is not for " in (native.reason() or "")


def test_switched_off(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setenv(native.CHOICE, "none")
    assert native.library() is None
    check_message("native.off", native.reason() or "")


def test_an_old_processor(write: Write, target: Target) -> None:
    write(name="nullptr")
    assert native.library() is None
    check_message("native.old_processor", native.reason() or "", sets=", ".join(target.sets))


def test_a_chosen_instruction_set(write: Write, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setenv(native.CHOICE, "baseline")
    assert native.instruction_set() == "baseline"
    native._loaded.cache_clear()
    monkeypatch.setenv(native.CHOICE, "abacus")
    with pytest.raises(UsageError, match="PROTEA_INSTRUCTION_SET=abacus: ") as caught:
        native.library()
    usable = [name for name in target.sets if name == "avx2"]
    assert str(caught.value).endswith(f": {', '.join(usable)}, none")


def test_stale(write: Write, folder: Path) -> None:
    write()
    (folder / "kernels.cpp").write_text("// changed\n")
    refused("stale", folder)


@pytest.mark.parametrize("kept", [0, 10, 4000])
def test_cut_short(kept: int, write: Write, folder: Path, target: Target) -> None:
    """Loading such a file could end the process."""
    write()
    path = folder / target.library
    path.write_bytes(path.read_bytes()[:kept])
    refused("damaged", folder)


def test_without_facts(write: Write, folder: Path, target: Target) -> None:
    write()
    (folder / target.facts).unlink()
    with pytest.warns(ProteaWarning, match="cannot be loaded: .*No such file"):
        assert native.library() is None


def renew_facts(folder: Path, target: Target) -> None:
    facts = json.loads((folder / target.facts).read_text())
    facts["library"] = build_library.file_hash(folder / target.library)
    facts["sources"] = build_library.sources_hash(folder)
    (folder / target.facts).write_text(json.dumps(facts))


def test_foreign(write: Write, folder: Path, target: Target) -> None:
    """A library for another processor: its ELF header names a machine that does not exist."""
    write()
    path = folder / target.library
    content = bytearray(path.read_bytes())
    content[:20] = b"\x7fELF" + b"\xff" * 16
    path.unlink()
    path.write_bytes(content)
    renew_facts(folder, target)
    with pytest.warns(ProteaWarning, match="cannot be loaded: "):
        assert native.library() is None
    native._loaded.cache_clear()
    shutil.copy(sys.executable, path)
    renew_facts(folder, target)
    with pytest.warns(ProteaWarning, match="cannot be loaded: "):
        assert native.library() is None


def test_another_version(write: Write, folder: Path) -> None:
    write(version=99)
    refused("version", folder)


def test_functions_that_are_missing(write: Write, folder: Path) -> None:
    write(text='extern "C" __attribute__((visibility("default"))) int other() { return 1; }')
    with pytest.warns(ProteaWarning, match="cannot be loaded: .*protea_instruction_set"):
        assert native.library() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable(write: Write, folder: Path, target: Target) -> None:
    write()
    (folder / target.library).chmod(0)
    with pytest.warns(ProteaWarning, match="Permission denied"):
        assert native.library() is None


def test_read_only_folders(write: Write, folder: Path) -> None:
    """Using the library writes nothing."""
    write()
    before = sorted(folder.iterdir())
    folder.chmod(0o500)
    try:
        assert native.library() is not None
    finally:
        folder.chmod(0o700)
    assert sorted(folder.iterdir()) == before


def test_the_command_line_gives_one_note(target: Target, tmp_path: Path) -> None:
    """A damaged library in a copy of the package: the command does its work."""
    package = tmp_path / "protea"
    shutil.copytree(
        Path(native.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__", "library-*")
    )
    (package / "native" / target.library).write_bytes(b"damaged")
    code = "import sys, warnings; from protea import native; native.library(); native.library()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path), native.CHOICE: ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr.count("the native library is not used") == 1


def test_the_address_of_openmp() -> None:
    if sys.platform == "linux":
        assert native.parallel()
