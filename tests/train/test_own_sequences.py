"""Training on FASTA files in one command, with and without MMseqs2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import Run, fails
from messages import check_message
from trials import write_fasta

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("batch.tokens=128", "batch.pack=64", "data.max_tokens=64", "run.steps=2", "run.precision=float32")


@pytest.fixture
def command(model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Continue from a small model on a family of 250 sequences, on a machine without MMseqs2."""
    write_fasta(tmp_path / "family.fasta", 250)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    init, more = f"init={model_folders['esm2']}", ("schedule.warmup=1", "log.tensorboard=false", "validation.tokens=64")
    return ("pretrain", "domain-adaptation", init, "data.fasta=family.fasta", *SMALL, *more)


def test_one_command_without_mmseqs(run: Run, command: tuple[object, ...]) -> None:
    done = run(*command, "data.cluster=false", "-o", "run")
    assert done.code == 0, done.err
    assert "data.cluster=false: validation sequences may resemble training sequences" in done.err
    manifest = json.loads(Path("run/store/manifest.json").read_text())
    assert {name: split["clusters"] for name, split in manifest["splits"].items()} == {"train": 238, "valid": 12}
    assert run("export", "run", "-o", "model", "--checkpoint", "best").code == 0
    assert run("embed", "family.fasta", "-m", "model", "-o", "out.parquet").code == 0
    # With clusters it would be another store.
    changed = run(*command, "-o", "run", "--accept-changes")
    assert changed.code == 1
    assert "MMseqs2 is not installed" in changed.err


def test_the_way_out_is_told(run: Run, command: tuple[object, ...]) -> None:
    refused = run(*command, "-o", "run")
    fails(refused, 1, "data.fasta: mmseqs: MMseqs2 is not installed", "data.cluster=false")
    check_message("train.no_mmseqs", refused.err)
    Path("family.fasta").write_text(">a\nMKT\n>b\nM1T\n" + "".join(f">{n}\nMKT\n" for n in range(18)))
    odd = run(*command, "data.cluster=false", "-o", "run")
    assert odd.code == 1
    assert "1 at 2" in odd.err
    assert "`protea data fasta`" in odd.err.splitlines()[-1]


def test_too_few_sequences_to_validate_on(run: Run, command: tuple[object, ...]) -> None:
    """Refused before anything is built; the advice is what helps with that number of sequences."""
    for number, clustered, least in ((5, "true", 200), (5, "false", 20), (30, "true", 200)):
        write_fasta(Path("family.fasta"), number)
        refused = run(*command, f"data.cluster={clustered}", "-o", "run")
        assert refused.code == 1
        for part in (f"data.fasta: {number} sequences; ", f" at least {least}: ", "validation.every=null"):
            assert part in refused.err
        assert ("set data.cluster=false" in refused.err) == (number == 30)
        assert not Path("run/store").exists()
    check_message("train.too_few_sequences", refused.err.splitlines()[-1])
    done = run(*command, "data.cluster=false", "validation.every=null", "-o", "run")
    assert done.code == 0, done.err
    assert "made by     protea pretrain\n" in run("data", "info", "run/store").out


@pytest.mark.parametrize("number", [5, 30])
def test_a_dry_run_refuses_the_data_that_a_run_refuses(run: Run, command: tuple[object, ...], number: int) -> None:
    """With the same error, after nothing else; as many sequences as a run needs are enough."""
    write_fasta(Path("family.fasta"), number)
    for changes in (("data.cluster=true",), ("data.fasta=gone.fasta",), ("data.fasta=[family.fasta,gone.fasta]",)):
        for more in ((), ("validation.every=null",)):
            if changes == ("data.cluster=true",) and more:
                continue
            told = run(*command, "data.cluster=false", *changes, *more, "--dry-run")
            assert (told.code, told.out) == (1, "")
            real = run(*command, "data.cluster=false", *changes, *more, "-o", "run")
            assert told.err.splitlines()[-1] == real.err.splitlines()[-1]
            assert "gone.fasta" in told.err or f"{number} sequences" in told.err
            shutil.rmtree("run")
    told = run(*command, "data.cluster=false", "validation.every=null", "--dry-run")
    assert (told.code, told.out.splitlines()[-1][-4:]) == (0, "fits")


def test_a_dry_run_looks_at_the_store(run: Run, command: tuple[object, ...]) -> None:
    shared = ("--no-filter", "--valid", "0", "-o", "store")
    assert run("data", "uniref", "--uniref50", "family.fasta", *shared).code == 0
    with_store = [part for part in command if part != "data.fasta=family.fasta"]
    for store, part in (("gone", "gone: no such folder"), ("store", "no valid split")):
        told = run(*with_store, f"data.store={store}", "--dry-run")
        real = run(*with_store, f"data.store={store}", "-o", f"run-{store}")
        fails(told, 2 if store == "store" else 1, part)
        assert told.err.splitlines()[-1] == real.err.splitlines()[-1]
    assert run(*with_store, "data.store=store", "validation.every=null", "--dry-run").code == 0
