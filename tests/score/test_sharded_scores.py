"""Shards of ``protea score``: joined, they are what one process writes, to the byte."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from conftest import Run, fails
from protea.errors import FinishedError
from protea.output import report_path, run_path
from protea.score.effects import METHODS, Protein, Scoring
from protea.score.notation import parse
from protea.score.sharded_scores import merge_scores
from protea.score.variant_table import score_variants
from protea.shards import Shard
from protea.tables import write_table

SEQUENCES = {"a": "MKTAYIAKQRQISFVKSHFSRQ", "b": "WWKKAJ", "c": "MKTAYIAKQ"}
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
SUFFIXES = ("csv", "tsv", "csv.gz", "parquet")


@pytest.fixture
def folder(model_folders: dict[str, Path], tmp_path: Path, one_thread: None) -> Path:
    (tmp_path / "p.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in SEQUENCES.items()))
    return model_folders["esm2"]


def contents(path: Path) -> list[bytes]:
    return [place.read_bytes() for place in (path, report_path(path), run_path(path))]


def rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Variants of all proteins in any order, some of which do not fit, and cells that are hard to write."""
    draw = random.Random(seed)
    table: dict[str, list[Any]] = {"id": [], "note": [], "mutant": []}
    for _ in range(count):
        name = draw.choice([*SEQUENCES])
        sequence = SEQUENCES[name]
        places = sorted(draw.sample(range(len(sequence)), draw.randint(1, 3)))
        names = [f"{sequence[place]}{place + 1}{draw.choice(LETTERS)}" for place in places]
        table["id"].append(name)
        table["note"].append(draw.choice(["", "#1", "# two", "a,b", 'say "x"', "two\nlines", "a;b", "é"]))
        table["mutant"].append(draw.choice([":".join(names), ":".join(names), "W1A", ""]))
    return table


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 30),
    shards=st.integers(1, 5),
    method=st.sampled_from(METHODS),
    suffix=st.sampled_from(SUFFIXES),
    seed=st.integers(0, 1000),
)
def test_joined_shards_are_the_whole(
    folder: Path, tmp_path: Path, count: int, shards: int, method: str, suffix: str, seed: int
) -> None:
    table = tmp_path / "v.parquet"
    write_table(table, pa.table({"x": range(count + 1)} | rows(count + 1, seed)))
    how = Scoring(method=method, token_budget=60)

    def score(name: str, shard: Shard | None = None) -> Path:
        output = tmp_path / f"{name}.{suffix}"
        score_variants(
            str(tmp_path / "p.fasta"), table, how, models=[str(folder)], output=output, shard=shard, overwrite=True
        )
        return output if shard is None else shard.output(output)

    whole = score("whole")
    parts = [score("joined", Shard(number=number, of=shards)) for number in range(1, shards + 1)]
    joined = tmp_path / f"joined.{suffix}"
    merge_scores(joined, parts, overwrite=True)
    assert contents(joined) == contents(whole)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 99),
)
def test_work_is_that_of_all_passes(lengths: list[int], method: str, seed: int) -> None:
    draw = random.Random(seed)
    how = Scoring(method=method)
    for length in lengths:
        sequence = "".join(draw.choices(LETTERS, k=length))
        places = [sorted(draw.sample(range(length), draw.randint(1, min(3, length)))) for _ in range(6)]
        names = [":".join(f"{sequence[place]}{place + 1}A" for place in some) for some in places]
        protein = Protein("p", sequence, [parse(name, sequence, 1) for name in names])
        passes = how.passes([protein]) - (length if method.startswith("pseudo") else 0)  # the wild type's
        assert how.work(protein).sum() == pytest.approx(length * passes)


def test_the_command(run: Run, folder: Path) -> None:
    """Rows that cannot be scored do not make a shard fail, which a scheduler would repeat, but the merge."""
    Path("v.csv").write_text("id,mutant\na,M1V\nb,W1A\na,W1A\nc,K2R:T3S\n")
    command = ("score", "p.fasta", "v.csv", "-m", folder)
    whole = run(*command, "-o", "whole.csv")
    assert whole.code == 1
    fails(run(*command, "-o", "s.csv", "--shard", "3/2"), 2, "--shard '3/2'", "i/N")
    fails(run(*command, "-o", "s.csv", "--ray", "auto", "--shard", "1/2"), 2, "--ray", "--shard")
    fails(run(*command, "-o", "s.csv", "--shards", "2"), 2, "--shards", "--ray")
    fails(run("score", "p.fasta", "-v", "M1V", "-m", folder, "--shard", "1/2"), 2, "-o")
    scan = ("score", "p.fasta", "--scan", "-m", folder, "-o", "scan.csv", "--plot", "scan.html")
    fails(run(*scan, "--shard", "1/2"), 2, "--plot", "--shard")
    fails(run("merge", "s.csv"), 1, "s.csv: no shards")
    told = {}
    for number in (2, 1):
        part = run(*command, "-o", "s.csv", "--shard", f"{number}/2")
        assert part.code == 0, part
        assert f"s.shard-{number}-of-2.csv: " in part.out
        told[number] = part
        again = run(*command, "-o", "s.csv", "--shard", f"{number}/2")
        assert (again.code, "nothing to do" in again.err) == (0, True)
    # Rows are told of by the shard that has them, all else by the first; the report has all.
    notes = {number: [line for line in part.err.splitlines() if "note:" in line] for number, part in told.items()}
    assert sorted(notes[1] + notes[2]) == sorted(line for line in whole.err.splitlines() if "note:" in line)
    assert notes[2] == [line for line in whole.err.splitlines() if "row 3" in line]
    assert sum(int(part.out.split(": ")[1].split()[0]) for part in told.values()) == 3
    merged = run("merge", "s.csv")
    assert merged.code == 1
    assert "1 row could not be scored" in merged.err
    assert contents(Path("s.csv")) == contents(Path("whole.csv"))
    fails(run("merge", "s.csv"), 1, "s.csv", "failed in part")
    fails(run(*command, "-o", "s.csv", "--shard", "1/2", "--offset", 2), 1, "offset 1 -> 2")
    assert run(*command, "-o", "s.csv", "--shard", "1/2", "--offset", 2, "--overwrite").code == 0
    fails(run("merge", "s.csv", "--overwrite"), 1, "different runs (offset 2 -> 1)")
    Path("s.shard-1-of-2.csv").write_text("id\n")
    fails(run("merge", "s.csv", "--overwrite"), 1, "s.shard-1-of-2.csv", "run that shard again")


def test_a_scan_of_one_protein_is_divided(run: Run, folder: Path) -> None:
    Path("one.fasta").write_text(f">a\n{SEQUENCES['a']}\n")
    command = ("score", "one.fasta", "--scan", "-m", folder)
    for number in (1, 2, 3):
        assert run(*command, "-o", "s.parquet", "--shard", f"{number}/3").code == 0
    sizes = [parquet.read_metadata(f"s.shard-{number}-of-3.parquet").num_rows for number in (1, 2, 3)]
    assert max(sizes) - min(sizes) <= 1
    assert run("merge", "s.parquet").code == 0
    assert run(*command, "-o", "whole.parquet").code == 0
    assert contents(Path("s.parquet")) == contents(Path("whole.parquet"))
    for number in (1, 2):
        assert run(*command, "-o", "t.csv", "--shard", f"{number}/2").code == 0
    several = run("merge", "s.parquet", "t.csv")  # what is complete does not end the others
    assert (several.code, "s.parquet: complete" in several.err, "t.csv: 2 shards" in several.out) == (0, True, True)
    with pytest.raises(FinishedError):
        merge_scores(Path("s.parquet"), [Path(f"s.shard-{number}-of-3.parquet") for number in (1, 2, 3)])
    assert np.isfinite(parquet.read_table("s.parquet")["model_score"].to_numpy()).all()
