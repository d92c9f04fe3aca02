"""What ``protea embed`` makes of tables, alignments, DNA and files that are cut short."""

from __future__ import annotations

import csv
import gzip
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import LoadModel, Run, fails
from protea.embed import run as runs
from protea.embed.run import EmbedRun
from protea.embed.settings import EmbedSettings
from protea.errors import DamagedFileError, FastaError, ResumeError
from test_fasta import COMPRESSORS
from test_letters import DNA

ROWS = [("a", "MKTAYIAKQR"), ("b", ""), ("c|3/x", "acdefghiklmnpqrstvwyx"), ("d", "MK-T*")]


@pytest.fixture
def model(model_folders: dict[str, Path]) -> tuple[str, Path]:
    return "-m", model_folders["esm2"]


def write_inputs(folder: Path, rows: list[tuple[str, str]]) -> tuple[Path, Path]:
    """The same records as FASTA and as CSV."""
    fasta, table = folder / "in.fasta", folder / "in.csv.gz"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in rows))
    with gzip.open(table, "wt", newline="") as file:
        csv.writer(file).writerows([("Entry", "Length", "Sequence"), *((name, 0, letters) for name, letters in rows)])
    return fasta, table


def embedded(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path).drop(columns="description")


def test_a_table_is_embedded_as_fasta_is(run: Run, model: tuple[str, Path], tmp_path: Path, one_thread: None) -> None:
    fasta, table = write_inputs(tmp_path, ROWS)
    notes = []
    for path in (fasta, table):
        result = run("embed", path, *model, "-o", f"{path}.parquet", "-r", f"{path}.h5")
        assert result.code == 0, result
        notes.append([line for line in result.err.splitlines() if line.startswith("protea: note: gaps")])
    pd.testing.assert_frame_equal(embedded(Path(f"{fasta}.parquet")), embedded(Path(f"{table}.parquet")))
    assert Path(f"{fasta}.h5.report.tsv").read_bytes() == Path(f"{table}.h5.report.tsv").read_bytes()
    assert notes[0] == notes[1] != []
    Path("two.csv").write_text("id,name,heavy\n1,a,MKT\n")
    fails(run("embed", "two.csv", *model, "-o", "two.parquet"), 1, "two.csv", "--id-column", "id, name, heavy")
    columns = ("--id-column", "name", "--sequence-column", "heavy")
    fails(run("embed", "in.fasta", *model, "-o", "x.parquet", *columns), 2, "in.fasta: is no table", "no column name")
    assert run("embed", "two.csv", *model, "-o", "two.parquet", *columns).code == 0
    assert list(pd.read_parquet("two.parquet")["id"]) == ["a"]
    assert run("embed", "--config", "two.parquet.run.yaml", "-o", "again.parquet").code == 0


def test_gaps_and_dna_are_told_once_and_reported(
    run: Run, model: tuple[str, Path], tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file, and from standard input, which is read only once."""
    (tmp_path / "in.a3m").write_text(f">q\nMKTAY\n>r\nM-TaaA-\n>s\nM.TA-\n>dna\n{DNA}\n>rna\n{DNA.replace('T', 'U')}\n")
    for number, path in enumerate(("in.a3m", "-")):
        with (tmp_path / "in.a3m").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            result = run("embed", path, *model, "-o", f"{number}.parquet")
        assert result.code == 0, result
        assert result.err.count("gaps, which count as residues: 2 records, the first is record 'r'; --gaps drop") == 1
        assert result.err.count("DNA or RNA, read as amino acids: 2 records, the first is record 'dna'; translate") == 1
        assert "1 altered, 2 gapped, 2 records that look like DNA or RNA: see" in result.err
        report = pd.read_csv(f"{number}.parquet.report.tsv", sep="\t")
        kinds = [f"{row.id} {row.what}" for row in report.itertuples()]
        assert kinds == ["r altered", "r gapped", "s gapped", "dna nucleotides", "rna nucleotides"]
    (tmp_path / "bare.fasta").write_text(">q\nMKTAY\n>r\nMTAAA\n>s\nMTA\n")
    assert run("embed", "bare.fasta", *model, "-o", "bare.parquet").code == 0
    result = run("embed", "in.a3m", *model, "-o", "dropped.parquet", "--gaps", "drop")
    assert "gaps, which" not in result.err
    report = pd.read_csv("dropped.parquet.report.tsv", sep="\t").set_index("id")["detail"]
    assert report["r"] == "2 gaps removed; 2 lower-case letters changed to upper case"
    bare, dropped = (np.stack(pd.read_parquet(f"{name}.parquet")["embedding"]) for name in ("bare", "dropped"))
    assert np.abs(bare - dropped[:3]).max() <= 1e-5 * np.abs(bare).max()


@pytest.mark.long
def test_devices_tell_too(run: Run, model: tuple[str, Path], tmp_path: Path, one_thread: None) -> None:
    (tmp_path / "in.fasta").write_text(f">q\nMKTAY\n>r\nM-TA-\n>dna\n{DNA}\n")
    result = run("embed", "in.fasta", *model, "-o", "out.parquet", "--device", "cpu", "--devices", "2")
    assert result.code == 0, result
    assert result.err.count("gaps, which count as residues: record 'r'; ") == 1
    assert result.err.count("DNA or RNA, read as amino acids: record 'dna'; ") == 1


SLOW = [pytest.param(name, marks=pytest.mark.long) for name in ("gz", "bz2", "xz")]


@pytest.mark.parametrize("suffix", ["zst", *SLOW])
def test_files_cut_at_every_byte(load_small: LoadModel, tmp_path: Path, one_thread: None, suffix: str) -> None:
    module = load_small("esm2").module
    for name, content in (("in.fasta", b">a\nMKT\n>b\nAAA\n"), ("in.csv", b"id,seq\na,MKT\nb,AAA\n")):
        whole = COMPRESSORS[suffix](content)
        path = tmp_path / f"{name}.{suffix}"
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            settings = EmbedSettings(inputs=(str(path),), sequences=tmp_path / "out.h5")
            with pytest.raises(FastaError, match=path.name) as caught:
                EmbedRun(settings, module, {}, overwrite=True)()
            assert size == 0 or isinstance(caught.value, DamagedFileError)
            assert not (tmp_path / "out.h5").exists()


def test_a_run_over_a_table_goes_on_where_it_stopped(
    load_small: LoadModel, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption after some packs; then the same table, or a changed one."""
    monkeypatch.setattr(runs, "_COMMIT_SECONDS", 0.0)
    module = load_small("esm2").module
    table = tmp_path / "in.csv"

    def job(name: str) -> EmbedRun:
        return EmbedRun(EmbedSettings(inputs=(str(table),), sequences=tmp_path / name, token_budget=20), module, {})

    lines = ["id,sequence", *(f"r{number},{'MKTAYIAKQR'[: number % 9 + 1]}" for number in range(40))]
    table.write_text("\n".join(lines))
    job("whole.parquet")()
    write = EmbedRun._write

    def stop(self: EmbedRun, *arguments: object) -> object:
        if self._done.records >= 20:
            raise KeyboardInterrupt
        return write(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(EmbedRun, "_write", stop)
        for name in ("same.parquet", "changed.parquet"):
            with pytest.raises(KeyboardInterrupt):
                job(name)()
    assert job("same.parquet")().embedded == 40
    same, whole = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("same", "whole"))
    pd.testing.assert_frame_equal(same, whole)
    table.write_text("\n".join([*lines[:-1], "r39,MMMM"]))
    with pytest.raises(ResumeError, match="input has changed"):
        job("changed.parquet")()
