"""The command line apart from embedding: help, version, `init` and `info`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import protea
from conftest import Run, fails
from protea.cli import application


def test_a_damaged_checkpoint(run: Run, fasta: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folders["esm2"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails(run("embed", fasta, "-m", folder, "-o", "s.h5"), 1, "model.safetensors: truncated or damaged")
    fails(run("info", folder), 1, "model.safetensors: truncated or damaged")


def test_init_info_and_list(run: Run, tmp_path: Path) -> None:
    result = run("init", "esm2_t6_8M_UR50D", "-o", "model", "--seed", 5)
    assert result.code == 0
    assert "random weights (seed 5)" in result.out
    shown = run("info", "model")
    assert shown.code == 0
    limit = "1,022 residues; longer sequences are shortened, unless `protea embed --long window` or full\n"
    # Queries and keys stay in float32 on a CPU.
    memory = ("float32 0.03 GB", f"bf16-mixed {0.0153 if torch.cuda.is_available() else 0.0177} GB")
    for part in ("ESM-2", "6 layers, width 320, 20 heads", "7,512,474", *memory, limit, "contacts", "sha256"):
        assert part in shown.out
    as_json = json.loads(run("info", "model", "--json").out)
    assert as_json["parameters"] == 7_512_474
    assert as_json["sha256"]["model.safetensors"] in shown.out
    known = run("info", "esm1v_t33_650M_UR90S_1").out
    assert "1,022 residues" in known
    assert "not on this machine" in known
    listed = run("info", "--list").out
    for part in ("esm1b_t33_650M_UR50S", "652,359,094", "MIT", "esm2nv_20B", "Apache-2.0"):
        assert part in listed
    assert len(json.loads(run("info", "--list", "--json").out)) == 44
    fails(run("init", "esm2_t6_8M_UR50D", "-o", "model"), 1, "model: exists already")
    fails(run("init", "esm3", "-o", "other"), 2, "unknown model 'esm3'")
    fails(run("info", "someone/absent"), 1, "someone/absent: neither a folder nor a repository in")
    fails(run("info", "model", "--list"), 2, "name a MODEL, or pass --list")


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm1nv"])
def test_init_in_half_precision(run: Run, name: str) -> None:
    assert run("init", name, "-o", "model", "--dtype", "bfloat16").code == 0
    assert "BF16" in run("info", "model").out


@pytest.mark.parametrize("command", [[], ["embed"], ["info"], ["init"]])
def test_help(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert "Usage: protea" in result.out
    if command:
        assert f"  protea {command[0]} " in result.out.split("Examples:")[1]


def every_help(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each command with its name, subcommands included."""
    yield name, command
    for key, subcommand in getattr(command, "commands", {}).items():
        yield from every_help(subcommand, f"{name} {key}".strip())


def test_help_is_whole_at_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every help text of every option and every command is there in full."""
    monkeypatch.setenv("COLUMNS", "80")
    commands = dict(every_help(typer.main.get_command(application(None)), ""))
    assert len(commands) > 18
    for name, command in commands.items():
        shown = "".join(run(*name.split(), "--help").out.split())
        texts = [text for option in command.params if (text := getattr(option, "help", None))]
        texts += [part.help.split(". ")[0].split("\n\n")[0] for part in getattr(command, "commands", {}).values()]
        for text in texts:
            assert "".join(text.split()).rstrip(".") in shown, (name, text)


def test_version(run: Run) -> None:
    assert run("--version").out == f"protea {protea.__version__}\n"
