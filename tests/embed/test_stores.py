"""The files embeddings are written to, as their readers see them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from protea.embed.engine import Encoded, FloatArray
from protea.embed.stores import check_path, open_store
from protea.embed.stores.h5 import dataset_name
from protea.errors import OutputError, UsageError
from protea.fasta import Record

RNG = np.random.default_rng(0)


def encoded(record_id: str, length: int = 3, truncated_from: int | None = None) -> Encoded:
    record = Record(record_id, f"about {record_id}", "M" * length, f"x.fasta, line 1, record {record_id!r}")
    return Encoded(record, np.full(length, 20, dtype=np.uint8), truncated_from)


def vectors(*shape: int) -> FloatArray:
    return RNG.normal(size=shape).astype(np.float32)


def test_parquet_one_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    first, second = vectors(1, 4), vectors(1, 4)
    with open_store(path, (6,), {"model": "m"}) as store:
        store.write(encoded("a"), {"mean": first})
        store.write(encoded("b", 5, truncated_from=9), {"mean": second})
    table = pq.read_table(path)
    assert table.schema.names == ["id", "description", "length", "truncated_from", "embedding"]
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert json.loads(table.schema.metadata[b"protea"]) == {"model": "m"}
    frame = pd.read_parquet(path)
    assert frame["id"].tolist() == ["a", "b"]
    assert frame["description"].tolist() == ["about a", "about b"]
    assert frame["length"].tolist() == [3, 5]
    assert frame["truncated_from"].isna().tolist() == [True, False]
    np.testing.assert_array_equal(np.stack(frame["embedding"]), np.concatenate([first, second]))


def test_parquet_names_poolings_and_layers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    mean, largest = vectors(2, 4), vectors(2, 4)
    with open_store(path, (0, 6), {}) as store:
        store.write(encoded("a"), {"mean": mean, "max": largest})
    frame = pd.read_parquet(path)
    assert frame.columns.tolist()[4:] == [
        "embedding_mean_layer0",
        "embedding_mean_layer6",
        "embedding_max_layer0",
        "embedding_max_layer6",
    ]
    np.testing.assert_array_equal(frame["embedding_max_layer6"][0], largest[1])


def test_parquet_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from protea.embed.stores import parquet

    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 100)
    path = tmp_path / "a.parquet"
    rows = [vectors(1, 8) for _ in range(11)]
    with open_store(path, (1,), {}) as store:
        for number, row in enumerate(rows):
            store.write(encoded(str(number)), {"mean": row})
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 3
    np.testing.assert_array_equal(np.stack(pd.read_parquet(path)["embedding"]), np.concatenate(rows))


def test_h5_one_dataset_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    residues, other = vectors(1, 3, 4), vectors(1, 5, 4)
    with open_store(path, (6,), {"model": "m"}) as store:
        store.write(encoded("sp|P1/2|X"), {"residues": residues})
        store.write(encoded("b", 5, truncated_from=9), {"residues": other})
    with h5py.File(path) as file:
        assert sorted(file) == ["b", "sp|P1%2F2|X"]
        np.testing.assert_array_equal(file["sp|P1%2F2|X"][:], residues[0])
        attributes = dict(file["b"].attrs)
        assert attributes == {"id": "b", "description": "about b", "length": 5, "truncated_from": 9}
        assert file["sp|P1%2F2|X"].attrs["id"] == "sp|P1/2|X"
        assert file["sp|P1%2F2|X"].attrs["truncated_from"] == 0
        assert json.loads(file.attrs["protea"]) == {"model": "m"}
        assert file.attrs["layers"].tolist() == [6]


def test_h5_layers_and_poolings(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    mean, largest = vectors(2, 4), vectors(2, 4)
    with open_store(path, (0, 6), {}) as store:
        store.write(encoded("a"), {"mean": mean, "max": largest})
    with h5py.File(path) as file:
        assert sorted(file) == ["a", "a@max"]
        np.testing.assert_array_equal(file["a"][:], mean)
        np.testing.assert_array_equal(file["a@max"][:], largest)


def test_h5_names() -> None:
    assert dataset_name("a/b//c") == "a%2Fb%2F%2Fc"
    assert dataset_name(".") == "%2E"
    assert dataset_name("..") == ".."


@pytest.mark.parametrize("record_id", ["a/b", ".", "..", "x" * 5000, "ü", "a@b", "%", "a b"])
def test_h5_holds_any_id(tmp_path: Path, record_id: str) -> None:
    path = tmp_path / "a.h5"
    with open_store(path, (1,), {}) as store:
        store.write(encoded(record_id), {"mean": vectors(1, 4)})
    with h5py.File(path) as file:
        (name,) = file
        assert file[name].attrs["id"] == record_id


def test_h5_names_that_collide(tmp_path: Path) -> None:
    def write_both() -> None:
        with open_store(tmp_path / "a.h5", (1,), {}) as store:
            store.write(encoded("a/b"), {"mean": vectors(1, 4)})
            store.write(encoded("a%2Fb"), {"mean": vectors(1, 4)})

    with pytest.raises(OutputError, match=r"record 'a%2Fb': the dataset 'a%2Fb' exists already"):
        write_both()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.h5", "a.parquet"])
def test_a_file_appears_only_when_complete(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write_and_break_off() -> None:
        with open_store(path, (1,), {}) as store:
            store.write(encoded("a"), {"mean": vectors(1, 4)})
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_break_off()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.h5", "a.parquet"])
def test_an_older_file_survives_a_failure(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("older")
    with pytest.raises(RuntimeError), open_store(path, (1,), {}):
        raise RuntimeError
    assert path.read_text() == "older"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("name", ["a.h5", "a.parquet"])
def test_a_folder_without_permission(tmp_path: Path, name: str) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=f"{name}: cannot be written: Permission denied"):
        open_store(tmp_path / name, (1,), {}).__enter__()


@pytest.mark.parametrize("name", ["a.h5", "a.parquet"])
def test_what_the_file_system_refuses(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        open_store(tmp_path / ("x" * 300 + name), (1,), {}).__enter__()


def test_paths_are_checked_before_work(tmp_path: Path) -> None:
    suffixes = (".h5", ".parquet")
    with pytest.raises(UsageError, match=r"-o a.csv: unknown suffix '.csv'; use .h5 or .parquet"):
        check_path(Path("a.csv"), suffixes, "-o", overwrite=False)
    existing = tmp_path / "a.h5"
    existing.write_text("")
    with pytest.raises(OutputError, match=r"exists already; choose another name or pass --overwrite"):
        check_path(existing, suffixes, "-o", overwrite=False)
    check_path(existing, suffixes, "-o", overwrite=True)
    with pytest.raises(OutputError, match=r"there is no folder .*absent; create it first"):
        check_path(tmp_path / "absent" / "a.h5", suffixes, "-o", overwrite=False)
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_path(tmp_path / "folder.h5", suffixes, "-o", overwrite=True)
