"""``protea data``: what it prints, and what it refuses."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, fails
from messages import check_message
from protea.data.manifest import split_line, step_line

UNIREF50 = "".join(f">UniRef50_{n} x\n{'MKTAYIAKQR' * (n + 1)}\n" for n in range(12))
UNIREF90 = "".join(f">UniRef90_{n}_{k}\n{'MKTAYIAKQJ' * (n + 1)}\n" for n in range(12) for k in range(2))
MAPPING = "".join(f"UniRef50_{n}\tUniRef90_{n}_0,UniRef90_{n}_1\n" for n in range(12))


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    names = ("u50.fasta", "u90.fasta", "map.tsv")
    for name, text in zip(names, (UNIREF50, UNIREF90, MAPPING), strict=True):
        (tmp_path / name).write_text(text)
    return ["--uniref50", "u50.fasta", "--uniref90", "u90.fasta", "--members", "map.tsv"]


@pytest.fixture
def store(run: Run, files: list[object]) -> Path:
    assert run("data", "uniref", *files, "--no-filter", "--valid", "25%", "-o", "store").code == 0
    return Path("store")


def test_uniref(run: Run, files: list[object]) -> None:
    result = run("data", "uniref", *files, "--no-filter", "--valid", "25%", "-o", "store")
    assert result.code == 0
    out = result.out.splitlines()
    assert out[0].startswith("store/train: 9 clusters, 18 sequences, ")
    assert out[1].startswith("store/valid: 3 clusters, 3 sequences, ")
    assert "draw: 12 clusters, 3 valid, 9 train" in result.err
    assert "24 records altered or skipped: see store/report.tsv" in result.err
    report = Path("store/report.tsv").read_text().splitlines()
    assert report[0] == "id\twhat\tdetail"
    assert report[1] == "UniRef90_0_0\taltered\treplaced by X: J at 10"
    assert not Path("store.problems.tsv").exists()


def test_import(run: Run, files: list[object]) -> None:
    result = run("data", "import", "--mapping", "map.tsv", *files[:4], "-o", "store")
    assert result.out.startswith("store/train: 12 clusters, 24 sequences, ")


def test_one_is_not_a_plural() -> None:
    counts = {"step": "filter", "searches": 1, "commands": [], "clusters": 1, "altered_records": 1, "removed": 1}
    assert step_line(counts) == "filter: 1 search, 1 cluster, 1 altered record, 1 removed"
    assert split_line({"clusters": 2, "sequences": 1, "residues": 1}) == "2 clusters, 1 sequence, 1 residue"


def test_info(run: Run, store: Path) -> None:
    result = run("data", "info", store, "--verify")
    assert result.code == 0
    for part in ("protea data uniref", "verified", "train       9 clusters, 18 sequences", "0 to 127", "A 20.00%"):
        assert part in result.out
    found = json.loads(run("data", "info", store, "--json").out)
    assert found["splits"]["train"]["sequences"] == 18
    assert found["hashes"] == "not compared"


def test_plots(run: Run, store: Path) -> None:
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert run("data", "info", store, "--plot", f"p.{kind}").out.startswith(f"p.{kind}: lengths and composition\n")
        assert Path(f"p.{kind}").read_bytes().startswith(begins)
    as_json = run("data", "info", store, "--plot", "p.png", "--json")
    assert json.loads(as_json.out)["splits"]
    assert "p.png: lengths and composition" in as_json.err
    fails(run("data", "info", store, "--plot", "p.txt"), 2, "use a name that ends in .png, .svg")
    fails(run("data", "info", store, "--plot", "no/p.png"), 1, "no/p.png: cannot be written: No such file")


def test_plots_need_matplotlib(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(
        name: str,
        given: Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, given, local, names, level)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    fails(run("data", "info", store, "--plot", "p.png"), 1, "install 'protea[plot]'")


def test_damaged_stores_are_reported_in_one_line(run: Run, store: Path) -> None:
    path = store / "train/sequences.arrow"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    fails(run("data", "info", store, "--verify"), 1, "does not match the manifest")
    fails(run("data", "info", "nowhere"), 1, "nowhere: no such folder")


def test_wrong_usage(run: Run, files: list[object]) -> None:
    fails(run("data", "uniref", *files, "--no-filter", "--valid", "many", "-o", "s"), 2, "--valid many")
    fails(run("data", "uniref", *files, "--alphabet", "dna", "-o", "s"), 2, "unknown alphabet 'dna'")
    fails(run("data", "uniref", *files[:2], *files[4:], "-o", "s"), 2, "--members needs --uniref90")
    fails(run("data", "import", "-o", "s"), 2, "with one of --mapping, --csv, --train-clusters")
    fails(run("data", "import", "--mapping", "map.tsv", "-o", "s"), 2, "--mapping needs --uniref50 and --uniref90")
    fails(run("data", "import", "--train-clusters", "t", "-o", "s"), 2, "--train-clusters needs --database")
    fails(run("data", "fasta", "-o", "s"), 2, "protea data fasta --help")
    fails(run("data", "uniref", *files, "-o", "s", "--mmseqs", "nosuch"), 1, "apt-get install mmseqs2")
    assert run("data").code == 2


def test_bad_input_is_one_line(run: Run, files: list[object], tmp_path: Path) -> None:
    plain = [*files, "--no-filter", "--valid", "2"]
    Path("map.tsv").write_text(MAPPING + "UniRef50_3\tUniRef90_4_0\n")
    result = run("data", "uniref", *plain, "-o", "s")
    assert result.code == 1
    check_message("data.two_clusters", result.err.splitlines()[-1])
    Path("map.tsv").write_text(MAPPING.replace("UniRef90_4_0", "UniRef90_gone"))
    result = run("data", "uniref", *plain, "-o", "s")
    check_message("data.absent", result.err.splitlines()[-1])
    listed = "UniRef90_gone\tUniRef50_4\tabsent\n"
    assert Path("s.problems.tsv").read_text() == listed
    assert run("data", "uniref", *files, "--mmseqs", "nosuch", "--valid", "2", "-o", "s").code == 1
    assert Path("s.problems.tsv").read_text() == listed, "a build without such problems keeps the list"
    assert run("data", "uniref", *plain, "-o", "s").code == 1
    assert Path("s.problems.tsv").read_text() == listed, "the same problems take its place"
    assert run("data", "uniref", *plain, "--absent", "skip", "-o", "s").code == 0
    assert not Path("s.problems.tsv").exists()
    fails(run("data", "uniref", *plain, "-o", "s"), 1, "s: exists already", "absent skip -> error", "--overwrite")
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("command", ["uniref", "fasta", "import", "info"])
def test_help_has_examples(run: Run, command: str) -> None:
    result = run("data", command, "--help")
    assert result.code == 0
    assert f"protea data {command}" in result.out.split("Examples:")[1]
