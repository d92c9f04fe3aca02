from __future__ import annotations

import csv
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sources import Sources, make_sources, settings

from protea.alphabet import ESM
from protea.data.importers import import_csv, import_fasta, import_parquet
from protea.data.training_store import TrainingStore
from protea.errors import DataError, UsageError
from protea.progress import SILENT


def members(store: TrainingStore, split: str = "train") -> dict[str, list[str]]:
    part = store.split(split)
    clusters = np.arange(part.clusters)
    names = part.ids(np.arange(part.sequences))
    bounds = zip(part.cluster_ids(clusters), part.starts(clusters), part.counts(clusters), strict=True)
    return {name: names[start : start + count] for name, start, count in bounds}


def texts(store: TrainingStore, split: str = "train") -> dict[str, str]:
    part = store.split(split)
    return {name: part.text(row) for row, name in enumerate(part.ids(np.arange(part.sequences)))}


# --- FASTA with a mapping ------------------------------------------------------------------------------------------


def test_fasta_with_its_validation_set(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    valid = tmp_path / "uniref50_valid.fasta"
    valid.write_text(">UniRef50_V1 x\nMKTAYIAK\n>UniRef50_V2\nGDGTQDNL\n")
    import_fasta(settings(tmp_path / "s"), sources.mapping, sources.uniref50, sources.uniref90, valid, SILENT)
    store = TrainingStore(tmp_path / "s", ESM)
    assert members(store) == sources.clusters
    assert texts(store, "valid") == {"UniRef50_V1": "MKTAYIAK", "UniRef50_V2": "GDGTQDNL"}
    valid.write_text(sources.uniref50.read_text().split(">")[1].join((">", "")))
    with pytest.raises(DataError, match=r": 1, .*'UniRef50_C0'"):
        import_fasta(settings(tmp_path / "t"), sources.mapping, sources.uniref50, sources.uniref90, valid, SILENT)


# --- CSV -----------------------------------------------------------------------------------------------------------


def write_csv(folder: Path, records: dict[str, str], shards: int) -> None:
    folder.mkdir(parents=True)
    items = list(records.items())
    for number in range(shards):
        with (folder / f"x{number:03}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["record_id", "record_name", "sequence_length", "sequence"])
            for place, (name, text) in list(enumerate(items))[
                len(items) * number // shards : len(items) * (number + 1) // shards
            ]:
                rows.writerow([place, name, len(text), text])


@pytest.fixture
def shards(tmp_path: Path) -> Sources:
    sources = make_sources(tmp_path)
    write_csv(tmp_path / "uf50/train", {name: sources.sequences[name] for name in sources.clusters}, 3)
    write_csv(tmp_path / "uf50/val", {"V1": "MKTAYIAK"}, 1)
    write_csv(tmp_path / "uf50/test", {"T1": "GDGTQDNL", "T2": "MK"}, 1)
    names = [name for ids in sources.clusters.values() for name in ids]
    write_csv(tmp_path / "uf90", {name: sources.sequences[name] for name in names}, 4)
    counts = np.array([len(ids) for ids in sources.clusters.values()], np.uint64)
    counts.tofile(tmp_path / "counts.mmap")
    (np.cumsum(counts) - counts).astype(np.uint64).tofile(tmp_path / "starts.mmap")
    return sources


def from_csv(tmp_path: Path, output: str, *, attach: bool = True, **values: object) -> TrainingStore:
    more = [tmp_path / name if attach else None for name in ("uf90", "starts.mmap", "counts.mmap")]
    import_csv(settings(tmp_path / output, **values), tmp_path / "uf50", *more, SILENT)
    return TrainingStore(tmp_path / output, ESM)


def test_csv_with_members(tmp_path: Path, shards: Sources) -> None:
    store = from_csv(tmp_path, "store")
    assert members(store) == shards.clusters
    assert texts(store) == {name: shards.sequences[name] for names in shards.clusters.values() for name in names}
    assert (texts(store, "valid"), texts(store, "test")) == ({"V1": "MKTAYIAK"}, {"T1": "GDGTQDNL", "T2": "MK"})


def test_csv_alone(tmp_path: Path, shards: Sources) -> None:
    store = from_csv(tmp_path, "store", attach=False)
    assert texts(store) == {name: shards.sequences[name] for name in shards.clusters}
    assert all(ids == [name] for name, ids in members(store).items())


def test_csv_files_that_contradict_each_other(tmp_path: Path, shards: Sources) -> None:
    with pytest.raises(DataError, match=r"\d+ members .*--max-length"):
        from_csv(tmp_path, "a", max_length=70)
    starts = np.fromfile(tmp_path / "starts.mmap", np.uint64)
    starts[:-1].tofile(tmp_path / "starts.mmap")
    with pytest.raises(DataError, match="29 starts and 30 counts for 30 training clusters"):
        from_csv(tmp_path, "a")
    starts[0] = 1
    starts.tofile(tmp_path / "starts.mmap")
    with pytest.raises(DataError, match="members are in two clusters"):
        from_csv(tmp_path, "b")
    starts[0] = 10**6
    starts.tofile(tmp_path / "starts.mmap")
    with pytest.raises(DataError, match="points beyond the"):
        from_csv(tmp_path, "c")
    (tmp_path / "starts.mmap").write_bytes(b"odd")
    with pytest.raises(DataError, match=r"starts\.mmap, .*counts\.mmap"):
        from_csv(tmp_path, "d")


def test_invalid_csv(tmp_path: Path, shards: Sources) -> None:
    (tmp_path / "uf50/train/x000.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"x000\.csv: no column record_name and no sequence"):
        from_csv(tmp_path, "a", attach=False)
    (tmp_path / "uf50/train/x000.csv").write_text("record_name,sequence\nonly\n")
    with pytest.raises(DataError, match="line 2, record 'only'"):
        from_csv(tmp_path, "b", attach=False)
    for path in (tmp_path / "uf50/train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="train: no CSV files"):
        from_csv(tmp_path, "c", attach=False)
    (tmp_path / "uf50/train").rmdir()
    with pytest.raises(DataError, match="no folder 'train'"):
        from_csv(tmp_path, "d", attach=False)


# --- parquet with SQLite -------------------------------------------------------------------------------------------


@pytest.fixture
def lists(tmp_path: Path) -> Sources:
    sources = make_sources(tmp_path)
    write_lists(tmp_path, sources)
    with sqlite3.connect(tmp_path / "protein.db") as database:
        database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
        rows = [(name, sources.sequences[name]) for names in sources.clusters.values() for name in names]
        database.executemany("INSERT INTO protein VALUES (?, ?)", [*rows, ("V1", "MKTAYIAK"), ("V2", "GDGTQDNL")])
    database.close()
    pd.DataFrame({"ur50_id": ["V2", "V1"]}).to_parquet(tmp_path / "valid.parquet")
    return sources


def write_lists(tmp_path: Path, sources: Sources, *, named: bool = True) -> None:
    columns = {"ur90_id": list(sources.clusters.values())} | ({"ur50_id": list(sources.clusters)} if named else {})
    pd.DataFrame(columns).to_parquet(tmp_path / "train.parquet")


def from_parquet(tmp_path: Path, output: str, **values: object) -> TrainingStore:
    files = [tmp_path / name for name in ("train.parquet", "valid.parquet", "protein.db")]
    import_parquet(settings(tmp_path / output, **values), *files, SILENT)
    return TrainingStore(tmp_path / output, ESM)


def test_parquet_with_sqlite(tmp_path: Path, lists: Sources) -> None:
    store = from_parquet(tmp_path, "a")
    assert members(store) == lists.clusters
    assert texts(store) == {name: lists.sequences[name] for names in lists.clusters.values() for name in names}
    assert texts(store, "valid") == {"V2": "GDGTQDNL", "V1": "MKTAYIAK"}
    write_lists(tmp_path, lists, named=False)
    assert members(from_parquet(tmp_path, "b")) == {names[0]: names for names in lists.clusters.values()}


def test_parquet_with_absent_ids(tmp_path: Path, lists: Sources) -> None:
    pd.DataFrame({"ur50_id": ["V2", "V3"]}).to_parquet(tmp_path / "valid.parquet")
    with pytest.raises(DataError, match=r"valid\.parquet .*: 1, .*'V3'"):
        from_parquet(tmp_path, "a")
    assert list(texts(from_parquet(tmp_path, "b", absent="skip"), "valid")) == ["V2"]
    pd.DataFrame({"ur50_id": ["V2"]}).to_parquet(tmp_path / "valid.parquet")
    lists.clusters["UniRef50_C2"].append("gone")
    write_lists(tmp_path, lists)
    with pytest.raises(DataError, match=r": 1, .*'gone'"):
        from_parquet(tmp_path, "c")


def test_invalid_parquet(tmp_path: Path, lists: Sources) -> None:
    lists.clusters["UniRef50_C2"] = []
    write_lists(tmp_path, lists)
    with pytest.raises(DataError, match=r"train\.parquet, row 3: an empty cluster"):
        from_parquet(tmp_path, "a")
    pd.DataFrame({"id": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no column 'ur90_id', only id"):
        from_parquet(tmp_path, "a")
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"train\.parquet: "):
        from_parquet(tmp_path, "a")
    (tmp_path / "protein.db").write_text("no database")
    with pytest.raises(DataError, match=r"protein\.db: .*SQLite"):
        from_parquet(tmp_path, "a")
    (tmp_path / "protein.db").unlink()
    with pytest.raises(DataError, match=r"protein\.db: no such file"):
        from_parquet(tmp_path, "a")
    with pytest.raises(UsageError, match="--empty representative"):
        from_parquet(tmp_path, "a", empty="representative")
