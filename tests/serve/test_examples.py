"""The files in ``examples/serve``: their commands are read by Protea, the unit by systemd, the rest by hand."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from protea.cli import application

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "examples/serve/Dockerfile").read_text()
UNIT = ROOT / "examples/serve/protea.service"
SYSTEMD = shutil.which("systemd-analyze")


def options_of(words: list[str]) -> dict[str, Any]:
    """What ``protea serve`` reads from a command line."""
    assert Path(words[0]).name == "protea"
    assert words[1] == "serve"
    command = typer.main.get_command(application("serve")).commands["serve"]  # type: ignore[attr-defined]
    options: dict[str, Any] = command.make_context("serve", words[2:]).params
    return options


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser["Service"]


def test_the_commands_are_those_of_protea() -> None:
    entry = re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    assert entry is not None
    options = options_of(json.loads(entry[1]))
    assert (options["host"], str(options["api_key_file"]), str(options["jobs"])) == (
        "0.0.0.0",
        "/keys.txt",
        "/data/jobs",
    )
    options = options_of(unit()["ExecStart"].split())
    assert str(options["jobs"]) == "/var/lib/protea/jobs"
    # A service that ends answers what it took, for as long as that may take.
    assert int(unit()["TimeoutStopSec"]) > options["timeout"] + 5


def test_the_image_has_the_extra_and_a_compiler() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"/src\[(\w+)\]", DOCKERFILE)) <= set(extras)
    assert "g++" in DOCKERFILE
    known = {"FROM", "RUN", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT"}
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    assert {line.split()[0] for line in lines if line and not line.startswith("#")} <= known
    for line in lines:
        if line.startswith("RUN "):
            subprocess.run(["bash", "-n", "-c", line.removeprefix("RUN ")], check=True)


@pytest.mark.skipif(SYSTEMD is None, reason="needs systemd-analyze")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    # The program must exist where systemd looks at the unit.
    text = UNIT.read_text().replace("/opt/protea/bin/protea", "/bin/true")
    (tmp_path / "protea.service").write_text(text)
    done = subprocess.run(
        [str(SYSTEMD), "verify", str(tmp_path / "protea.service")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
