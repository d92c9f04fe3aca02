"""`protea embed` as a user meets it: outputs, messages, exit codes."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

import protea
from conftest import FASTA, Run, fails
from messages import check_message


def test_both_outputs_in_one_pass(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    folder = model_folders["esm2"]
    result = run("embed", fasta, "-m", folder, "-o", "s.parquet", "-r", "r.h5")
    assert result.code == 0, result
    assert "s.parquet: 3 sequences, 32 residues, 40 values each (mean)" in result.out
    assert "r.h5: 3 sequences, 32 residues, 40 values each (residues)" in result.out
    assert "float32, cpu" in result.err
    model = protea.load(folder, device="cpu")
    sequences = ["MKTAYIAKQR", "G", "ACDEFGHIKLMNPQRSTVWYX"]
    expected = model.embed(sequences)
    frame = pd.read_parquet("s.parquet")
    assert frame["id"].tolist() == ["a", "b", "c|3/x"]
    assert frame["description"].tolist() == ["first protein", "", ""]
    # Python computes as the command does: the same bits for the same packs.
    np.testing.assert_array_equal(np.stack(frame["embedding"]), model.embed(sequences, pool="mean"))
    np.testing.assert_allclose(np.stack(frame["embedding"]), [array.mean(0) for array in expected], rtol=0, atol=1e-6)
    with h5py.File("r.h5") as file:
        for name, array in zip(["a", "b", "c|3%2Fx"], expected, strict=True):
            np.testing.assert_array_equal(file[name][:], array)
        settings = json.loads(file.attrs["protea"])
    told = yaml.safe_load(Path("r.h5.run.yaml").read_text())
    assert told.pop("written") == {"bytes": Path("r.h5").stat().st_size}
    assert settings == told
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
    ("key", "content"),
    [
        ("empty", b""),
        ("not-fasta", b"MKT\n"),
        ("unknown-letter", b">a\nMKT\n>b\nMJT\n"),
        ("stop-within", b">a\nMKT*K\n"),
        ("no-residues", b">a\n"),
        ("repeated-id", b">a\nM\n>a\nK\n"),
        ("repeated-name", b">a/b\nM\n>a%2Fb\nK\n"),
        ("latin-letter", b">a\xff\nM\xff\n"),
        ("nul-letter", b">a\nMK\x00T\n"),
        ("no-id", b">\nMKT\n"),
    ],
)
def test_bad_input_stops_before_any_work(
    run: Run, model_folders: dict[str, Path], tmp_path: Path, key: str, content: bytes
) -> None:
    (tmp_path / "bad.fasta").write_bytes(content)
    arguments = ("-m", model_folders["esm2"], "-o", "s.parquet", "-r", "r.h5", "--unknown", "error")
    result = run("embed", "bad.fasta", *arguments)
    fails(result, 1, "bad.fasta")
    check_message(f"embed.{key}", result.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.fasta"]


def test_files_models_and_devices_that_are_not_there(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    folder = model_folders["esm2"]
    fails(run("embed", "absent.fasta", "-m", folder, "-o", "s.h5"), 1, "absent.fasta: no such file")
    fails(run("embed", fasta, "-m", "esm2_t6_8M", "-o", "s.h5"), 2, "unknown model", "esm2_t6_8M_UR50D")
    fails(run("embed", fasta, "-m", "./absent", "-o", "s.h5"), 1, "./absent: no such folder")
    import torch

    if not torch.cuda.is_available():
        fails(run("embed", fasta, "-m", folder, "-o", "s.h5", "--device", "cuda"), 1, "'cuda' is not available")


def test_a_long_sequence_and_learned_positions(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "long.fasta").write_text(">ok\nM\n>long one\n" + "A" * 1023 + "\n")
    result = run("embed", "long.fasta", "-m", model_folders["esm1b"], "-o", "s.h5", "--long", "full")
    fails(result, 1, "line 3, record 'long': 1023 residues", "1022", "ESM-1b", "truncate", "window")


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("no-output", ["in.fasta"]),
        ("no-input", ["-o", "s.h5"]),
        ("input-is-output", ["in.fasta", "-o", "./in.fasta"]),
        ("fast-with-dtype", ["in.fasta", "-o", "s.h5", "--fast", "--dtype", "bfloat16"]),
        ("shard", ["in.fasta", "-o", "s.h5", "--shard", "0/4"]),
        ("shard-with-devices", ["in.fasta", "-o", "s.h5", "--shard", "1/4", "--devices", "2"]),
        ("store", ["in.fasta", "-o", "s.h5", "--store", "float64"]),
        ("unknown", ["in.fasta", "-o", "s.h5", "--unknown", "y"]),
        ("compression", ["in.fasta", "-o", "s.h5", "--compression", "10"]),
        ("config", ["in.fasta", "-o", "s.h5", "--config", "absent.yaml"]),
        ("option", ["in.fasta", "--nope"]),
        ("suffix-o", ["in.fasta", "-o", "s.txt"]),
        ("suffix-r", ["in.fasta", "-r", "r.txt"]),
        ("same-file", ["in.fasta", "-o", "s.h5", "-r", "s.h5"]),
        ("pooling", ["in.fasta", "-o", "s.h5", "--pool", "median"]),
        ("repeated-pooling", ["in.fasta", "-o", "s.h5", "--pool", "mean,mean"]),
        ("layers", ["in.fasta", "-o", "s.h5", "--layers", "one"]),
        ("layer", ["in.fasta", "-o", "s.h5", "--layers", "9"]),
        ("long", ["in.fasta", "-o", "s.h5", "--long", "cut"]),
        ("dtype", ["in.fasta", "-o", "s.h5", "--dtype", "bf16"]),
        ("device", ["in.fasta", "-o", "s.h5", "--device", "tpu"]),
        ("token-budget", ["in.fasta", "-o", "s.h5", "--token-budget", "0"]),
    ],
)
def test_wrong_usage(run: Run, fasta: Path, model_folders: dict[str, Path], key: str, arguments: list[str]) -> None:
    result = run("embed", *arguments, "-m", model_folders["esm2"])
    fails(result, 2)
    check_message(f"embed.usage-{key}", result.err)


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
    fails(run("embed", "--config", "bad.yaml"), 2, "bad.yaml: expected")
    Path("bad.yaml").write_bytes(b"\xff\xfe")
    fails(run("embed", "--config", "bad.yaml"), 2, "bad.yaml: cannot be read")
    Path("good.yaml").write_text(
        f"inputs: in.fasta\nresidues: r.h5\nmodel: {model_folders['esm2']}\nlayers: 1\ntoken-budget: 9\nlong: window\n"
    )
    assert run("embed", "--config", "good.yaml").code == 0
    with h5py.File("r.h5") as file:
        assert file.attrs["layers"].tolist() == [1]


def test_everything_skipped_is_an_error(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">a\n\n>b\n*\n")
    result = run("embed", "a.fasta", "-m", model_folders["esm2"], "-o", "s.h5")
    fails(result, 1, "a.fasta", "'a'", "no residues")
    check_message("embed.all-skipped", result.err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.fasta"]


def test_input_and_output_in_one(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "in.h5").write_text(FASTA)
    result = run("embed", "in.h5", "-m", model_folders["esm2"], "-o", "./in.h5", "--overwrite")
    fails(result, 2, "in.h5")
    fails(run("embed", "in.h5", "-m", "m", "-o", "s.h5", "-r", tmp_path / "s.h5"), 2, "-o and -r", "s.h5")
    assert (tmp_path / "in.h5").read_text() == FASTA


def test_fast(run: Run, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from protea import device
    from protea.infer import loading as load

    arguments = ("embed", fasta, "-m", model_folders["esm2"], "-r", "r.h5", "--overwrite")
    for native in (True, False):
        for module in (device, load):
            monkeypatch.setattr(module, "native_bfloat16", lambda _, native=native: native)
        result = run(*arguments, "--fast")
        assert result.code == 0, result
        used = yaml.safe_load(Path("r.h5.run.yaml").read_text())["provenance"]["computed_in"]
        assert used == ("bf16-mixed" if native else "float32")
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
    fails(result, 1, "record 'a'", "65,504", "--store float32")
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


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("shard: 3", "shard 3"),
        ("shard: {number: 5, of: 2}", "{'number': 5, 'of': 2}"),
        ("layers: true", "layers True"),
        ("layers: 1.5", "layers 1.5"),
        ("pool:", "pool None"),
        ("residues: ''", "-r "),
        ('residues: "a\\0b"', "NUL"),
        ("overwrite: true", "'overwrite'"),
    ],
)
def test_odd_values_in_a_config_file(
    run: Run, fasta: Path, model_folders: dict[str, Path], line: str, part: str
) -> None:
    Path("c.yaml").write_text(f"inputs: in.fasta\nsequences: s.h5\n{line}\n")
    fails(run("embed", "--config", "c.yaml", "-m", model_folders["esm2"]), 2, part)


def test_a_compressed_file_without_a_whole_record(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    content = gzip.compress(b">a\n" + bytes(range(65, 90)) * 40)
    (tmp_path / "cut.fasta.gz").write_bytes(content[: len(content) // 2])
    result = run("embed", "cut.fasta.gz", "-m", model_folders["esm2"], "-o", "s.h5")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("protea: error: cut.fasta.gz: ")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.fasta.gz"]


def test_true_is_no_number_in_a_config_file(run: Run, fasta: Path, model_folders: dict[str, Path]) -> None:
    Path("c.yaml").write_text("inputs: in.fasta\nsequences: s.h5\ncompression: true\n")
    fails(run("embed", "--config", "c.yaml", "-m", model_folders["esm2"]), 2, "compression True")
