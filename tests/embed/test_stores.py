"""The files embeddings are written to, as their readers see them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from protea.embed.stores import RESIDUES, Array, ArrayLayout, StoredRecord, kind_of, open_store, read_store
from protea.errors import UsageError

RNG = np.random.default_rng(0)
Row = tuple[StoredRecord, dict[str, Array]]


def entry(record_id: str, length: int = 3, truncated_from: int | None = None) -> StoredRecord:
    return StoredRecord(record_id, f"about {record_id}", length, truncated_from)


def vectors(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def layout(*kinds: str, layers: tuple[int, ...] = (6,), **options: Any) -> ArrayLayout:
    return ArrayLayout(kinds, layers, 4, options.pop("dtype", "float32"), **options)


def write(path: Path, shape: ArrayLayout, rows: Iterable[Row], provenance: Mapping[str, Any] | None = None) -> Path:
    work = path.with_name(f"work-{path.name}")
    work.mkdir()
    store = open_store(kind_of(path, "-o"), work, shape, None)
    for one, arrays in rows:
        store.write(one, arrays)
    store.finish(provenance or {}).replace(path)
    store.abandon()
    return path


def test_parquet_one_vector_a_sequence(tmp_path: Path) -> None:
    first, second = vectors(1, 4), vectors(1, 4)
    rows = [(entry("a"), {"mean": first}), (entry("b", 5, 9), {"mean": second})]
    path = write(tmp_path / "a.parquet", layout("mean"), rows, {"model": "m"})
    table = pq.read_table(path)
    assert table.schema.names == ["id", "description", "length", "truncated_from", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[4]"
    assert json.loads(pq.read_metadata(path).metadata[b"protea"]) == {"model": "m"}
    for frame in (pd.read_parquet(path), pl.read_parquet(path).to_pandas()):
        assert frame["id"].tolist() == ["a", "b"]
        assert frame["description"].tolist() == ["about a", "about b"]
        assert frame["length"].tolist() == [3, 5]
        assert frame["truncated_from"].isna().tolist() == [True, False]
        np.testing.assert_array_equal(np.stack(frame["embedding"].tolist()), np.concatenate([first, second]))


def test_parquet_one_vector_a_residue(tmp_path: Path) -> None:
    first, second = vectors(1, 3, 4), vectors(1, 5, 4)
    rows = [(entry("a"), {RESIDUES: first}), (entry("b", 5), {RESIDUES: second})]
    path = write(tmp_path / "a.parquet", layout(RESIDUES), rows)
    assert str(pq.read_schema(path).field("embedding").type) == ("list<element: fixed_size_list<element: float>[4]>")
    frame = pd.read_parquet(path)
    np.testing.assert_array_equal(np.stack(frame["embedding"][1]), second[0])
    np.testing.assert_array_equal(np.array(pl.read_parquet(path)["embedding"][0].to_list(), np.float32), first[0])


def test_parquet_names_poolings_and_layers(tmp_path: Path) -> None:
    mean, largest = vectors(2, 4), vectors(2, 4)
    path = write(
        tmp_path / "a.parquet", layout("mean", "max", layers=(0, 6)), [(entry("a"), {"mean": mean, "max": largest})]
    )
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

    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 60)
    rows = [(entry(str(number)), {"mean": vectors(1, 4)}) for number in range(11)]
    path = write(tmp_path / "a.parquet", layout("mean"), rows)
    assert pq.ParquetFile(path).num_row_groups == 3
    expected = np.concatenate([arrays["mean"] for _, arrays in rows])
    np.testing.assert_array_equal(np.stack(pd.read_parquet(path)["embedding"]), expected)


def test_h5_one_dataset_a_record(tmp_path: Path) -> None:
    residues, other = vectors(1, 3, 4), vectors(1, 5, 4)
    rows = [(entry("sp|P1/2|X"), {RESIDUES: residues}), (entry("b", 5, 9), {RESIDUES: other})]
    path = write(tmp_path / "a.h5", layout(RESIDUES), rows, {"model": "m"})
    with h5py.File(path) as file:
        assert list(file) == ["sp|P1%2F2|X", "b"], "in the order of the input"
        np.testing.assert_array_equal(file["sp|P1%2F2|X"][:], residues[0])
        attributes = dict(file["b"].attrs)
        assert attributes == {"id": "b", "description": "about b", "length": 5, "truncated_from": 9}
        assert file["sp|P1%2F2|X"].attrs["id"] == "sp|P1/2|X"
        assert file["sp|P1%2F2|X"].attrs["truncated_from"] == 0
        assert json.loads(file.attrs["protea"]) == {"model": "m"}
        assert file.attrs["layers"].tolist() == [6]


def test_h5_as_readers_of_uniprots_files_read_it(tmp_path: Path) -> None:
    """The loop of UniProt's help page on embeddings: every item is a dataset, its name the accession."""
    rows = [(entry(name), {"mean": vectors(1, 4)}) for name in ("P04637", "Q9Y261")]
    with h5py.File(write(tmp_path / "a.h5", layout("mean"), rows), "r") as file:
        read = {sequence_id: np.array(embedding) for sequence_id, embedding in file.items()}
    assert {name: array.shape for name, array in read.items()} == {"P04637": (4,), "Q9Y261": (4,)}


def test_h5_layers_poolings_compression_and_half(tmp_path: Path) -> None:
    mean, largest = vectors(2, 4).astype(np.float16), vectors(2, 4).astype(np.float16)
    shape = layout("mean", "max", layers=(0, 6), dtype="float16", compression=4)
    path = write(tmp_path / "a.h5", shape, [(entry("a"), {"mean": mean, "max": largest})])
    with h5py.File(path) as file:
        assert list(file) == ["a", "a@max"]
        np.testing.assert_array_equal(file["a"][:], mean)
        np.testing.assert_array_equal(file["a@max"][:], largest)
        assert (file["a"].compression, file["a"].compression_opts, file["a"].dtype) == ("gzip", 4, np.float16)


ODD_IDS = ["a/b", ".", "..", "../../x", "x" * 5000, "ü", "a@b", "a@max", "%", "\x1b[31mred", "a'\"b", "-", "~"]


@pytest.mark.parametrize("name", ["a.h5", "a.parquet", "a"])
def test_any_id_and_any_description(tmp_path: Path, name: str) -> None:
    rows = [(StoredRecord(one, "d" * 100_000 + "é\x1b", 3, None), {"mean": vectors(1, 4)}) for one in ODD_IDS]
    path = write(tmp_path / name, layout("mean"), rows)
    read = list(read_store(path, kind_of(path, "-o")).records)
    assert [one for one, _ in read] == [one for one, _ in rows]
    for (_, ours), (_, theirs) in zip(read, rows, strict=True):
        np.testing.assert_array_equal(ours["mean"], theirs["mean"])
    assert {entry.name for entry in tmp_path.iterdir()} == {name, f"work-{name}"}


def test_folder_as_esm_extract_writes_it(tmp_path: Path) -> None:
    residues, mean = vectors(2, 3, 4), vectors(2, 4)
    rows = [(entry("sp|P1|X", 3, 7), {"mean": mean, RESIDUES: residues})]
    path = write(tmp_path / "out", layout("mean", RESIDUES, layers=(0, 6)), rows)
    contents = torch.load(path / "sp|P1|X.pt", weights_only=True)
    assert contents["label"] == "sp|P1|X"
    assert set(contents) == {"label", "representations", "mean_representations"}
    assert list(contents["representations"]) == [0, 6]
    np.testing.assert_array_equal(contents["representations"][6].numpy(), residues[1])
    np.testing.assert_array_equal(contents["mean_representations"][0].numpy(), mean[0])
    with (path / "index.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [
            {
                "id": "sp|P1|X",
                "file": "sp|P1|X.pt",
                "length": "3",
                "truncated_from": "7",
                "description": "about sp|P1|X",
            }
        ]


def test_a_file_of_the_folder_holds_its_own_numbers_alone(tmp_path: Path) -> None:
    """A saved view would carry the whole pack with it."""
    pack = np.zeros((1, 100_000, 4), np.float32)
    path = write(tmp_path / "out", layout(RESIDUES), [(entry("a"), {RESIDUES: pack[:, 10:13]})])
    assert (path / "a.pt").stat().st_size < 5000


@pytest.mark.parametrize("name", ["a.h5", "a.parquet", "a"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_going_on_from_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Written with interruptions or without, an output reads the same; what came after a commit is gone."""
    from protea.embed.stores import parquet

    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 300)
    shape = layout("mean", RESIDUES, layers=(1, 2)) if name == "a" else layout(RESIDUES, layers=(1, 2))
    rows: list[Row] = []
    for number in range(23):
        arrays = {"mean": vectors(2, 4), RESIDUES: vectors(2, 3, 4)}
        rows.append((entry(f"r{number}"), {kind: arrays[kind] for kind in shape.kinds}))
    kind = kind_of(Path(name), "-o")
    state = None
    for start in range(0, len(rows), 7):
        store = open_store(kind, tmp_path, shape, state)
        for one, arrays in rows[start : start + 7]:
            store.write(one, arrays)
        state = json.loads(json.dumps(store.commit()))
        for one, arrays in rows[start + 7 : start + 7 + after]:
            store.write(one, arrays)
        store.abandon()
    store = open_store(kind, tmp_path, shape, state)
    path = tmp_path / name
    store.finish({"x": 1}).replace(path)
    contents = read_store(path, kind)
    assert contents.provenance == {"x": 1}
    assert contents.layout == shape
    read = list(contents.records)
    assert [one for one, _ in read] == [one for one, _ in rows]
    for (_, ours), (_, theirs) in zip(read, rows, strict=True):
        for each in shape.kinds:
            np.testing.assert_array_equal(ours[each], theirs[each])
    undisturbed = write(tmp_path / f"whole{path.suffix}", shape, rows, {"x": 1})
    if name == "a.parquet":
        assert path.read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize("name", ["a.h5", "a.parquet", "a"])
def test_an_output_without_records(tmp_path: Path, name: str) -> None:
    """The last of too many shards has none."""
    path = write(tmp_path / name, layout("mean"), [])
    assert list(read_store(path, kind_of(path, "-o")).records) == []


def test_suffixes() -> None:
    kinds = {"a.h5": "h5", "a.hdf5": "h5", "a.parquet": "parquet", "a": "folder", "a/": "folder"}
    assert {name: kind_of(Path(name), "-o") for name in kinds} == kinds
    with pytest.raises(UsageError, match=r"-r a.csv: unknown suffix '.csv'; use .parquet, .h5, or a name without"):
        kind_of(Path("a.csv"), "-r")
