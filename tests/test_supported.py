"""Versions of Python and PyTorch that are out of range, and commands without an optional part."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import protea
from conftest import Run, fails
from messages import check_message
from protea import supported
from protea.errors import MissingExtraError, ProteaWarning, VersionError

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def not_checked_yet() -> Iterator[None]:
    supported.check_torch.cache_clear()
    yield
    supported.check_torch.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Another version of PyTorch is installed, or none."""

    def found(name: str) -> str:
        if name == "torch" and version is not None:
            return version
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", found)


def test_the_limits_are_those_of_the_package() -> None:
    declared = next(one for one in PROJECT["dependencies"] if one.startswith("torch"))
    (major, minor), (next_major, _) = supported.OLDEST, supported.BELOW
    assert declared == f"torch>={major}.{minor},<{next_major}"
    source = Path(protea.__file__).read_text()
    oldest = tuple(map(int, re.findall(r"\d+", PROJECT["requires-python"])))
    assert f"sys.version_info < {oldest}" in source


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cpu", "2.13.0+cu130", "2.14.0.dev20261101", "2.100.1"])
def test_versions_that_are_supported(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pretend(monkeypatch, version)
    supported.check_torch()


@pytest.mark.parametrize("version", ["1.13.1", "2.0.0+cu118", "2.9.1", "2.10.0a0+git1234567"])
def test_a_pytorch_that_is_too_old(monkeypatch: pytest.MonkeyPatch, run: Run, version: str) -> None:
    pretend(monkeypatch, version)
    with pytest.raises(VersionError) as caught:
        _ = protea.load
    check_message("supported.old-torch", caught.value, version=version, python=sys.executable)
    assert protea.ProteaError  # errors can be caught without PyTorch
    fails(run("embed", "in.fasta", "-o", "out.h5"), 1, version)


def test_a_pytorch_that_is_missing(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(MissingExtraError) as caught:
        _ = protea.load
    check_message("supported.no-torch", caught.value, python=sys.executable)
    fails(run("info"), 1, "torch>=")


def test_a_pytorch_that_nobody_has_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "3.0.1+cpu")
    with pytest.warns(ProteaWarning) as told:
        _ = protea.load
    check_message("supported.new-torch", str(told[0].message), python=sys.executable)


def test_help_and_version_do_not_ask(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    pretend(monkeypatch, "1.0")
    assert run("--version").code == run("embed", "--help").code == 0


def test_a_python_that_is_too_old() -> None:
    """The package's own file, as an older Python reads it: the syntax is one that it knows."""
    source = Path(protea.__file__)
    code = f"import sys; sys.version_info = (3, 10, 1); exec(compile(open({str(source)!r}).read(), 'protea', 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Protea needs Python 3.11 or newer")


NEEDED = {
    "biotite": ["evaluate contacts structures -m model", "fit-contacts structures -o out"],
    "fastapi": ["serve"],
    "matplotlib": ["contacts in.fasta --plot map.png", "score in.fasta --scan -o s.csv --plot s.png"],
    "plotly": ["contacts in.fasta --plot map.html"],
    "ray": ["embed in.fasta -o out.h5 --ray auto"],
}
"""For each package some commands that need it."""


@pytest.mark.parametrize(("package", "words"), [(name, words) for name, every in NEEDED.items() for words in every])
def test_a_part_that_is_not_installed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, words: str
) -> None:
    """One line with the command that installs it, before anything is computed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n")
    structures = Path(__file__).parents[1] / "examples" / "structures"
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # import then fails
    arguments = words.replace("structures", str(structures)).replace("-m model", "").split()
    parts = PROJECT["optional-dependencies"].items()
    extra = next(part for part, every in parts if package in {re.split(r"[>=]", one)[0] for one in every})
    fails(run(*arguments), 1, f"protea[{extra}]", "pip --python")
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".fasta", ".tsv", ".yaml")] == []


def test_scikit_learn_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "sklearn.py").write_text("raise ImportError('no scikit-learn here')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", "import protea.sklearn"], capture_output=True, text=True, env=environment, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("protea.errors.MissingExtraError: protea.sklearn needs scikit-learn: pip --python ")
