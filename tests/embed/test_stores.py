"""The files embeddings are written to, as their readers see them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from protea.embed.stores import (
    PREDICTIONS,
    RESIDUES,
    Array,
    ArrayLayout,
    StoredRecord,
    kind_of,
    open_store,
    read_store,
    sequence_hash,
)
from protea.errors import UsageError
from protea.output import write_run

NAMES = ["a.h5", "a.parquet", "a", "a.csv", "a.npz"]
PROVENANCE = {"x": 1, "store": "float32"}
RNG = np.random.default_rng(0)
Row = tuple[StoredRecord, dict[str, Array]]


def entry(record_id: str, length: int = 3, truncated_from: int | None = None) -> StoredRecord:
    return StoredRecord(record_id, f"about {record_id}", length, truncated_from, sequence_hash("A" * length))


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
    assert table.schema.names == ["id", "description", "length", "truncated_from", "sequence_sha256", "embedding"]
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
    assert frame.columns.tolist()[5:] == [
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
        assert attributes == entry("b", 5, 9)._asdict() | {"original_id": "b"}
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


@pytest.mark.parametrize("name", NAMES)
def test_any_id_and_any_description(tmp_path: Path, name: str) -> None:
    rows = [(entry(one)._replace(description="d" * 100_000 + "é\x1b"), {"mean": vectors(1, 4)}) for one in ODD_IDS]
    path = written_with_run_file(tmp_path / name, layout("mean"), rows)
    read = list(read_store(path, kind_of(path, "-o")).records)
    assert [one for one, _ in read] == [one for one, _ in rows]
    for (_, ours), (_, theirs) in zip(read, rows, strict=True):
        np.testing.assert_array_equal(ours["mean"], theirs["mean"])
    assert {entry.name for entry in tmp_path.iterdir()} - {f"{name}.run.yaml"} == {name, f"work-{name}"}


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
                "sequence_sha256": sequence_hash("AAA"),
            }
        ]


def test_a_file_of_the_folder_holds_its_own_numbers_alone(tmp_path: Path) -> None:
    """A saved view would carry the whole pack with it."""
    pack = np.zeros((1, 100_000, 4), np.float32)
    path = write(tmp_path / "out", layout(RESIDUES), [(entry("a"), {RESIDUES: pack[:, 10:13]})])
    assert (path / "a.pt").stat().st_size < 5000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 1, 5])
def test_going_on_from_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Written with interruptions or without, an output reads the same; what came after a commit is gone."""
    from protea.embed.stores import parquet

    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 300)
    kinds = {"a": ("mean", RESIDUES), "a.csv": ("mean", "max"), "a.npz": ("mean", "max")}.get(name, (RESIDUES,))
    shape = layout(*kinds, layers=(1, 2))
    rows: list[Row] = []
    for number in range(23):
        arrays = {"mean": vectors(2, 4), "max": vectors(2, 4), RESIDUES: vectors(2, 3, 4)}
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
    store.finish(PROVENANCE).replace(path)
    write_run(path, PROVENANCE)
    contents = read_store(path, kind)
    assert contents.provenance == PROVENANCE
    assert contents.layout == shape
    read = list(contents.records)
    assert [one for one, _ in read] == [one for one, _ in rows]
    for (_, ours), (_, theirs) in zip(read, rows, strict=True):
        for each in shape.kinds:
            np.testing.assert_array_equal(ours[each], theirs[each])
    undisturbed = write(tmp_path / f"whole{path.suffix}", shape, rows, PROVENANCE)
    if name in ("a.parquet", "a.csv", "a.npz"):
        assert path.read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_an_output_without_records(tmp_path: Path, name: str) -> None:
    """The last of too many shards has none."""
    path = written_with_run_file(tmp_path / name, layout("mean"), [])
    assert list(read_store(path, kind_of(path, "-o")).records) == []


def test_suffixes() -> None:
    kinds = {"a.h5": "h5", "a.hdf5": "h5", "a.parquet": "parquet", "a": "folder", "a/": "folder"}
    assert {name: kind_of(Path(name), "-r") for name in kinds} == kinds
    assert [kind_of(Path(name), "-o") for name in ("a.csv", "a.npz", "a.h5")] == ["csv", "npz", "h5"]
    for option, name in product(("-r", "--logits"), ("a.csv", "a.npz")):
        with pytest.raises(UsageError, match=rf"{option} {name}: .* holds vectors of sequences .*\.parquet, \.h5, or"):
            kind_of(Path(name), option)
    with pytest.raises(UsageError, match=r"-o a.txt: unknown suffix '.txt'; .*\.csv"):
        kind_of(Path("a.txt"), "-o")


def written_with_run_file(path: Path, shape: ArrayLayout, rows: Iterable[Row]) -> Path:
    """A CSV file has its settings in the run file."""
    write_run(write(path, shape, rows, PROVENANCE), PROVENANCE)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_csv_gives_every_number_back(tmp_path: Path, dtype: str) -> None:
    """Shortest decimals of random bit patterns, subnormal ones among them, as pandas and NumPy read them."""
    bits = np.random.default_rng(7).integers(0, 1 << 32, (200, 4), np.uint32)
    numbers = bits.view(np.float32) if dtype == "float32" else bits.astype(np.uint16).view(np.float16)
    numbers = np.where(np.isfinite(numbers), numbers, numbers.dtype.type(0.1))
    rows = [(entry(f"r{row}, odd"), {"mean": vector[None]}) for row, vector in enumerate(numbers)]
    path = write(tmp_path / "a.csv", layout("mean", dtype=dtype), rows)
    header = path.read_text().splitlines()[0].split(",")
    assert header[:5] == ["id", "description", "length", "truncated_from", "sequence_sha256"]
    assert header[5:] == [f"embedding_mean_layer6_{place}" for place in range(4)]
    frame = pd.read_csv(path)
    assert frame["id"].tolist() == [record.id for record, _ in rows]
    np.testing.assert_array_equal(frame.filter(like="embedding").to_numpy().astype(dtype), numbers)
    assert max(map(len, path.read_text().splitlines()[-1].split(",")[-4:])) <= 15


def test_npz_without_pickle(tmp_path: Path) -> None:
    rows = [(entry("ü", 3, 9), {"mean": vectors(1, 4)}), (entry("b" * 300), {"mean": vectors(1, 4)})]
    path = write(tmp_path / "a.npz", layout("mean"), rows, {"model": "m"})
    with np.load(path, allow_pickle=False) as file:
        assert file["ids"].tolist() == ["ü", "b" * 300]
        assert file["embedding"].dtype == np.float32
        np.testing.assert_array_equal(file["embedding"], np.concatenate([arrays["mean"] for _, arrays in rows]))
        assert file["truncated_from"].tolist() == [9, 0]
        assert json.loads(str(file["protea"])) == {"model": "m"}
    both = write(
        tmp_path / "b.npz",
        layout("mean", "max", layers=(0, 6)),
        [(entry("a"), {"mean": vectors(2, 4), "max": (largest := vectors(2, 4))})],
    )
    with np.load(both) as file:
        np.testing.assert_array_equal(file["embedding_max_layer6"], largest[1:])


@pytest.mark.parametrize("name", ["a.h5", "a.parquet", "a"])
def test_predictions_of_residues(tmp_path: Path, name: str) -> None:
    logs, bits = vectors(1, 3, 4), vectors(1, 3)
    shape = ArrayLayout(PREDICTIONS, (6,), 4, "float32", letters="ACDE")
    assert shape.bytes(sequences=1, residues=3) == (4 + 1) * 3 * 4
    rows = [
        (entry("p"), {"log_probabilities": logs, "entropy": bits}),
        (entry("q", 1), {"log_probabilities": logs[:, :1], "entropy": bits[:, :1]}),
    ]
    path = write(tmp_path / name, shape, rows)
    if name == "a.h5":
        with h5py.File(path) as file:
            assert (list(file), file.attrs["letters"]) == (["p", "p@entropy", "q", "q@entropy"], "ACDE")
            np.testing.assert_array_equal(file["p"][:], logs[0])
            np.testing.assert_array_equal(file["p@entropy"][:], bits[0])
    elif name == "a.parquet":
        frame = pd.read_parquet(path)
        assert frame.columns.tolist()[5:] == ["log_probabilities", "entropy"]
        assert pq.read_schema(path).metadata[b"letters"] == b"ACDE"
        np.testing.assert_array_equal(np.stack(frame["log_probabilities"][0]), logs[0])
        np.testing.assert_array_equal(frame["entropy"][0], bits[0])
    else:
        contents = torch.load(path / "p.pt", weights_only=True)
        assert contents["letters"] == "ACDE"
        np.testing.assert_array_equal(contents["log_probabilities"].numpy(), logs[0])
    read = list(read_store(path, kind_of(path, "-r")).records)
    for (ours, arrays), (theirs, expected) in zip(read, rows, strict=True):
        assert ours == theirs
        for kind, values in expected.items():
            np.testing.assert_array_equal(arrays[kind], values)


@pytest.mark.parametrize(("kind", "shape"), [("mean", (320,)), (RESIDUES, (3, 320))])
def test_h5_carries_what_protspace_and_biotrainer_read(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    """ProtSpace 4.8 takes the model from ``model_name`` and vectors ``[D]``; biotrainer 1.4 writes ``original_id``."""
    wide = ArrayLayout((kind,), (6,), 320, "float32")
    path = write(tmp_path / "a.h5", wide, [(entry("sp|P1/2|X"), {kind: vectors(1, *shape)})], {"model": "esm2"})
    with h5py.File(path) as file:
        assert file.attrs["model_name"] == "esm2"
        (dataset,) = file.values()
        assert (dataset.shape, dataset.attrs["original_id"]) == (shape, "sp|P1/2|X")
