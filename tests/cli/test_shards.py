"""Many processes and unfinished runs: what must never be lost or mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

from conftest import FASTA, Run, fails


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
    assert run("merge", "r.h5").code == 0  # it is complete
    Path("r.shard-2-of-3.h5").unlink()
    fails(run("merge", "r.h5", "--overwrite"), 1, "shard 2 of 3 is missing")
    Path("s.shard-2-of-3.parquet").unlink()
    assert run(*arguments, *options[:2], "--duplicates", "skip", "--shard", "2/3").code == 0
    fails(run("merge", "s.parquet", "--overwrite"), 1, "(duplicates rename -> skip)")


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
    fasta.write_text(">a\nM0\n")
    fails(run(*arguments, "--devices", 2, "--overwrite"), 1, "shard ", "/2: ", "not a residue: 0 at 2")


def test_folders_that_are_not_ours_are_never_replaced(run: Run, model_folders: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "in.fasta").write_text(FASTA)
    (data / "thesis.txt").write_text("years of work")
    model = ("-m", model_folders["esm2"], "--overwrite")
    (tmp_path / "copy.fasta").write_text(FASTA)
    fails(run("embed", "copy.fasta", *model, "-o", "data"), 1, "data: exists")
    fails(run("embed", "data/in.fasta", *model, "-o", "data"), 2, "-o data", "in.fasta")
    for name in (".", "..", "/", ""):
        fails(run("embed", "copy.fasta", *model, "-o", name), 2, repr(str(Path(name))))
    (tmp_path / "link").symlink_to(data)
    fails(run("embed", "copy.fasta", *model, "-o", "link"), 1, "link: exists")
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
    from protea.embed.outputs import RunJournal, RunState

    commit = RunJournal.commit
    left = [0]

    def limited(self: RunJournal, state: RunState) -> None:
        commit(self, state)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(RunJournal, "commit", limited)
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
    fails(run("embed", fasta, *model, "-r", "b.h5"), 1, "b.h5: ", "a.parquet")
    fails(run("embed", many, *model, "-o", "a.parquet", "-r", "c.h5"), 1, "residues b.h5 -> c.h5")
    assert not Path(".c.h5.partial").exists()
    assert run("embed", fasta, *model, "-r", "b.h5", "--overwrite").code == 0
    Path("b.h5").unlink()
    fails(run("embed", many, *model, "-o", "a.parquet", "-r", "b.h5"), 1, ".b.h5.partial: ", "--overwrite")
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
    assert "continuing after" in result.err


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
        fails(result, 1, "the input changed")
        assert not Path("r.h5").exists()


def test_shards_of_what_is_not_one_whole(
    run: Run, many: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from protea.infer import runner as memory

    many.write_text("".join(f">r{n}\n{'ACDEFGHIKLMNPQRSTVWY' * 5}\n" for n in range(200)))
    arguments = ("embed", many, "-m", model_folders["esm2"], "-o", "s.parquet", "--shard")
    assert run(*arguments, "1/2").code == 0
    monkeypatch.setattr(memory, "available_memory", lambda: 12_000_000)  # another machine
    assert run(*arguments, "2/2").code == 0
    assert run("merge", "s.parquet").code == 0
    assert len(pd.read_parquet("s.parquet")) == 200
    many.write_text(many.read_text() + ">more\nMKT\n")
    assert run(*arguments, "2/2", "--overwrite").code == 0
    fails(run("merge", "s.parquet", "--overwrite"), 1, "(the input has changed)")


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
    fails(run("merge", name, "--overwrite"), 1, f"{shard}: damaged")
    assert kind_of(Path(name), "-o") == kind
    assert len(list(read_store(Path(name), kind).records)) == 60
    assert not list(Path().glob(".*.partial"))
    fails(run("merge", "x.txt"), 2, "unknown suffix '.txt'")


def test_devices_keep_to_their_own_shards(
    run: Run, many: Path, fasta: Path, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from protea.embed import sharded
    from protea.errors import OutputError

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = ("-m", model_folders["esm2"], "--token-budget", 60)
    for number in (1, 2):
        assert run("embed", fasta, *model, "-o", "s.h5", "--shard", f"{number}/2").code == 0
    arguments = ("embed", many, *model, "-o", "s.h5", "-r", "r", "--devices", 2, "--device", "cpu")
    merge = sharded.merge

    def failing(output: Path, *rest: object, **options: object) -> object:
        if output.name == "r":
            raise OutputError("r: stopped here")
        return merge(output, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sharded, "merge", failing)
    fails(run(*arguments), 1, "r: stopped here")
    monkeypatch.setattr(sharded, "merge", merge)
    fails(run(*arguments, "--pool", "max"), 1, "s.h5: an unfinished run")
    result = run(*arguments)
    assert result.code == 0, result
    with h5py.File("s.h5") as file:
        assert list(file) == [f"r{n}" for n in range(60)]
        assert json.loads(file.attrs["protea"])["sequences"] == "s.h5"
    assert len(list(Path("r").glob("*.pt"))) == 60
    assert Path("s.shard-1-of-2.h5").exists()
    assert not list(Path().glob(".*"))


def test_merging_replaces_nothing_beside_a_stale_work_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "big.h5").write_text("precious")
    (tmp_path / ".big.h5.partial").mkdir()
    fails(run("merge", "big.h5"), 1, "big.h5: exists already")
    assert (tmp_path / "big.h5").read_text() == "precious"
