"""`protea doctor`: what it reports, on machines that lack things too."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import protea
from conftest import Run
from protea import doctor, limits, native
from protea.device import native_bfloat16
from protea.limits import CPUs
from protea.native import build_library


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is not loaded yet, and loading it in this test has no effect on others."""
    monkeypatch.setattr(native, "_loaded", native._loaded.__wrapped__)


def advice(report: dict[str, object]) -> dict[str, str]:
    entries = report["advice"]
    assert isinstance(entries, list)
    return {entry["what"]: entry["command"] for entry in entries}


def test_this_machine(run: Run) -> None:
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    told = json.loads(run("doctor", "--json").out)
    assert told["protea"]["version"] == protea.__version__
    assert told["pytorch"]["version"] == torch.__version__
    assert told["pytorch"]["threads"] == torch.get_num_threads()
    assert told["processor"]["cores"]["usable"] <= (os.cpu_count() or 1)
    assert told["fast"]["faster"] is native_bfloat16(torch.device(told["fast"]["device"]))
    assert told["native"]["used"] == native.instruction_set()
    assert told["native"]["reason"] == native.reason()
    for word in (protea.__version__, torch.__version__, told["processor"]["name"], "--fast", sys.executable):
        assert word in result.out


def test_versions_of_optional_packages() -> None:
    extras = doctor.examine()["extras"]
    assert "test" not in extras
    assert extras["plot"]["matplotlib"] == metadata.version("matplotlib")


def test_nothing_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    """No compiler, no library, no optional package, one of two cores."""

    def no_version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("CXX", native.CHOICE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(metadata, "version", no_version)
    monkeypatch.setattr(metadata, "requires", lambda name: ["h5py", "plotly>=6; extra == 'plot'"])
    monkeypatch.setattr(limits, "cpus", lambda: CPUs(8, 4, 2.0))
    monkeypatch.setattr(build_library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    report = doctor.examine()
    assert report["compilers"] == {}
    assert report["extras"] == {"plot": {"plotly": None}}
    found = advice(report)
    assert "ziglang" in found["there is no C++ compiler"]
    assert found["the native library is not used: computing is slower"] == native.BUILD
    assert found["OMP_NUM_THREADS=1 leaves cores unused"] == "unset OMP_NUM_THREADS"
    assert found["the part plot lacks plotly"].endswith("install 'protea[plot]'")
    assert any("mmseqs" in command for command in found.values())
    result = run("doctor")
    assert result.code == 0
    assert "2 cores for this process, 8 in the machine, 4 by affinity, 2 by the container's quota" in result.out
    assert "plotly (missing)" in result.out
    assert "is not installed: " in result.out
    assert all(f"\n  {command}\n" in result.out for command in found.values())


def test_a_damaged_library_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    try:
        target = build_library.find_target()
    except build_library.BuildError as error:
        pytest.skip(str(error))
    (tmp_path / target.library).write_bytes(b"damaged")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.delenv(native.CHOICE, raising=False)
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    assert "not used: " in result.out
    assert native.BUILD in result.out
    monkeypatch.setenv(native.CHOICE, "avx2")  # which is not why
    assert advice(doctor.examine())["the native library is not used: computing is slower"] == native.BUILD


def test_a_wrong_choice_is_reported(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv(native.CHOICE, "none")
    assert "unset PROTEA_INSTRUCTION_SET" in run("doctor").out
    if (build_library.FOLDER / build_library.find_target().library).exists():
        monkeypatch.setenv(native.CHOICE, "abacus")
        result = run("doctor")
        assert result.code == 0
        assert "PROTEA_INSTRUCTION_SET=abacus: " in result.out


def test_compilers_that_do_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", f"{broken} -m64")
    compilers = doctor.examine()["compilers"]
    assert compilers.pop(str(broken)).startswith("does not run: ")
    assert not compilers, "the builder takes no other"


@pytest.mark.parametrize("wrong", ["missing++", "'c++"])
def test_a_compiler_that_is_not_there(wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    """The builder takes no other than that in ``CXX``."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.delenv(native.CHOICE, raising=False)
    monkeypatch.setenv("CXX", wrong)
    report = doctor.examine()
    assert [*report["compilers"]] == ["CXX"]
    assert wrong in report["compilers"]["CXX"]
    assert advice(report)["CXX names no compiler"] == "unset CXX"
    result = run("doctor")
    assert result.code == 0
    assert f"CXX={wrong}: " in result.out
