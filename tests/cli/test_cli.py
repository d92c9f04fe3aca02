"""The command line as a user meets it: outputs, messages, exit codes."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

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
    assert "s.parquet: 3 sequences, 32 residues, 40 values each (mean)" in result.out
    assert "r.h5: 3 sequences, 32 residues, 40 values each (residues)" in result.out
    assert "float32, cpu" in result.err
    model = protea.load(folder, device="cpu")
    expected = model.embed(["MKTAYIAKQR", "G", "ACDEFGHIKLMNPQRSTVWYX"])
    frame = pd.read_parquet("s.parquet")
    assert frame["id"].tolist() == ["a", "b", "c|3/x"]
    assert frame["description"].tolist() == ["first protein", "", ""]
    np.testing.assert_allclose(np.stack(frame["embedding"]), [array.mean(0) for array in expected], rtol=0, atol=1e-6)
    with h5py.File("r.h5") as file:
        for name, array in zip(["a", "b", "c|3%2Fx"], expected, strict=True):
            np.testing.assert_allclose(file[name][:], array, rtol=0, atol=1e-6)
        settings = json.loads(file.attrs["protea"])
    assert settings == yaml.safe_load(Path("r.h5.run.yaml").read_text())
    assert (settings["model"], settings["pool"], settings["long"]) == (str(folder), ["mean"], "truncate")
    happened = settings["provenance"]
    assert happened["version"] == protea.__version__
    assert happened["model_files"] == json.loads(run("info", folder, "--json").out)["sha256"]
    assert (happened["counts"]["embedded"], happened["counts"]["residues"]) == (3, 32)
    assert Path("s.parquet.report.tsv").read_text() == "id\twhat\tdetail\n"


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
    result = run("embed", "long.fasta", "-m", model_folders["esm1nv"], "-o", "s.parquet")
    assert result.code == 0
    assert "note: 1 truncated: see s.parquet.report.tsv" in result.err
    assert "l\ttruncated\tfirst 510 of 600 residues\n" in Path("s.parquet.report.tsv").read_text()
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
        (b">a\nMKT*K\n", ["residue '*' at position 4", "remove the stop"]),
        (b">a\n", ["record 'a': no residues"]),
        (b">a\nM\n>a\nK\n", ["line 3, record 'a': this id was used before"]),
        (b">a/b\nM\n>a%2Fb\nK\n", ["line 3, record 'a%2Fb': this id was used before"]),
        (b">a\xff\nM\xff\n", ["not a residue: ÿ at 2"]),
        (b">a\nMK\x00T\n", ["not a residue: \\x00 at 3"]),
        (b">\nMKT\n", ["line 1: a record without an id"]),
    ],
)
def test_bad_input_stops_before_any_work(
    run: Run, model_folders: dict[str, Path], tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    (tmp_path / "bad.fasta").write_bytes(content)
    arguments = ("-m", model_folders["esm2"], "-o", "s.parquet", "-r", "r.h5", "--unknown", "error")
    fails(run("embed", "bad.fasta", *arguments), 1, "bad.fasta", *parts)
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
    result = run("embed", "long.fasta", "-m", model_folders["esm1b"], "-o", "s.h5", "--long", "full")
    fails(result, 1, "line 3, record 'long': 1023 residues", "over the 1022 that ESM-1b", "truncate", "window")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["in.fasta"], "nothing to write"),
        (["-o", "s.h5"], "no inputs given"),
        (["in.fasta", "-o", "./in.fasta"], "in.fasta is input and output; name another output"),
        (["in.fasta", "-o", "s.h5", "--fast", "--dtype", "bfloat16"], "--fast chooses the type itself"),
        (["in.fasta", "-o", "s.h5", "--shard", "0/4"], "shard '0/4' should be i/N with i from 1 to N"),
        (["in.fasta", "-o", "s.h5", "--shard", "1/4", "--devices", "2"], "exclude each other"),
        (["in.fasta", "-o", "s.h5", "--store", "float64"], "store 'float64' should be 'float32' or 'float16'"),
        (["in.fasta", "-o", "s.h5", "--unknown", "y"], "unknown 'y' should be 'x', 'error' or 'skip'"),
        (["in.fasta", "-o", "s.h5", "--compression", "10"], "compression 10 should be "),
        (["in.fasta", "-o", "s.h5", "--config", "absent.yaml"], "--config absent.yaml: cannot be read"),
        (["in.fasta", "--nope"], "No such option"),
        (["in.fasta", "-o", "s.csv"], "unknown suffix '.csv'"),
        (["in.fasta", "-r", "r.txt"], "unknown suffix '.txt'; use .parquet, .h5, or a name without suffix"),
        (["in.fasta", "-o", "s.h5", "-r", "s.h5"], "-o and -r both name s.h5"),
        (["in.fasta", "-o", "s.h5", "--pool", "median"], "unknown pooling 'median'"),
        (["in.fasta", "-o", "s.h5", "--pool", "mean,mean"], "names one twice"),
        (["in.fasta", "-o", "s.h5", "--layers", "one"], "layers 'one' should be "),
        (["in.fasta", "-o", "s.h5", "--layers", "9"], "layer 9 does not exist"),
        (["in.fasta", "-o", "s.h5", "--long", "cut"], "long 'cut' should be 'truncate', 'window', 'full' or 'error'"),
        (["in.fasta", "-o", "s.h5", "--dtype", "bf16"], "dtype 'bf16' should be 'float32', 'bfloat16' or 'float16'"),
        (["in.fasta", "-o", "s.h5", "--device", "tpu"], "unknown device 'tpu'"),
        (["in.fasta", "-o", "s.h5", "--token-budget", "0"], "token_budget 0 should be "),
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


def test_config_files(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    """The file a run writes runs it again; flags override it."""
    arguments = ("--pool", "mean,max", "--layers", "0,-1", "--unknown", "skip", "--token-budget", 50)
    assert run("embed", fasta, "-m", model_folders["esm2"], "-o", "s.h5", *arguments).code == 0
    result = run("embed", "--config", "s.h5.run.yaml", "-o", "again.h5", "--pool", "max")
    assert result.code == 0, result
    with h5py.File("s.h5") as one, h5py.File("again.h5") as other:
        np.testing.assert_array_equal(one["a@max"][:], other["a"][:])
    Path("bad.yaml").write_text("inputs: in.fasta\nsequence: s2.h5\n")
    fails(run("embed", "--config", "bad.yaml"), 2, "--config bad.yaml: unknown option 'sequence'", "'sequences'")
    Path("bad.yaml").write_text("inputs: [in.fasta\n")
    fails(run("embed", "--config", "bad.yaml"), 2, "bad.yaml: not YAML")
    Path("bad.yaml").write_text("just text")
    fails(run("embed", "--config", "bad.yaml"), 2, "bad.yaml: expected options")
    Path("bad.yaml").write_bytes(b"\xff\xfe")
    fails(run("embed", "--config", "bad.yaml"), 2, "bad.yaml: cannot be read")
    Path("good.yaml").write_text(
        f"inputs: in.fasta\nresidues: r.h5\nmodel: {model_folders['esm2']}\nlayers: 1\ntoken-budget: 9\nlong: window\n"
    )
    assert run("embed", "--config", "good.yaml").code == 0
    with h5py.File("r.h5") as file:
        assert file.attrs["layers"].tolist() == [1]


def test_shards_and_merge(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Laid end to end, shards are what one process writes: Parquet and reports to the byte."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    records = [f">r{n}\n{letters[n % 20 :]}{'j' if n % 7 == 0 else ''}{letters * (n % 5)}\n" for n in range(60)]
    (tmp_path / "in.fasta").write_text("".join(records) + ">empty\n\n>r3\nM\n")
    arguments = ("embed", "in.fasta", "-m", model_folders["esm2"], "-o", "s.parquet", "-r", "r.h5")
    options = ("--token-budget", 200, "--duplicates", "rename")
    assert run(*arguments, *options).code == 0
    whole = Path("s.parquet").read_bytes(), Path("s.parquet.report.tsv").read_bytes()
    run_file = yaml.safe_load(Path("s.parquet.run.yaml").read_text())
    with h5py.File("r.h5") as file:
        expected = {name: dataset[:] for name, dataset in file.items()}
    for path in tmp_path.glob("[rs].*"):
        path.unlink()
    for number in (3, 1, 2):
        fails(run("merge", "s.parquet"), 1, "s.parquet: ", "shard")
        assert run(*arguments, *options, "--shard", f"{number}/3").code == 0
    result = run("merge", "s.parquet", "r.h5")
    assert result.code == 0, result
    assert Path("s.parquet").read_bytes() == whole[0]
    assert Path("s.parquet.report.tsv").read_bytes() == whole[1]
    assert yaml.safe_load(Path("s.parquet.run.yaml").read_text()) == run_file
    with h5py.File("r.h5") as file:
        assert list(file) == list(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(file[name][:], array)
    fails(run("merge", "r.h5"), 1, "r.h5: exists already")
    Path("r.shard-2-of-3.h5").unlink()
    fails(run("merge", "r.h5", "--overwrite"), 1, "shard 2 of 3 is missing")
    Path("s.shard-2-of-3.parquet").unlink()
    assert run(*arguments, *options[:2], "--duplicates", "skip", "--shard", "2/3").code == 0
    fails(run("merge", "s.parquet", "--overwrite"), 1, "are of different runs (duplicates rename -> skip)")


def test_more_shards_than_work(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o", "s.parquet")
    for number in range(1, 6):
        assert run(*arguments, "--shard", f"{number}/5").code == 0
    assert run("merge", "s.parquet").code == 0
    assert pd.read_parquet("s.parquet")["id"].tolist() == ["a", "b", "c|3/x"]


def test_devices(run: Run, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-r", "r.h5", "--device", "cpu", "--token-budget", 20)
    result = run(*arguments, "--devices", 2)
    assert result.code == 0, result
    assert "r.h5: 3 sequences, 32 residues" in result.out
    assert sorted(path.name for path in Path().glob("r.*")) == ["r.h5", "r.h5.report.tsv", "r.h5.run.yaml"]
    with h5py.File("r.h5") as file:
        assert list(file) == ["a", "b", "c|3%2Fx"]
    fails(run(*arguments, "--devices", 2), 1, "r.h5: exists already")
    fasta.write_text(">a\nM0\n")
    fails(run(*arguments, "--devices", 2, "--overwrite"), 1, "shard 1/2: ", "not a residue: 0 at 2")


def test_everything_skipped_is_an_error(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">a\n\n>b\n*\n")
    result = run("embed", "a.fasta", "-m", model_folders["esm2"], "-o", "s.h5")
    fails(result, 1, "a.fasta: every record was skipped; the first, 'a': no residues")
    assert [path.name for path in tmp_path.iterdir()] == ["a.fasta"]


def test_input_and_output_in_one(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "in.h5").write_text(FASTA)
    result = run("embed", "in.h5", "-m", model_folders["esm2"], "-o", "./in.h5", "--overwrite")
    fails(result, 2, "in.h5 is input and output")
    fails(run("embed", "in.h5", "-m", "m", "-o", "s.h5", "-r", tmp_path / "s.h5"), 2, "-o and -r both name")
    assert (tmp_path / "in.h5").read_text() == FASTA


def test_fast(run: Run, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from protea import device

    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-r", "r.h5", "--overwrite")
    for native in (True, False):
        monkeypatch.setattr(device, "native_bfloat16", lambda _, native=native: native)
        result = run(*arguments, "--fast")
        assert result.code == 0, result
        used = yaml.safe_load(Path("r.h5.run.yaml").read_text())["provenance"]["computed_in"]
        assert used == ("bfloat16" if native else "float32")
        assert ("no native bfloat16; computing in float32" in result.err) is not native
        assert ("--fast is " in run(*arguments).err) is native


def test_store_float16(run: Run, fasta: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-r", "r.h5", "--overwrite")
    assert run(*arguments).code == 0
    with h5py.File("r.h5") as file:
        exact = file["a"][:]
    assert run(*arguments, "--store", "float16", "--compression", 9).code == 0
    with h5py.File("r.h5") as file:
        np.testing.assert_array_equal(file["a"][:], exact.astype(np.float16))
    big = protea.load(model_folders["esm2"], device="cpu")
    big.module.emb_layer_norm_after.weight.data *= 1e6
    big.save(tmp_path / "big")
    result = run("embed", fasta, "-m", "big", "-r", "big.h5", "--store", "float16")
    fails(result, 1, "record 'a': values up to", "beyond float16's 65,504; use --store float32")
    big.module.emb_layer_norm_after.weight.data[0] = float("nan")
    big.save(tmp_path / "nan")
    fails(run("embed", fasta, "-m", "nan", "-o", "nan.h5"), 1, "record 'a': the model gives infinities or NaN")


def test_places_that_cannot_be_written(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-o")
    fails(run(*arguments, "absent/s.h5"), 1, "absent/s.h5: there is no folder absent; create it first")
    fails(run(*arguments, f"{'x' * 300}.h5"), 1, "the name is too long")
    if Path("/proc/self").exists():  # not even root writes there
        fails(run(*arguments, "/proc/s.h5"), 1, "/proc")


def test_every_option_of_embed_is_documented(run: Run) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text()
    options = set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", run("embed", "--help").out, re.MULTILINE)) - {"--help"}
    assert len(options) > 15
    for option in options:
        assert f"`{option}`" in documented, option


# --- what must never be lost or mixed up ---------------------------------------------------------------------------


def test_folders_that_are_not_ours_are_never_replaced(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "in.fasta").write_text(FASTA)
    (data / "thesis.txt").write_text("years of work")
    model = ("-m", model_folders["esm2"], "--overwrite")
    (tmp_path / "copy.fasta").write_text(FASTA)
    fails(run("embed", "copy.fasta", *model, "-o", "data"), 1, "data: exists and is no folder of embeddings")
    fails(run("embed", "data/in.fasta", *model, "-o", "data"), 2, "data: the input ", "is in it")
    for name in (".", "..", "/", ""):
        fails(run("embed", "copy.fasta", *model, "-o", name), 2, "names no file or folder of its own")
    (tmp_path / "link").symlink_to(data)
    fails(run("embed", "copy.fasta", *model, "-o", "link"), 1, "link: exists and is no folder of embeddings")
    (tmp_path / "folder.h5").mkdir()
    fails(run("embed", "copy.fasta", *model, "-o", "folder.h5"), 1, "folder.h5: is a folder; name a file")
    assert {path.name for path in data.iterdir()} == {"in.fasta", "thesis.txt"}
    assert not list(tmp_path.glob(".*.partial"))
    for _ in range(2):  # an empty folder and one of ours may be replaced
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert run("embed", "copy.fasta", *model, "-o", "empty").code == 0
    assert len(list((tmp_path / "empty").glob("*.pt"))) == 3


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have runs commit after every pack, and stop at the n-th commit; 0 for never."""
    from protea.embed import run
    from protea.embed.journal import Journal, Progress

    commit = Journal.commit
    left = [0]

    def limited(self: Journal, progress: Progress) -> None:
        commit(self, progress)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(Journal, "commit", limited)
    return lambda count: left.__setitem__(0, count)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "many.fasta"
    path.write_text("".join(f">r{n}\n{'ACDEFGHIKLMNPQRSTVWY'[n % 20 :]}MKT\n" for n in range(60)))
    return path


def test_outputs_of_another_unfinished_run(
    run: Run, many: Path, fasta: Path, model_folders: dict[str, Path], interrupt: Callable[[int], None]
) -> None:
    model = ("-m", model_folders["esm2"], "--token-budget", 60)
    interrupt(5)
    assert run("embed", many, *model, "-o", "a.parquet", "-r", "b.h5").code == 130
    interrupt(0)
    fails(run("embed", fasta, *model, "-r", "b.h5"), 1, "b.h5: belongs to an unfinished run of a.parquet")
    fails(run("embed", many, *model, "-o", "a.parquet", "-r", "c.h5"), 1, "residues b.h5 -> c.h5")
    assert not Path(".c.h5.partial").exists()
    assert run("embed", fasta, *model, "-r", "b.h5", "--overwrite").code == 0
    Path("b.h5").unlink()
    fails(
        run("embed", many, *model, "-o", "a.parquet", "-r", "b.h5"),
        1,
        ".b.h5.partial: what an unfinished run had written is gone",
    )
    assert run("embed", many, *model, "-o", "a.parquet", "-r", "b.h5", "--overwrite").code == 0
    with h5py.File("b.h5") as file:
        assert list(file) == [f"r{n}" for n in range(60)]
    assert not list(Path().glob(".*.partial"))


def test_a_mistake_does_not_cost_unfinished_work(
    run: Run, many: Path, model_folders: dict[str, Path], interrupt: Callable[[int], None]
) -> None:
    arguments = ("-m", model_folders["esm2"], "--token-budget", 60, "-o", "a.parquet", "-r", "b.h5")
    interrupt(5)
    assert run("embed", many, *arguments).code == 130
    interrupt(0)
    fails(run("embed", "absent.fasta", *arguments, "--overwrite"), 1, "absent.fasta: no such file")
    result = run("embed", many, *arguments)
    assert result.code == 0
    assert "going on after" in result.err


def test_input_that_changes_while_it_is_read(
    run: Run, many: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from protea.embed import run as module

    survey = module.survey
    for addition in (">new\nMKT\n", ">r5\nMKT\n"):

        def changing(*arguments: object, addition: str = addition, **options: object) -> object:
            found = survey(*arguments, **options)  # type: ignore[arg-type]
            many.write_text(many.read_text() + addition)
            return found

        monkeypatch.setattr(module, "survey", changing)
        result = run("embed", many, "-m", model_folders["esm2"], "-r", "r.h5")
        fails(result, 1, "the input changed while it was read")
        assert not Path("r.h5").exists()


def test_shards_of_what_is_not_one_whole(
    run: Run, many: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from protea.embed import engine

    many.write_text("".join(f">r{n}\n{'ACDEFGHIKLMNPQRSTVWY' * 5}\n" for n in range(200)))
    arguments = ("embed", many, "-m", model_folders["esm2"], "-o", "s.parquet", "--shard")
    assert run(*arguments, "1/2").code == 0
    monkeypatch.setattr(engine, "_available_memory", lambda: 12_000_000)  # another machine
    assert run(*arguments, "2/2").code == 0
    assert run("merge", "s.parquet").code == 0
    assert len(pd.read_parquet("s.parquet")) == 200
    many.write_text(many.read_text() + ">more\nMKT\n")
    assert run(*arguments, "2/2", "--overwrite").code == 0
    fails(run("merge", "s.parquet", "--overwrite"), 1, "are of different runs (input ")


@pytest.mark.parametrize("name", ["out", "out.h5", "out.parquet"])
def test_shards_of_every_format(run: Run, many: Path, model_folders: dict[str, Path], name: str) -> None:
    from protea.embed.stores import kind_of, read_store

    output = ("-r", name) if name == "out.parquet" else ("-o", name, "--pool", "mean,bos")
    arguments = ("embed", many, "-m", model_folders["esm2"], *output, "--layers", "0,-1", "--token-budget", 200)
    whole = Path("whole") / name
    whole.parent.mkdir()
    assert run(*[whole if part == name else part for part in arguments]).code == 0
    assert run(*arguments, "--shard", "1/2").code == 0
    assert run(*arguments, "--shard", "2/2").code == 0
    result = run("merge", name)
    assert result.code == 0, result
    kind = kind_of(Path(name), "-o")
    ours, theirs = (list(read_store(path, kind).records) for path in (Path(name), whole))
    assert [entry for entry, _ in ours] == [entry for entry, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in b)
    shard = Path(name).with_name(f"out.shard-2-of-2{Path(name).suffix}")
    broken = sorted(shard.glob("*.pt"))[3] if shard.is_dir() else shard
    broken.write_bytes(broken.read_bytes()[:-200])
    fails(run("merge", name, "--overwrite"), 1, f"{shard}: damaged, or no shard", "run that shard again")
    assert kind_of(Path(name), "-o") == kind
    assert len(list(read_store(Path(name), kind).records)) == 60
    assert not list(Path().glob(".*.partial"))
    fails(run("merge", "x.txt"), 2, "unknown suffix '.txt'")


def test_devices_keep_to_their_own_shards(
    run: Run, many: Path, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from protea.embed import devices
    from protea.errors import OutputError

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = ("-m", model_folders["esm2"], "--token-budget", 60)
    for number in (1, 2):
        assert run("embed", fasta, *model, "-o", "s.h5", "--shard", f"{number}/2").code == 0
    arguments = ("embed", many, *model, "-o", "s.h5", "-r", "r", "--devices", 2, "--device", "cpu")
    merge = devices.merge

    def failing(output: Path, *rest: object, **options: object) -> object:
        if output.name == "r":
            raise OutputError("r: stopped here")
        return merge(output, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(devices, "merge", failing)
    fails(run(*arguments), 1, "r: stopped here")
    monkeypatch.setattr(devices, "merge", merge)
    fails(run(*arguments, "--pool", "max"), 1, "s.h5: an unfinished run was started with other settings")
    result = run(*arguments)
    assert result.code == 0, result
    with h5py.File("s.h5") as file:
        assert list(file) == [f"r{n}" for n in range(60)]
        assert json.loads(file.attrs["protea"])["sequences"] == "s.h5"
    assert len(list(Path("r").glob("*.pt"))) == 60
    assert Path("s.shard-1-of-2.h5").exists()
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("shard: 3", "shard 3 should be i/N"),
        ("shard: {number: 5, of: 2}", "should be i/N"),
        ("layers: true", "layers True should be a list, or members by comma"),
        ("layers: 1.5", "layers 1.5 should be a list"),
        ("pool:", "pool None should be a list"),
        ("residues: ''", "names no file or folder of its own"),
        ('model: "a\\0b"', "no such folder"),
        ('residues: "a\\0b"', "a path holds a NUL byte"),
        ("overwrite: true", "unknown option 'overwrite'"),
    ],
)
def test_odd_values_in_a_config_file(
    run: Run, fasta: Path, model_folders: dict[str, Path], line: str, part: str
) -> None:
    Path("c.yaml").write_text(f"inputs: in.fasta\nsequences: s.h5\n{line}\n")
    arguments = () if line.startswith("model") else ("-m", model_folders["esm2"])
    result = run("embed", "--config", "c.yaml", *arguments)
    fails(result, result.code, part if not line.startswith("model") else "")
    assert result.code in (1, 2)
