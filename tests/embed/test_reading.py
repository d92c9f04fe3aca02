"""Outputs of ``protea embed`` read back, in every format, compared with the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import polars as pl
import pytest

import protea
from conftest import Run, fails
from messages import check_message
from protea.errors import MissingExtraError, OutputError, UsageError
from protea.fasta import read_fasta

OUTPUTS = ["a.h5", "a.parquet", "a.csv", "a.npz", "a"]


def expected(fasta: Path, **options: object) -> object:
    sequences = [record.sequence for record in read_fasta([str(fasta)])]
    return protea.load(device="cpu").embed(sequences, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_vector_a_sequence(run: Run, fasta: Path, name: str) -> None:
    assert run("embed", fasta, "-o", name, "--device", "cpu").code == 0
    read = protea.read_embeddings(name)
    assert read.ids == ["a", "b", "c|3/x"]
    assert (read.layers, read.poolings, len(read)) == ((6,), ("mean",), 3)
    assert read.provenance["model"] == "protea-mini"
    assert isinstance(read.vectors, np.ndarray)
    assert read.vectors.dtype == np.float32
    np.testing.assert_allclose(read.vectors, expected(fasta, pool="mean"), rtol=0, atol=1e-5)
    assert read.to_numpy() is read.vectors
    assert read.residues is None
    assert repr(read) == "<StoredEmbeddings of 3 sequences: mean, layers (6,), width 320>"
    frame, other = read.to_pandas(), read.to_polars()
    assert frame.index.tolist() == other["id"].to_list() == read.ids
    assert frame.columns.tolist() == other.columns[1:] == [f"embedding_{place}" for place in range(320)]
    np.testing.assert_array_equal(frame.to_numpy(), read.vectors)
    np.testing.assert_array_equal(other.drop("id").to_numpy(), read.vectors)


@pytest.mark.parametrize("name", OUTPUTS)
def test_poolings_and_layers_have_axes(run: Run, fasta: Path, name: str) -> None:
    assert run("embed", fasta, "-o", name, "--pool", "mean,max", "--layers", "0,-1", "--device", "cpu").code == 0
    read = protea.read_embeddings(Path(name))
    vectors = expected(fasta, pool=["mean", "max"], layers=[0, -1])
    np.testing.assert_allclose(read.to_numpy(), vectors, rtol=0, atol=1e-5)
    frame = read.to_pandas()
    np.testing.assert_array_equal(frame["embedding_max_layer6_5"], read.to_numpy()[:, 1, 1, 5])
    np.testing.assert_array_equal(frame["embedding_mean_layer0_7"], read.to_numpy()[:, 0, 0, 7])
    assert frame.columns.tolist() == read.to_polars().columns[1:]
    if name == "a.csv":  # the same numbers as in the file itself
        np.testing.assert_array_equal(frame, pd.read_csv(name).filter(like="embedding_").astype(np.float32))


@pytest.mark.parametrize("name", ["a.h5", "a.parquet", "a"])
@pytest.mark.parametrize("layers", ["-1", "1,6"])
def test_residues(run: Run, fasta: Path, name: str, layers: str) -> None:
    assert run("embed", fasta, "-r", name, "--layers", layers, "--device", "cpu").code == 0
    read = protea.read_embeddings(name)
    numbers = [int(layer) for layer in layers.split(",")]
    theirs = expected(fasta, layers=numbers if len(numbers) > 1 else numbers[0])
    assert isinstance(read.vectors, list)
    for ours, other in zip(read.vectors, theirs, strict=True):  # type: ignore[call-overload]
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5)
    assert (read.pooled, read.poolings) == (None, ())
    np.testing.assert_array_equal(read.to_numpy(), np.concatenate(read.vectors, axis=-2))
    frame, other_frame = read.to_pandas(), read.to_polars()
    assert frame.index.names == ["id", "residue"]
    assert frame.shape == (32, 320 * len(numbers))
    assert frame.loc["c|3/x"].index.tolist() == list(range(1, 22))
    last = read.vectors[2] if len(numbers) == 1 else read.vectors[2][1]
    np.testing.assert_array_equal(frame.loc["c|3/x"].to_numpy()[:, -320:], last)
    assert isinstance(other_frame, pl.DataFrame)
    assert other_frame["residue"].to_list() == frame.index.get_level_values(1).tolist()
    np.testing.assert_array_equal(other_frame.drop("id", "residue").to_numpy(), frame.to_numpy())
    with pytest.raises(UsageError) as caught:
        read.to_anndata()
    check_message("read_embeddings.residues", caught.value)


def test_both_in_one_folder(run: Run, fasta: Path) -> None:
    assert run("embed", fasta, "-o", "a", "-r", "a", "--device", "cpu").code == 0
    read = protea.read_embeddings("a")
    assert (read.poolings, read.residues is not None) == (("mean",), True)
    means = [residues.mean(0) for residues in read.residues or []]
    np.testing.assert_allclose(read.vectors, means, rtol=0, atol=1e-5)


def test_half_precision_stays(run: Run, fasta: Path) -> None:
    assert run("embed", fasta, "-o", "a.npz", "--store", "float16", "--device", "cpu").code == 0
    read = protea.read_embeddings("a.npz")
    assert read.to_numpy().dtype == read.to_pandas().to_numpy().dtype == np.float16
    np.testing.assert_array_equal(read.to_polars().drop("id").to_numpy(), read.to_numpy().astype(np.float32))


def test_what_anndata_is_given(run: Run, fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anndata", SimpleNamespace(AnnData=dict))
    assert run("embed", fasta, "-o", "a.h5", "--device", "cpu").code == 0
    read = protea.read_embeddings("a.h5")
    given = read.to_anndata()
    assert given["obs"].index.tolist() == read.ids
    assert given["obs"]["length"].tolist() == [10, 1, 21]
    np.testing.assert_array_equal(given["obsm"]["X_protea-mini"], read.vectors)
    assert json.loads(given["uns"]["protea"]) == read.provenance


def test_anndata_writes_and_reads_it(run: Run, fasta: Path, tmp_path: Path) -> None:
    """AnnData is not part of the test environment, because its versions for Python 3.11 refuse pandas 3."""
    anndata = pytest.importorskip("anndata")
    assert run("embed", fasta, "-o", "a.h5", "--pool", "mean,max", "--device", "cpu").code == 0
    read = protea.read_embeddings("a.h5")
    read.to_anndata().write_h5ad(tmp_path / "a.h5ad")
    stored = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert stored.obs_names.tolist() == read.ids
    assert stored.obs["length"].tolist() == [10, 1, 21]
    np.testing.assert_array_equal(stored.obsm["X_protea-mini_max"], read.to_numpy()[:, 1])
    assert json.loads(stored.uns["protea"]) == read.provenance


@pytest.mark.parametrize("library", ["pandas", "polars", "anndata"])
def test_a_missing_library_names_its_extra(
    run: Run, fasta: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    assert run("embed", fasta, "-o", "a.npz", "--device", "cpu").code == 0
    read = protea.read_embeddings("a.npz")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"to_{library} needs {library}: pip .*protea\[{library}\]"):
        getattr(read, f"to_{library}")()


def test_what_cannot_be_read(run: Run, fasta: Path, tmp_path: Path) -> None:
    for name, error in [("a.txt", UsageError), ("absent.h5", OutputError), (3, UsageError)]:
        with pytest.raises(error, match=str(name)):
            protea.read_embeddings(name)  # type: ignore[arg-type]
    for name in OUTPUTS[:-1]:
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(OutputError, match=name):
            protea.read_embeddings(name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        protea.read_embeddings("folder")
    with pytest.raises(OutputError) as caught:
        protea.read_embeddings("absent.h5")
    check_message("read_embeddings.absent", caught.value)
    assert run("embed", fasta, "--logits", "l.h5", "--device", "cpu").code == 0
    with pytest.raises(OutputError) as caught:
        protea.read_embeddings("l.h5")
    check_message("read_embeddings.predictions", caught.value)
    fails(run("embed", fasta, "-o", "l.h5", "--device", "cpu"), 1, "l.h5")


@pytest.mark.parametrize("name", ["a.h5", "a.parquet", "a.npz", "a"])
def test_a_file_cut_short_is_an_error(run: Run, fasta: Path, name: str) -> None:
    assert run("embed", fasta, "-o", name, "--device", "cpu").code == 0
    path = next(Path(name).glob("b*.pt")) if name == "a" else Path(name)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(OutputError, match="damaged"):
        protea.read_embeddings(name)
