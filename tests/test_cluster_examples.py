"""The files in ``examples/cluster``: what can run here runs; the others are read by what knows their language."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import protea

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
SNAKEMAKE = shutil.which("snakemake")
NEXTFLOW = shutil.which("nextflow")


def folder_with_protea(folder: Path) -> str:
    """A folder that has the command ``protea`` of this Python."""
    folder.mkdir()
    command = folder / "protea"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m protea "$@"\n')
    command.chmod(0o755)
    return str(folder)


@pytest.mark.long
@pytest.mark.skipif(SNAKEMAKE is None, reason="needs snakemake on PATH: pip install snakemake")
def test_snakefile(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    """It writes what one process writes, whatever is in the names, and a second call has nothing to do."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    records = (f">r{number}\n{letters[number % 20 :]}{letters * (number % 5)}\n" for number in range(200))
    (tmp_path / "my in.fasta").write_text("".join(records))
    environment = {**os.environ, "PATH": f"{folder_with_protea(tmp_path / 'bin')}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(Path(protea.__file__).parents[1])
    options = f"-m {model_folders['esm2']} --token-budget 500"
    base = ["protea", "embed", "my in.fasta", "-o", "whole.parquet", *options.split()]
    environment["OMP_NUM_THREADS"] = "1"
    subprocess.run(base, cwd=tmp_path, env=environment, check=True, capture_output=True)
    settings = ["--config", "input=my in.fasta", "output=the out/vectors $1.parquet", "shards=3", f"options={options}"]
    command = [str(SNAKEMAKE), "-s", str(CLUSTER / "Snakefile"), "--cores", "2", *settings]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, joined = (
        protea.read_embeddings(tmp_path / name) for name in ("whole.parquet", "the out/vectors $1.parquet")
    )
    assert whole.ids == joined.ids
    np.testing.assert_array_equal(whole.to_numpy(), joined.to_numpy())
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "Nothing to be done" in again.stdout + again.stderr


@pytest.mark.parametrize("name", ["slurm.sh", "embed-slurm.sh"])
def test_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)


@pytest.mark.skipif(NEXTFLOW is None, reason="needs nextflow on PATH")
def test_nextflow() -> None:
    subprocess.run([str(NEXTFLOW), "lint", str(CLUSTER / "embed.nf")], check=True)


def test_kubernetes() -> None:
    job: dict[str, Any] = yaml.safe_load((CLUSTER / "embed-kubernetes.yaml").read_text())
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert f"/{job['spec']['completions']} " in container["args"][0]


@pytest.mark.skipif(find_spec("kubernetes_validate") is None, reason="needs kubernetes-validate")
@pytest.mark.parametrize("name", ["kubernetes.yaml", "embed-kubernetes.yaml"])
def test_kubernetes_schema(name: str) -> None:
    subprocess.run([sys.executable, "-m", "kubernetes_validate", "--strict", str(CLUSTER / name)], check=True)


def test_every_example_calls_the_same_two_commands() -> None:
    for name in ("embed-slurm.sh", "Snakefile", "embed.nf", "embed-kubernetes.yaml"):
        text = (CLUSTER / name).read_text()
        assert "protea embed" in text
        assert "--shard" in text
        assert "protea merge" in text
