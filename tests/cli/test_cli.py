"""The command line as a user meets it: outputs, messages, exit codes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import protea
from protea.cli import main

FASTA = ">a first protein\nMKTAYIAKQR\n>b\nG\n>c|3/x\nACDEFGHIKLMNPQRSTVWYX\n"


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["protea", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, captured.out, captured.err)

    return command


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    return path


def fails(result: Result, code: int, *parts: str) -> None:
    """One line on standard error, no traceback, the given exit code."""
    assert result.code == code, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("protea: error: ")
    for part in parts:
        assert part in lines[0]


def test_both_outputs_in_one_pass(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    folder = model_folders["esm2"]
    result = run("embed", fasta, "-m", folder, "-o", "s.parquet", "-r", "r.h5")
    assert result.code == 0, result
    assert "s.parquet: 3 sequences x 40 values (mean)" in result.out
    assert "r.h5: 3 sequences, 32 residues x 40 values" in result.out
    assert "torch.float32, cpu" in result.err
    model = protea.load(folder, device="cpu")
    expected = model.embed(["MKTAYIAKQR", "G", "ACDEFGHIKLMNPQRSTVWYX"])
    frame = pd.read_parquet("s.parquet")
    assert frame["id"].tolist() == ["a", "b", "c|3/x"]
    assert frame["description"].tolist() == ["first protein", "", ""]
    np.testing.assert_allclose(np.stack(frame["embedding"]), [array.mean(0) for array in expected], rtol=1e-5)
    with h5py.File("r.h5") as file:
        for name, array in zip(["a", "b", "c|3%2Fx"], expected, strict=True):
            np.testing.assert_allclose(file[name][:], array, rtol=0, atol=1e-6)
        settings = json.loads(file.attrs["protea"])
    assert settings == {
        "version": protea.__version__,
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "layers": [3],
        "pool": ["mean"],
        "long": "full",
    }


def test_layers_poolings_and_compressed_input(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.fasta.gz").write_bytes(gzip.compress(FASTA.encode()))
    arguments = ("--pool", "std,bos", "--layers", "-1,0", "--token-budget", 20)
    result = run("embed", "a.fasta.gz", "-m", model_folders["esm1nv"], "-o", "s.h5", *arguments)
    assert result.code == 0, result
    with h5py.File("s.h5") as file:
        assert sorted(file) == ["a", "a@bos", "b", "b@bos", "c|3%2Fx", "c|3%2Fx@bos"]
        assert file["a"].shape == (2, 40)
        assert file.attrs["layers"].tolist() == [3, 0]


def test_truncation_is_said(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "long.fasta").write_text(">l\n" + "A" * 600 + "\n")
    result = run("embed", "long.fasta", "-m", model_folders["esm1nv"], "-o", "s.parquet", "--long", "truncate")
    assert result.code == 0
    assert "1 sequences were truncated to their first 510 residues" in result.err
    frame = pd.read_parquet("s.parquet")
    assert (frame["length"][0], frame["truncated_from"][0]) == (510, 600)


def test_overwriting_needs_leave(run: Run, fasta: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "s.parquet").write_text("precious")
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", "s.parquet")
    fails(run(*arguments), 1, "s.parquet: exists already", "--overwrite")
    assert (tmp_path / "s.parquet").read_text() == "precious"
    assert run(*arguments, "--overwrite").code == 0
    assert len(pd.read_parquet("s.parquet")) == 3


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["no records; the file is empty"]),
        (b"MKT\n", ["line 1: not FASTA"]),
        (b">a\nMKT\n>b\nMJT\n", ["bad.fasta, line 3, record 'b'", "residue 'J' at position 2", "write X"]),
        (b">a\nmkt\n", ["residue 'm' at position 1", "upper case"]),
        (b">a\nMKT*\n", ["residue '*' at position 4", "remove the stop"]),
        (b">a\n", ["record 'a': no residues"]),
        (b">a\nM\n>a\nK\n", ["line 3, record 'a': this id was used before"]),
        (b">a\xff\nM\xff\n", ["residue 'ÿ' at position 2"]),
    ],
)
def test_bad_input_stops_before_any_work(
    run: Run, model_folders: dict[str, Path], tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    (tmp_path / "bad.fasta").write_bytes(content)
    result = run("embed", "bad.fasta", "-m", model_folders["esm2"], "-o", "s.parquet", "-r", "r.h5")
    fails(result, 1, "bad.fasta", *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.fasta"]


def test_files_models_and_devices_that_are_not_there(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    folder = model_folders["esm2"]
    fails(run("embed", "absent.fasta", "-m", folder, "-o", "s.h5"), 1, "absent.fasta: no such file")
    fails(run("embed", fasta, "-o", "s.h5"), 2, "comes without a bundled model", "protea init")
    fails(run("embed", fasta, "-m", "esm2_t6_8M", "-o", "s.h5"), 2, "unknown model", "esm2_t6_8M_UR50D")
    fails(run("embed", fasta, "-m", "./absent", "-o", "s.h5"), 1, "./absent: no such folder")
    import torch

    if not torch.cuda.is_available():
        fails(run("embed", fasta, "-m", folder, "-o", "s.h5", "--device", "cuda"), 1, "'cuda' is not available")


def test_a_long_sequence_and_learned_positions(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "long.fasta").write_text(">ok\nM\n>long one\n" + "A" * 1023 + "\n")
    result = run("embed", "long.fasta", "-m", model_folders["esm1b"], "-o", "s.h5")
    fails(result, 1, "line 3, record 'long': 1023 residues", "this ESM-1b model takes 1022", "long=truncate")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["in.fasta"], "nothing to write"),
        ([], "Missing argument 'IN.fasta...'; `protea embed --help` shows what there is"),
        (["in.fasta", "--nope"], "No such option"),
        (["in.fasta", "-o", "s.csv"], "unknown suffix '.csv'"),
        (["in.fasta", "-r", "r.parquet"], "unknown suffix '.parquet'; use .h5"),
        (["in.fasta", "-o", "s.h5", "-r", "s.h5"], "-o and -r both name s.h5"),
        (["in.fasta", "-o", "s.h5", "--pool", "median"], "unknown pooling 'median'"),
        (["in.fasta", "-o", "s.h5", "--pool", "mean,mean"], "names one twice"),
        (["in.fasta", "-o", "s.h5", "--layers", "one"], "expected whole numbers"),
        (["in.fasta", "-o", "s.h5", "--layers", "9"], "layer 9 does not exist"),
        (["in.fasta", "-o", "s.h5", "--long", "cut"], "use full, truncate, error"),
        (["in.fasta", "-o", "s.h5", "--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["in.fasta", "-o", "s.h5", "--device", "tpu"], "unknown device 'tpu'"),
        (["in.fasta", "-o", "s.h5", "--token-budget", "0"], "token-budget"),
    ],
)
def test_wrong_usage(run: Run, fasta: Path, model_folders: dict[str, Path], arguments: list[str], part: str) -> None:
    fails(run("embed", *arguments, "-m", model_folders["esm2"]), 2, part)


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
    for part in ("ESM-2", "6 layers, width 320, 20 heads", "7,512,474", "float32 0.03 GB", "contacts", "sha256"):
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
    assert len(json.loads(run("info", "--list", "--json").out)) == 17
    fails(run("init", "esm2_t6_8M_UR50D", "-o", "model"), 1, "model: exists already")
    fails(run("init", "esm3", "-o", "other"), 2, "unknown model 'esm3'")
    fails(run("info", "someone/absent"), 1, "someone/absent: neither a folder nor a repository in")
    fails(run("info"), 2, "name one MODEL, or pass --list")


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


def test_version(run: Run) -> None:
    assert run("--version").out == f"protea {protea.__version__}\n"


def environment() -> dict[str, str]:
    return os.environ | {"COLUMNS": "100"}


def test_module_and_standard_input(fasta: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "protea", "embed", "-", "-m", model_folders["esm2"], "-o", tmp_path / "s.parquet"]
    done = subprocess.run(command, input=FASTA.encode(), capture_output=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "s.parquet")) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupting_leaves_nothing(model_folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "big.fasta"
    path.write_text("".join(f">r{number}\n{'MKTAYIAKQR' * 60}\n" for number in range(20_000)))
    command = [sys.executable, "-m", "protea", "embed", path, "-m", model_folders["esm2"], "-r", tmp_path / "r.h5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".r.h5.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "protea: interrupted; unfinished output was removed"
    assert [entry.name for entry in tmp_path.iterdir()] == ["big.fasta"]
