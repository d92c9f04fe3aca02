"""Jobs: the files of the commands, progress, and a service that is killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import pytest

import protea
from conftest import Run
from protea.serve.job_store import JobStore
from serving import LETTERS, Running, running, until


def write_fasta(path: Path, count: int, seed: int = 1, most: int = 200) -> Path:
    rng = Random(seed)
    path.write_text("".join(f">p{n}\n{''.join(rng.choices(LETTERS, k=rng.randint(20, most)))}\n" for n in range(count)))
    return path


@pytest.mark.parametrize(("what", "option"), [("embed", "-o"), ("residues", "-r"), ("logits", "--logits")])
def test_a_job_gives_the_arrays_of_the_command(run: Run, tmp_path: Path, what: str, option: str) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", 12)
    assert run("embed", fasta, option, "theirs.h5").code == 0
    with running(jobs=tmp_path / "jobs") as one:
        client = protea.Client(one.url)
        job = client.submit(fasta, what=what, format="h5")
        assert [state["state"] for state in client.wait(job, every=0.05)][-1] == "done"
        client.fetch(job, "mine.h5")
        assert one.ask("GET", f"/v1/jobs/{job}/report").body.startswith(b"id\t")
        with h5py.File("mine.h5") as mine, h5py.File("theirs.h5") as theirs:
            assert list(mine) == list(theirs)
            assert all(np.array_equal(mine[name][()], theirs[name][()]) for name in theirs)
        events = one.ask("GET", f"/v1/jobs/{job}/events").body.decode()
        assert events.startswith("event: end\ndata: {")
        assert one.ask("DELETE", f"/v1/jobs/{job}").status == 204
        assert one.ask("GET", f"/v1/jobs/{job}").status == 404
        assert [path.name for path in (tmp_path / "jobs").iterdir()] == []


@pytest.mark.parametrize(
    ("query", "command"),
    [
        ({"what": "scan", "offset": 5}, ("score", "in.fasta", "--scan", "--offset", 5, "-o")),
        (
            {"what": "scan", "method": "wildtype-marginals"},
            ("score", "in.fasta", "--scan", "--method", "wildtype-marginals", "-o"),
        ),
        ({"what": "perplexity", "seed": 7}, ("perplexity", "in.fasta", "--seed", 7, "-o")),
        ({"what": "perplexity", "pseudo": True}, ("perplexity", "in.fasta", "--pseudo", "-o")),
        ({"what": "contacts", "min_probability": 0.05}, ("contacts", "in.fasta", "--min-probability", 0.05, "-o")),
    ],
)
def test_a_job_gives_the_table_of_the_command(
    run: Run, tmp_path: Path, query: dict[str, Any], command: tuple[Any, ...]
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", 3, most=40)
    assert run(*command, "theirs.csv").code == 0
    with running(jobs=tmp_path / "jobs") as one:
        client = protea.Client(one.url)
        job = client.submit(fasta, format="csv", **query)
        *_, last = client.wait(job, every=0.05)
        assert last["done"] == last["total"] > 0
        client.fetch(job, "mine.csv")
        assert Path("mine.csv").read_text() == Path("theirs.csv").read_text()
        assert one.ask("GET", f"/v1/jobs/{job}/report").status == 200
        assert (one.service.gate.tokens, one.service.gate.requests) == (0, 0)


def test_a_job_scores_variants(run: Run, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", 1, most=40)
    wild = fasta.read_text().split()[1]
    variants = f"{wild[0]}1A:{wild[1]}2C,{wild[4]}5del,{wild[3]}9999A"
    options = {"method": "pseudo-likelihood", "offset": 1}
    assert run("score", fasta, "-v", variants, "--method", "pseudo-likelihood", "-o", "theirs.csv").code == 1
    with running(jobs=tmp_path / "jobs") as one:
        client = protea.Client(one.url)
        job = client.submit(fasta, what="score", format="csv", variants=variants, **options)
        assert [state["state"] for state in client.wait(job, every=0.05)][-1] == "done"
        client.fetch(job, "mine.csv")
        assert Path("mine.csv").read_text() == Path("theirs.csv").read_text()
        assert one.ask("GET", f"/v1/jobs/{job}/report").body == Path("theirs.csv.report.tsv").read_bytes()


def test_contact_maps_of_a_job(run: Run, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", 3, most=40)
    assert run("contacts", fasta, "-o", "theirs.h5").code == 0
    with running(jobs=tmp_path / "jobs") as one:
        client = protea.Client(one.url)
        job = client.submit(fasta, what="contacts")
        assert [state["state"] for state in client.wait(job, every=0.05)][-1] == "done"
        client.fetch(job, "mine.h5")
        with h5py.File("mine.h5") as mine, h5py.File("theirs.h5") as theirs:
            assert list(mine) == list(theirs)
            assert all(np.array_equal(mine[name][()], theirs[name][()]) for name in theirs)


def test_what_jobs_refuse(tmp_path: Path) -> None:
    with running(jobs=tmp_path / "jobs") as one:

        def submit(body: bytes, query: str = "") -> int:
            return one.ask("POST", f"/v1/jobs{query}", body, {"Content-Type": "text/x-fasta"}).status

        good = b">a\nMKT\n"
        assert submit(b"") == submit(b"MKT") == submit(b"\x1f\x8b1234") == 422
        assert submit(good, "?what=nothing") == submit(good, "?what=residues&format=csv") == 422
        assert submit(good, "?layers=99") == submit(good, "?pool=median") == submit(good, "?layers=x") == 422
        assert submit(good, "?what=predict") == submit(good, "?what=contacts&pool=max") == 422
        assert submit(good, "?what=scan&format=h5") == submit(good, "?what=scan&method=guess") == 422
        assert submit(good, "?what=score") == submit(good, "?what=score&variants=") == 422
        assert submit(good, "?what=score&variants=M1A,,K2A") == submit(good, "?what=scan&variants=M1A") == 422
        assert submit(good, "?what=scan&long=truncate") == submit(good, "?what=perplexity&long=window") == 422
        assert submit(good, "?what=perplexity&masking=none-such") == submit(good, "?what=embed&seed=1") == 422
        assert submit(good, "?what=predict&adapter=../x") == submit(good, "?model=../x") == 404
        assert one.ask("GET", "/v1/jobs/..%2f..%2fetc").status == 404
        assert list((tmp_path / "jobs").iterdir()) == []
        bad = one.ask("POST", "/v1/jobs", b">a\nMK7\n", {"Content-Type": "text/x-fasta"}).json["id"]
        state = until(lambda: (job := one.ask("GET", f"/v1/jobs/{bad}").json)["state"] == "failed" and job)
        assert "7 at 3" in state["error"]
        assert str(tmp_path) not in state["error"]
        assert one.ask("GET", f"/v1/jobs/{bad}/result").status == 409
        with pytest.raises(protea.ProteaError, match="another service"), running(jobs=tmp_path / "jobs"):
            pass


def test_jobs_of_one_key_are_hidden_from_another(tmp_path: Path) -> None:
    keys = {"anna": "a" * 20, "berta": "b" * 20}
    (tmp_path / "keys").write_text("".join(f"{name} {key}\n" for name, key in keys.items()))
    fasta = write_fasta(tmp_path / "in.fasta", 1)
    with running(jobs=tmp_path / "jobs", api_key_file=tmp_path / "keys") as one:
        anna, berta = (protea.Client(one.url, key=key) for key in keys.values())
        job = anna.submit(fasta)
        assert anna.job(job)["id"] == job
        with pytest.raises(protea.ProteaError, match="no job"):
            berta.job(job)


def test_results_are_kept_for_the_stated_time(tmp_path: Path) -> None:
    with running(jobs=tmp_path / "jobs", keep_hours=1e-9) as one:
        client = protea.Client(one.url)
        client.submit(write_fasta(tmp_path / "in.fasta", 1))
        until(lambda: not list((tmp_path / "jobs").iterdir()))


def test_a_service_removes_only_uploads_that_were_cut_short(tmp_path: Path) -> None:
    upload, foreign = tmp_path / ("a" * 32), tmp_path / ("b" * 32)
    for folder, name in ((upload, "input.fasta"), (foreign, "thesis.txt")):
        folder.mkdir()
        (folder / name).write_text(">a\nMK\n")
    JobStore(tmp_path, 1.0).stop()
    assert not upload.exists()
    assert (foreign / "thesis.txt").exists()
    (foreign / "job.json").write_text('{"of": "a later version"}')
    with pytest.raises(protea.ProteaError, match="b" * 32):
        JobStore(tmp_path, 1.0)
    assert (foreign / "thesis.txt").exists()


@contextmanager
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Running]]:
    """A service in a process of its own."""
    arguments = ["serve", "--port", "0", "--jobs", str(folder)]
    started = subprocess.Popen([sys.executable, "-m", "protea", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert started.stderr is not None
        line = next(line for line in started.stderr if "serving" in line)
        yield started, Running(None, int(line.rpartition(":")[2]))  # type: ignore[arg-type]
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_jobs_survive_the_end_of_the_service(run: Run, tmp_path: Path, how: signal.Signals) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", 300 if how is signal.SIGKILL else 60)
    assert run("embed", fasta, "-o", "theirs.h5").code == 0
    with process(tmp_path / "jobs") as (first, one):
        jobs = [protea.Client(one.url).submit(fasta, format="h5") for _ in range(2)]
        until(lambda: one.ask("GET", f"/v1/jobs/{jobs[0]}").json["done"] > 0)
        os.kill(first.pid, how)
        assert first.wait(60) == (0 if how is signal.SIGTERM else -how)
    states = [json.loads((tmp_path / "jobs" / job / "job.json").read_text())["state"] for job in jobs]
    assert "queued" in states
    (tmp_path / "jobs" / ("0" * 32)).mkdir()  # an upload that was cut short
    with process(tmp_path / "jobs") as (_, one):
        client = protea.Client(one.url)
        for job in jobs:
            list(client.wait(job, every=0.1))
            client.fetch(job, "mine.h5")
            with h5py.File("mine.h5") as mine, h5py.File("theirs.h5") as theirs:
                assert list(mine) == list(theirs)
                assert all(np.array_equal(mine[name][()], theirs[name][()]) for name in theirs)
        assert not (tmp_path / "jobs" / ("0" * 32)).exists()
