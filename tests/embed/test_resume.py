"""Runs that are killed, interrupted, out of disk or changed, and go on; real processes throughout."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

from protea.embed.stores import kind_of, read_store

SIGNALS = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]

PROGRAM = """
import resource, sys
from protea.embed import run
from protea.embed.stores import parquet
commit, limit = float(sys.argv[1]), int(sys.argv[2])
run._COMMIT_SECONDS = commit
parquet._ROW_GROUP_BYTES = 20_000
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv = ["protea", *sys.argv[3:]]
from protea.cli import main
main()
"""


def start(*arguments: object, commit: float = 0.0, limit: int = 0) -> subprocess.Popen[str]:
    """``protea`` in a process of its own, committing after every pack."""
    command = [sys.executable, "-c", PROGRAM, str(commit), str(limit), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, err


def protea(*arguments: object, commit: float = 0.0, limit: int = 0) -> tuple[int, str]:
    return finish(start(*arguments, commit=commit, limit=limit))


@pytest.fixture
def job(tmp_path: Path, model_folders: dict[str, Path]) -> list[object]:
    """Some hundred records, odd ones among them, in packs of a few; outputs of every format."""
    rng = random.Random(0)
    with gzip.open(tmp_path / "in.fasta.gz", "wt") as stream:
        for number in range(300):
            letters = "".join(rng.choices("ACDEFGHIKLMNPQRSTVWYX", k=rng.randint(1, 120)))
            odd = {50: "", 51: letters.lower(), 52: letters + "*", 53: letters + "J", 200: letters * 30}
            stream.write(f">r{number} about {number}\n{odd.get(number, letters)}\n")
        stream.write(">r7 again\nMKT\n")
    options = ["--duplicates", "rename", "--layers", "0,-1", "--pool", "mean,bos", "--token-budget", "300"]
    return ["embed", tmp_path / "in.fasta.gz", "-m", model_folders["esm2"], "--long", "window", *options]


def outputs(folder: Path, kind: str) -> list[object]:
    folder.mkdir(exist_ok=True)
    if kind == "files":
        return ["-o", folder / "s.parquet", "-r", folder / "r.h5"]
    return ["-o", folder / "all", "-r", folder / "all"]


def assert_same(ours: Path, theirs: Path) -> None:
    """The same records with the same bits in the same order, and the same report; nothing else left behind."""
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in theirs.iterdir():
        if path.name.endswith(".report.tsv"):
            assert (ours / path.name).read_bytes() == path.read_bytes()
        elif not path.name.endswith(".run.yaml"):
            kind = kind_of(path, "-o")
            one, other = (list(read_store(folder / path.name, kind).records) for folder in (ours, theirs))
            assert [entry for entry, _ in one] == [entry for entry, _ in other]
            for (_, a), (_, b) in zip(one, other, strict=True):
                assert a.keys() == b.keys()
                assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["files", "folder"])
def test_killed_at_random_moments(tmp_path: Path, job: list[object], kind: str) -> None:
    seed = random.randrange(1 << 31)
    print("seed", seed)
    rng = random.Random(seed)
    check_kills(tmp_path, job, kind, {records: rng.uniform(0, 0.02) for records in sorted(rng.sample(range(301), 4))})


def test_killed_once(tmp_path: Path, job: list[object]) -> None:
    check_kills(tmp_path, job, "files", {100: 0.01})


def check_kills(folder: Path, job: list[object], kind: str, moments: dict[int, float]) -> None:
    """Kill a run at moments, given as records in the journal and seconds after; compare with an undisturbed run."""
    code, err = protea(*job, *outputs(folder / "whole", kind))
    assert code == 0, err
    assert "1 windowed, 3 altered, 1 renamed, 1 skipped" in err
    arguments = [*job, *outputs(folder / "killed", kind)]
    for records, seconds in moments.items():
        process = start(*arguments)
        if not wait_for_journal(folder / "killed", process, records):
            break  # the run ended before it could be killed
        time.sleep(seconds)
        process.kill()
        process.communicate()
    code, err = protea(*arguments)
    assert code == 0, err
    assert_same(folder / "killed", folder / "whole")


def wait_for_journal(folder: Path, process: subprocess.Popen[str], records: int) -> bool:
    """Until the journal notes so many records; whether that came before the end."""
    while process.poll() is None:
        for path in folder.glob(".*.partial/journal.json"):
            if json.loads(path.read_text())["progress"]["records"] >= records:
                return True
        time.sleep(0.002)
    return False


@pytest.mark.long
@pytest.mark.parametrize("kind", ["files", "folder"])
def test_updates_killed_at_random_moments(tmp_path: Path, job: list[object], kind: str) -> None:
    seed = random.randrange(1 << 31)
    print("seed", seed)
    rng = random.Random(seed)
    check_killed_updates(tmp_path, job, kind, [rng.randint(0, 301) for _ in range(8)], rng)


def test_an_update_killed_once(tmp_path: Path, job: list[object]) -> None:
    check_killed_updates(tmp_path, job, "files", [100], random.Random(0))


def check_killed_updates(folder: Path, job: list[object], kind: str, moments: list[int], rng: random.Random) -> None:
    """Kill updates when so many records are in the journal; the same command must end like an undisturbed update."""
    grown = gzip.decompress((folder / "in.fasta.gz").read_bytes())
    blocks = grown.split(b">")[1:]
    before = [block + b"M\n" if number % 9 == 0 else block for number, block in enumerate(blocks) if number % 3]
    (folder / "in.fasta.gz").write_bytes(gzip.compress(b">" + b">".join(before)))
    code, err = protea(*job, *outputs(folder / "before", kind))
    assert code == 0, err
    (folder / "in.fasta.gz").write_bytes(gzip.compress(grown))
    update = ["--update", *job[1:]]
    shutil.copytree(folder / "before", folder / "whole")
    code, err = protea("embed", *update, *outputs(folder / "whole", kind))
    assert code == 0, err
    assert "update: " in err
    killed = 0
    for trial, records in enumerate(moments):
        shutil.copytree(folder / "before", folder / f"killed{trial}")
        arguments = ["embed", *update, *outputs(folder / f"killed{trial}", kind)]
        process = start(*arguments)
        wait_for_journal(folder / f"killed{trial}", process, records)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        code, err = protea(*arguments)
        assert code == 0, (records, err)
        assert_same(folder / f"killed{trial}", folder / "whole")
        for run_file in folder.glob(f"killed{trial}/*.run.yaml"):
            theirs = yaml.safe_load((folder / "whole" / run_file.name).read_text())
            assert yaml.safe_load(run_file.read_text())["provenance"] == theirs["provenance"]
    assert killed


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_politely(tmp_path: Path, job: list[object], number: signal.Signals) -> None:
    arguments = [*job, *outputs(tmp_path / "out", "files")]
    process = start(*arguments)
    assert wait_for_journal(tmp_path / "out", process, 60)
    process.send_signal(number)
    code, err = finish(process)
    assert code == 130
    assert err.strip().splitlines()[-1].startswith("protea: interrupted; ")
    assert not (tmp_path / "out" / "s.parquet").exists()
    code, err = protea(*arguments)
    assert code == 0, err
    assert "continuing after" in err
    protea(*job, *outputs(tmp_path / "whole", "files"))
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.fixture
def unfinished(tmp_path: Path, job: list[object]) -> list[object]:
    """A run killed after its first commits."""
    arguments = [*job, *outputs(tmp_path / "out", "files")]
    process = start(*arguments)
    assert wait_for_journal(tmp_path / "out", process, 60)
    process.kill()
    process.communicate()
    return arguments


def fails(result: tuple[int, str], *parts: str) -> None:
    code, err = result
    assert code == 1, err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err


def test_other_settings_are_refused(unfinished: list[object], tmp_path: Path) -> None:
    changed = [*unfinished, "--dtype", "bfloat16", "--layers", "-1"]
    fails(protea(*changed), "layers 0,-1 -> -1; dtype float32 -> bfloat16", "--overwrite")
    assert protea(*changed, "--overwrite")[0] == 0
    with h5py.File(tmp_path / "out" / "r.h5") as file:
        assert file["r0"].ndim == 2


def test_other_weights_are_refused(unfinished: list[object], model_folders: dict[str, Path]) -> None:
    at = unfinished.index("-m") + 1
    other = [*unfinished[:at], model_folders["esm2nv"], *unfinished[at + 1 :]]
    fails(protea(*other), "the weights model.safetensors have changed")


def test_changed_input_is_refused(unfinished: list[object], tmp_path: Path) -> None:
    path = tmp_path / "in.fasta.gz"
    text = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(text.replace(b">r250 about 250\n", b">r250 about 250\nM")))
    fails(protea(*unfinished), "input", "packs", "--overwrite")
    path.write_bytes(gzip.compress(text, mtime=0))  # the same records in other bytes are the same input
    assert protea(*unfinished)[0] == 0


def test_two_runs_on_one_output(job: list[object], tmp_path: Path) -> None:
    arguments = [*job, *outputs(tmp_path / "out", "files")]
    first = start(*arguments)
    assert wait_for_journal(tmp_path / "out", first, 1)
    first.send_signal(signal.SIGSTOP)
    fails(protea(*arguments), "s.parquet: another process")
    fails(protea(*arguments, "--overwrite"), "s.parquet: another process")
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0


@pytest.mark.parametrize(
    "limit", [pytest.param(3_000, marks=pytest.mark.long), 60_000, pytest.param(400_000, marks=pytest.mark.long)]
)
def test_a_full_disk(job: list[object], tmp_path: Path, limit: int) -> None:
    """A limit on file sizes, which fails writes as a full disk does."""
    arguments = [*job, *outputs(tmp_path / "out", "files")]
    fails(
        protea(*arguments, limit=limit),
        "disk is full",
        " MB",
    )
    assert not (tmp_path / "out" / "r.h5").exists()
    assert protea(*arguments)[0] == 0
    protea(*job, *outputs(tmp_path / "whole", "files"))
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_too_little_disk_is_said_beforehand(job: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from protea.cli import main

    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(sys, "argv", ["protea", *map(str, job), *map(str, outputs(tmp_path / "out", "files"))])
    errors: list[str] = []
    monkeypatch.setattr("typer.echo", lambda text, **_: errors.append(str(text)))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "more of disk, 1.0 MB are free" in errors[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_compressed_file_cut_short(tmp_path: Path, job: list[object]) -> None:
    path = tmp_path / "in.fasta.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    arguments = [*job, *outputs(tmp_path / "out", "files")]
    code, err = protea(*arguments, commit=1000.0)
    assert code == 1
    assert "cut short" in err
    assert "kept" in err
    assert not (tmp_path / "out" / "s.parquet").exists()
    path.write_bytes(content)
    code, err = protea(*arguments)
    assert code == 0, err
    assert "continuing after" in err
    assert len(pd.read_parquet(tmp_path / "out" / "s.parquet")) == 300


def test_standard_input_goes_on_too(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    text = "".join(f">r{number}\n{'MKTAYIAKQR' * 5}\n" for number in range(200))
    arguments = ["embed", "-", "-m", model_folders["esm2"], "-o", tmp_path / "s.parquet", "--token-budget", "300"]
    command = [sys.executable, "-c", PROGRAM, "0", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(text[: len(text) // 2].encode())
    process.stdin.flush()
    end = time.monotonic() + 60
    while not (tmp_path / ".s.parquet.partial" / "journal.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    changed = subprocess.run(
        command, input="X" + text.replace("MKT", "MKK"), text=True, capture_output=True, check=False
    )
    assert changed.returncode == 1
    done = subprocess.run(command, input=text.replace("MKT", "MKK"), text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "the input has changed" in done.stderr
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing after" in done.stderr
    assert len(pd.read_parquet(tmp_path / "s.parquet")) == 200


def test_a_damaged_journal(unfinished: list[object], tmp_path: Path) -> None:
    path = tmp_path / "out" / ".s.parquet.partial" / "journal.json"
    path.write_text(path.read_text()[:100])
    fails(protea(*unfinished), "journal.json", "--overwrite")
    assert protea(*unfinished, "--overwrite")[0] == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_while_waiting_for_input(
    tmp_path: Path, model_folders: dict[str, Path], number: signal.Signals
) -> None:
    """A pipe that says nothing blocks the reader; the process ends all the same, and the second signal is harmless."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start("embed", pipe, "-m", model_folders["esm2"], "-o", tmp_path / "s.h5")
    with pipe.open("w") as writer:
        writer.write(">a\nMKT\n")
        writer.flush()
        end = time.monotonic() + 60
        while not (tmp_path / ".s.h5.partial").exists() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)
        code, err = finish(process)
    assert code == 130, err
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
