"""The command line without embedding: `protea`, `protea info`, `protea init`, and failures of their output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def protea(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command, never with a traceback."""
    command = [sys.executable, "-m", "protea", *map(str, arguments)]
    settings = os.environ | {"HF_HUB_OFFLINE": "1"}
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": settings}
    done = subprocess.run(command, **(defaults | options), check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


def fails(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """One line on standard error and the given exit code."""
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done
    assert done.stderr.startswith("protea: error: ")
    assert message in done.stderr


def test_no_arguments_show_the_help() -> None:
    bare, asked = protea(), protea("--help")
    assert (bare.returncode, asked.returncode) == (2, 0)
    assert bare.stderr == asked.stdout
    assert asked.stdout.startswith("Usage: protea [OPTIONS] COMMAND")


def test_wrong_commands_stay_errors() -> None:
    fails(protea("embedd"), 2, "No such command 'embedd'")
    fails(protea("--nope"), 2, "No such option")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.long)])
def test_standard_output_without_room(model_folders: dict[str, Path], unbuffered: str) -> None:
    settings = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for arguments in (["--list"], [model_folders["esm2"], "--json"]):
        with Path("/dev/full").open("w") as full:
            done = protea("info", *arguments, stdout=full, env=settings)
        fails(done, 1, "reading or writing failed: No space left on device")


def test_a_reader_that_has_enough(model_folders: dict[str, Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        assert protea("info", model_folders["esm2"], stdout=pipe).stderr == ""


def test_names_that_are_too_long_for_a_path(tmp_path: Path) -> None:
    name = "x" * 300
    fails(protea("info", name), 1, "File name too long")
    fails(protea("init", "esm2_t6_8M_UR50D", "-o", tmp_path / name), 1, "File name too long")
    (tmp_path / "in.fasta").write_text(">a\nM\n")
    fails(protea("embed", tmp_path / "in.fasta", "-m", name, "-o", tmp_path / "o.h5"), 1, "File name too long")


def test_a_file_that_fails_unforeseen(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """The message names the file: here a weight file that became a folder while the command ran."""
    shutil.copytree(model_folders["esm2"], tmp_path / "model")
    code = (
        "import protea.checkpoints.summary as summary\n"
        "sha256 = summary.sha256\n"
        "summary.sha256 = lambda path, progress: sha256(path.parent)\n"
        "import protea.cli\n"
        "protea.cli.main()\n"
    )
    command = [sys.executable, "-c", code, "info", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fails(done, 1, f"{tmp_path}/model: Is a directory")
