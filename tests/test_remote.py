"""Work on a Ray cluster: what is refused before it computes, and what a killed worker leaves."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import protea
from conftest import Run, fails
from protea.errors import DeviceError, ProteaError
from protea.finetune import likeness
from protea.remote import RayCluster, RemoteTask, _perform, _probe, _sizes

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'protea[ray]'")


class OneCore:
    """What a cluster asks of Ray when it begins."""

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}


def machine(**changes: Any) -> dict[str, Any]:
    versions = {"protea": protea.__version__, "torch": str(torch.__version__)}
    return {"host": "node7", "python": "/bin/python", "error": "", **versions, "shared": True, "missing": [], **changes}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"error": "ModuleNotFoundError: No module named 'protea'"}, ("node7", "No module named 'protea'", "install")),
        ({"protea": "0.0.1"}, ("node7", "Protea 0.0.1", protea.__version__)),
        ({"torch": "2.0"}, ("node7", "PyTorch 2.0", str(torch.__version__))),
        ({"shared": False}, ("node7", "/out", "share")),
        ({"missing": ["/in.fasta"]}, ("node7", "/in.fasta")),
    ],
)
def test_machines_that_are_refused(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    cluster = RayCluster(OneCore(), "auto", 1, gpu=True)
    cluster._check(machine(), Path("/out"), str(torch.__version__))
    with pytest.raises(DeviceError) as caught:
        cluster._check(machine(**changes), Path("/out"), str(torch.__version__))
    for part in parts:
        assert part in str(caught.value)


def test_a_machine_tells_what_it_sees(tmp_path: Path) -> None:
    token, data = tmp_path / "token", tmp_path / "in.fasta"
    token.write_text("this one")
    data.write_text(">a\nM\n")
    found = _probe(str(token), "this one", {str(data): 5, "in.fasta": 5, "gone": 1}, str(tmp_path))
    assert (found["error"], found["shared"], found["missing"]) == ("", True, ["gone"])
    assert (found["protea"], found["torch"]) == (protea.__version__, torch.__version__)
    assert not _probe(str(token), "another", {}, str(tmp_path))["shared"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert _sizes([tmp_path / "model", data]) == {str(tmp_path / "model" / "config.json"): 2, str(data): 5}


def test_a_task_is_a_command(tmp_path: Path) -> None:
    code, last = _perform(["embed", "none.fasta", "-o", "o.csv"], str(tmp_path / "log"), 1, str(tmp_path))
    assert code == 1
    assert "none.fasta" in last


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--ray", "nowhere"), 2, ("--ray 'nowhere'", "HOST:PORT")),
        (("--ray", "auto", "--shard", "1/2"), 2, ("--ray", "--shard")),
        (("--ray", "auto", "--devices", "2"), 2, ("--ray", "--devices")),
        (("--shards", "2"), 2, ("--shards", "--ray")),
    ],
)
def test_wrong_use(run: Run, fasta: Path, options: tuple[str, ...], code: int, parts: tuple[str, ...]) -> None:
    fails(run("embed", fasta, "-o", "out.parquet", *options), code, *parts)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_that_does_not_answer(run: Run, fasta: Path, form: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = form.format(closed.getsockname()[1])
        fails(run("embed", fasta, "-o", "out.parquet", "--ray", address), 1, address, "does not answer")
    assert not Path(".out.parquet.ray").exists()


class HereCluster:
    """Runs tasks one after the other in this process; the second one of the first attempt dies."""

    shards = 3

    def __init__(self, run: Run) -> None:
        self.run_command, self.ran, self.dies = run, list[str](), True

    def check_machines(self, folder: Path, files: Sequence[Path]) -> None:
        assert folder.is_dir()
        assert all(path.exists() for path in files)

    def run(self, tasks: Sequence[RemoteTask], watch: Callable[[], None]) -> None:
        for task in tasks:
            if self.dies and len(self.ran) == 1:
                self.dies = False
                raise DeviceError(f"{task.name}: died")
            self.ran.append(task.name)
            result = self.run_command(*task.arguments)
            if result.code:
                raise ProteaError(f"{task.name}: {result.err}")
            watch()


COMMANDS = {
    "embed": ("embed", "in.fasta", "-o", "OUT.parquet", "--token-budget", 40),
    "score": ("score", "in.fasta", "v.csv", "-o", "OUT.csv", "--method", "pseudo-likelihood", "--gaps=keep"),
    "predict": ("predict", "predictor", "in.fasta", "-o", "OUT.tsv", "--token-budget", 40),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_in_shards(
    run: Run, model_folders: dict[str, Path], one_thread: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The result of one process; what was finished before an error is not computed again."""
    Path("in.fasta").write_text("".join(f">r{n}\n{'ACDEFGHIKLMNPQRSTVWY'[n:]}\n" for n in range(12)))
    Path("v.csv").write_text("id,mutant\n" + "".join(f"r{n},M{11 - n}W\n" for n in range(10)))
    Path("labels.csv").write_text(
        "sequence,target,set\n" + "MKTAY,1.5,train\nMKW,0.5,train\nGDGT,2.5,validation\nLL,1,test\n" * 9
    )
    monkeypatch.setattr(likeness, "_PROGRAM", "no-mmseqs")  # which starts a dozen processes
    model = () if name == "predict" else ("-m", model_folders["esm2"])
    if name == "predict":
        done = run("finetune", "labels.csv", "-m", model_folders["esm2"], "-o", "predictor", "--no-baselines")
        assert done.code == 0, done
    cluster = HereCluster(run)
    monkeypatch.setattr("protea.scatter.ray_cluster", lambda *_, **__: nullcontext(cluster))
    command = [*COMMANDS[name], *model]
    place = next(index for index, part in enumerate(command) if str(part).startswith("OUT"))
    output = Path(str(command[place]))
    done = run(*command)
    assert done.code == 0, done
    written = [Path(f"{output}{end}") for end in (".report.tsv", ".run.yaml", "")]
    expected = [path.read_bytes() for path in written]
    assert run(*command, "--ray", "auto").code == 0
    assert not cluster.ran
    for path in written:
        path.unlink()
    fails(run(*command, "--ray", "auto"), 1, "shard 2/3: died")
    fails(run(*command, "--ray", "auto", "--shards", "4"), 1, "other settings")
    fails(run(*command, "--ray", "auto", "--fast"), 1, "other settings")
    result = run(*command, "--ray", "auto")
    assert result.code == 0, result
    assert cluster.ran == ["shard 1/3", "shard 2/3", "shard 3/3"]
    assert [path.read_bytes() for path in written] == expected
    again = run(*command, "--ray", "auto")
    assert (again.code, "nothing to do" in again.err) == (0, True)
    assert [path.name for path in Path().glob(".*")] == []
    fails(run(*command[:1], "-", *command[2:], "--ray", "auto", "--overwrite"), 2, "--ray", "-")


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray(run: Run, fasta: Path) -> None:
    fails(run("embed", fasta, "-o", "out.parquet", "--ray", "local"), 1, "--ray needs Ray", "protea[ray]")


@needs_ray
@pytest.mark.long
def test_a_killed_worker_loses_nothing(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    """Two workers, one of them killed twice: the result of one process, and no finished shard is computed again."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    records = (f">r{n}\n{letters[n % 20 :]}{letters * (n % 3)}\n" for n in range(20_000))
    (tmp_path / "in.fasta").write_text("".join(records))
    base = [sys.executable, "-m", "protea", "embed", "in.fasta", "-m", str(model_folders["esm2"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*base, "-o", "whole.parquet"], cwd=tmp_path, env=environment, check=True)
    command = [*base, "-o", "out.parquet", "--ray", "local", "--shards", "8", "--cpus-per-shard", str(half_of_cores())]
    logs = tmp_path / ".out.parquet.ray"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    killed = 0
    starts: list[int] = []
    while process.poll() is None:
        time.sleep(0.3)
        found = started(logs)
        starts = max(starts, found, key=len)  # at the end, the logs go one by one
        alive = [pid for pid in found if Path(f"/proc/{pid}").exists()]
        if killed < 2 and len(found) > 2 * killed and alive:
            time.sleep(2)
            os.kill(alive[-1], signal.SIGKILL)
            killed += 1
    assert process.returncode == 0
    assert killed == 2
    assert len(starts) <= 8 + killed
    whole, out = (protea.read_embeddings(tmp_path / name) for name in ("whole.parquet", "out.parquet"))
    assert whole.ids == out.ids
    np.testing.assert_array_equal(whole.to_numpy(), out.to_numpy())
    reports = [(tmp_path / f"{name}.parquet.report.tsv").read_bytes() for name in ("whole", "out")]
    assert reports[0] == reports[1]
    assert not logs.exists()


def half_of_cores() -> int:
    return max(1, (os.cpu_count() or 2) // 2)


def started(logs: Path) -> list[int]:
    """The processes that computed shards, in order, those that died included."""
    try:
        texts = [path.read_text() for path in sorted(logs.glob("*.log"))]
    except OSError:
        return []
    return [int(pid) for text in texts for pid in re.findall(r"in process (\d+)", text)]
