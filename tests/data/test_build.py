"""Stores from small UniRefs: what they hold, how they are refused."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sources import SHARED, Sources, build, contents, make_sources, needs_shared, settings

from messages import check_message
from protea.alphabet import ESM, ESM1NV
from protea.data import from_fasta, writer
from protea.data.from_fasta import build_uniref
from protea.data.importers import import_fasta
from protea.data.manifest import verify
from protea.data.training_store import TrainingStore
from protea.errors import DataError, FinishedError, OutputError, ResumeError, StoreError, UsageError
from protea.progress import SILENT, Progress
from recorded import Recorded


def members(store: TrainingStore, split: str = "train") -> dict[str, list[str]]:
    """The clusters of a split with their members."""
    part = store.split(split)
    clusters = np.arange(part.clusters)
    names = part.ids(np.arange(part.sequences))
    bounds = zip(part.cluster_ids(clusters), part.starts(clusters), part.counts(clusters), strict=True)
    return {name: names[start : start + count] for name, start, count in bounds}


def same(store: TrainingStore, sources: Sources) -> None:
    part = store.split("train")
    assert members(store) == sources.clusters
    names = part.ids(np.arange(part.sequences))
    assert [part.text(row) for row in range(part.sequences)] == [sources.sequences[name] for name in names]


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_store_is_its_sources(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its files are cut into batches and its members into buckets."""
    from protea import fasta
    from protea.data import encoding

    monkeypatch.setattr(fasta, "_BLOCK", rows * 40)
    monkeypatch.setattr(writer, "_SEQUENCE_ROWS", rows)
    monkeypatch.setattr(writer, "_CLUSTER_ROWS", rows + 3)
    monkeypatch.setattr(writer, "_BUCKET_BYTES", rows * 50)
    monkeypatch.setattr(writer, "_BLOCK_BITS", 1)
    monkeypatch.setattr(encoding, "_GROUP", rows)
    monkeypatch.setattr(from_fasta, "ENTRIES", rows)
    sources = make_sources(tmp_path, 40)
    store = build(sources, tmp_path / "store")
    same(store, sources)
    verify(store.folder, store.manifest, SILENT)
    assert not list(tmp_path.glob(".*.partial"))


def test_any_arrow_library_reads_it(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    folder = build(sources, tmp_path / "store").folder
    with pa.memory_map(str(folder / "train/sequences.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert [ESM.decode(np.array(row)) for row in table["tokens"].to_pylist()] == [
        sources.sequences[name] for name in table["id"].to_pylist()
    ]
    assert table.schema.metadata[b"alphabet"] == b"ESM"
    assert json.loads((folder / "manifest.json").read_text())["splits"]["train"]["clusters"] == 30


def test_numbers_of_the_manifest(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    store = build(sources, tmp_path / "store", valid="10%", test="4")
    splits = store.manifest["splits"]
    assert {name: split["clusters"] for name, split in splits.items()} == {"train": 23, "valid": 3, "test": 4}
    for name in store.splits:
        part = store.split(name)
        texts = [part.text(row) for row in range(part.sequences)]
        split = splits[name]
        assert split["residues"] == sum(map(len, texts))
        assert split["longest"] == max(map(len, texts))
        assert split["composition"] == {c: "".join(texts).count(c) for c in ESM.residues if c in "".join(texts)}
        assert sum(split["lengths"]["counts"]) == split["sequences"] == len(texts)
        assert split["lengths"]["counts"][1] == sum(32 <= len(text) < 64 for text in texts)
    names = [name for split in store.splits for name in members(store, split)]
    assert sorted(names) == sorted(sources.clusters)
    assert members(store, "valid") == {name: [name] for name in members(store, "valid")}
    steps = {step["step"]: step for step in store.manifest["steps"]}
    assert steps["draw"] == {"step": "draw", "clusters": 30, "valid": 3, "test": 4, "train": 23}
    assert steps["attach members"]["assigned"] == sum(map(len, sources.clusters.values()))


def test_samples_depend_on_the_seed(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    drawn = [
        set(members(build(sources, tmp_path / f"s{n}", valid="10", seed=seed), "valid"))
        for n, seed in enumerate((0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_same_bytes_wherever_it_is_made(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    first, second = (build(sources, folder, valid="5").folder for folder in (tmp_path / "a", tmp_path / "elsewhere/b"))
    assert contents(first) == contents(second)


@needs_shared
def test_the_sample_of_uniref_is_reproduced(tmp_path: Path) -> None:
    from protea.fasta import read_fasta

    folder = SHARED / "uniref202104_sample"
    files = [folder / f"{name}.gz" for name in ("mapping.tsv", "uniref50_train_filt.fasta", "ur90_ur50_sampler.fasta")]
    import_fasta(settings(tmp_path / "store"), *files, None, SILENT)
    store = TrainingStore(tmp_path / "store", ESM)
    split = store.split("train")
    assert (split.clusters, split.sequences) == (5001, 11296)
    with gzip.open(files[0], "rt") as stream:
        lines = [line.rstrip("\n").split("\t") for line in stream][1:]
    assert members(store) == {cluster: names.split(",") for cluster, names in lines}
    sequences = {record.id: record.sequence for record in read_fasta([files[2]])}
    assert {name: split.text(row) for row, name in enumerate(split.ids(np.arange(11296)))} == sequences


@pytest.mark.parametrize("examples", [2, pytest.param(10, marks=pytest.mark.long)])
def test_mappings_of_every_kind(tmp_path: Path, examples: int) -> None:
    """Comma lists, a member a line in any order, and UniProt's table give the same clusters."""
    limited = hypothesis_settings(max_examples=examples)
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=15)
    limited(given(sizes, st.randoms(use_true_random=False))(lambda sizes, rng: same_clusters(tmp_path, sizes, rng)))()


def same_clusters(tmp_path: Path, sizes: list[int], rng: random.Random) -> None:
    sources = make_sources(tmp_path, 1)
    sources.clusters = {f"UniRef50_C{n}": [f"UniRef90_M{n}_{k}" for k in range(size)] for n, size in enumerate(sizes)}
    sources.sequences = {name: "MKTAYIAK" for pair in sources.clusters.items() for name in (pair[0], *pair[1])}
    sources.write()
    expected = {name: sorted(ids) for name, ids in sources.clusters.items()}
    pairs = [(cluster, name) for cluster, names in sources.clusters.items() for name in names]
    rng.shuffle(pairs)
    columns = ("\t".join(["P", *[""] * 7, name, cluster, *[""] * 12]) for cluster, name in [*pairs, pairs[0]])
    texts = [
        sources.mapping.read_text(),
        "".join(f"{cluster}\t{name}\n" for cluster, name in pairs),
        "\n".join(columns) + "\n",
    ]
    for text in texts:
        sources.mapping.write_text(text)
        by_cluster = members(build(sources, tmp_path / "store"))
        assert {name: sorted(names) for name, names in by_cluster.items()} == expected
        shutil.rmtree(tmp_path / "store")


def test_headers_name_clusters_without_a_mapping(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 10, most=1)
    sources.uniref90.write_text(
        "".join(
            f">UniRef90_{'C' if n % 2 else 'other'}{n} {'' if n % 2 else f'x UniRef50_C{n};'}\nMKTAYIAK\n"
            for n in range(10)
        )
        + ">UniRef90_nobody\nMKT\n"
    )
    build_uniref(settings(tmp_path / "s"), [sources.uniref50], [sources.uniref90], None, SILENT)
    store = TrainingStore(tmp_path / "s", ESM)
    assert members(store)["UniRef50_C3"] == ["UniRef90_C3"]
    assert members(store)["UniRef50_C4"] == ["UniRef90_other4"]
    assert next(s for s in store.manifest["steps"] if s["step"] == "attach members")["without_cluster"] == 1
    sources.uniref90.write_text(">a\nMKT\n")
    with pytest.raises(DataError, match="--members"):
        build_uniref(settings(tmp_path / "t"), [sources.uniref50], [sources.uniref90], None, SILENT)


def test_without_members_clusters_are_their_representatives(tmp_path: Path) -> None:
    """ESM-1nv's data: UniRef50 alone, nothing over 512 residues, no filter."""
    sources = make_sources(tmp_path, 30, low=400, high=600)
    build_uniref(
        settings(tmp_path / "s", valid="5", test="3", max_length=512, alphabet="esm-1nv"),
        [sources.uniref50],
        [],
        None,
        SILENT,
    )
    store = TrainingStore(tmp_path / "s", ESM1NV)
    short = [name for name in sources.clusters if len(sources.sequences[name]) <= 512]
    assert sorted(name for split in store.splits for name in members(store, split)) == sorted(short)
    assert store.manifest["steps"][0]["skipped_long"] == 30 - len(short)
    with pytest.raises(StoreError, match=r"ESM-1nv .* ESM; .* alphabet esm$"):
        TrainingStore(tmp_path / "s", ESM)


def test_members_left_out_by_length_are_not_absent(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 30)
    store = build(sources, tmp_path / "store", max_length=60, empty="drop")
    step = next(step for step in store.manifest["steps"] if step["step"] == "attach members")
    assert step["left_out"] > 0
    assert step["absent"] == 0
    assert step["unknown_clusters"] > 0
    by_cluster = members(store)
    assert all(len(sources.sequences[name]) <= 60 for names in by_cluster.values() for name in names)


# --- what is refused ---------------------------------------------------------------------------------------------


def refused(
    tmp_path: Path, sources: Sources, error: type[Exception], match: str, key: str | None = None, **values: object
) -> None:
    with pytest.raises(error, match=match) as refusal:
        build(sources, tmp_path / "store", **values)
    assert not (tmp_path / "store").exists()
    if key is not None:
        check_message(f"data.{key}", refusal.value, tmp=tmp_path)


def test_absent_members(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    gone = [sources.clusters[name].pop() for name in list(sources.clusters)[:3] if len(sources.clusters[name]) > 1]
    mapping_text = sources.mapping.read_text()
    sources.write()
    sources.mapping.write_text(mapping_text)
    refused(tmp_path, sources, DataError, f": {len(gone)}, .*{gone[0]!r}.*problems.*--absent")
    listed = (tmp_path / "store.problems.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == gone
    same(build(sources, tmp_path / "other", absent="skip"), sources)


def test_a_member_in_two_clusters(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    first, second = list(sources.clusters)[:2]
    sources.mapping.write_text(sources.mapping.read_text() + f"{second}\t{sources.clusters[first][0]}\n")
    refused(tmp_path, sources, DataError, f": 1, .*{sources.clusters[first][0]!r}")
    line = (tmp_path / "store.problems.tsv").read_text().strip().split("\t")
    assert line == [sources.clusters[first][0], first, second, "in two clusters"]


def test_a_member_named_twice_counts_once(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    first = next(iter(sources.clusters))
    sources.mapping.write_text(sources.mapping.read_text() + f"{first}\t{sources.clusters[first][0]}\n")
    store = build(sources, tmp_path / "store")
    same(store, sources)
    assert next(s for s in store.manifest["steps"] if s["step"] == "attach members")["repeated"] == 1


def test_empty_clusters(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    text = sources.mapping.read_text()
    lonely = list(sources.clusters)[5]
    lines = [line for line in text.splitlines() if not line.startswith(f"{lonely}\t")]
    sources.mapping.write_text("\n".join([*lines, f"{lonely}\t"]) + "\n")
    refused(tmp_path, sources, DataError, rf"line 31: cluster '{lonely}'")
    sources.mapping.write_text("\n".join(lines) + "\n")
    refused(tmp_path, sources, DataError, f": 1, .*{lonely!r}.*--empty", "empty")
    expected = dict(sources.clusters)
    expected[lonely] = [lonely]
    assert members(build(sources, tmp_path / "a", empty="representative")) == expected
    del expected[lonely]
    assert members(build(sources, tmp_path / "b", empty="drop")) == expected


def test_invalid_mappings(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    sources.mapping.write_text("a b c\n")
    refused(tmp_path, sources, DataError, r"line 1: .*1 column")
    sources.mapping.write_text("head\tline\nUniRef50_other\tx,y\n")
    refused(tmp_path, sources, DataError, "no cluster of the mapping")
    packed = gzip.compress(sources.mapping.read_bytes() * 100)
    for damaged in (packed[:-9], packed[:40] + b"damage" + packed[46:]):
        sources.mapping.write_bytes(damaged)
        sources.mapping.rename(tmp_path / "mapping.tsv.gz")
        given = settings(tmp_path / "store"), [sources.uniref50], [sources.uniref90], tmp_path / "mapping.tsv.gz"
        with pytest.raises(DataError, match=r"mapping\.tsv\.gz: cannot be read: "):
            build_uniref(*given, SILENT)
    refused(tmp_path, sources, DataError, r"mapping\.tsv: cannot be read: No such file")


@pytest.mark.parametrize("name", ["uniref50", "uniref90"])
def test_duplicate_ids(tmp_path: Path, name: str) -> None:
    sources = make_sources(tmp_path)
    path = getattr(sources, name)
    path.write_text(path.read_text() + path.read_text().split(">")[3].join((">", "")))
    refused(tmp_path, sources, DataError, r"sequences 3 and \d+ .*: 1, .*'UniRef\d0_\w+'", f"duplicate_{name}")


@pytest.mark.parametrize(("valid", "test"), [("31", "0"), ("30", "0"), ("100%", "0"), ("20", "10")])
def test_samples_larger_than_the_data(tmp_path: Path, valid: str, test: str) -> None:
    sources = make_sources(tmp_path)
    refused(tmp_path, sources, DataError, r"clusters of 30 .*--valid", valid=valid, test=test)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"valid": "a few"}, "--valid a few: give a number"),
        ({"valid": "101%"}, "--valid 101%"),
        ({"alphabet": "dna"}, "unknown alphabet 'dna'; use .*esm or .*esm-1nv"),
        ({"unknown": "y"}, "--unknown y: use x, error, skip"),
        ({"empty": "y"}, "--empty y: use error, representative, drop"),
        ({"leave_out": "("}, r"--leave-out '\('"),
        ({"max_length": 5, "min_length": 6}, "--min-length 6 .* --max-length 5"),
        ({"min_length": 0}, "--min-length 0"),
        ({"filter_flags": "'"}, "flags for mmseqs"),
        ({"search_from": "both"}, "--search-from both: use train, valid"),
    ],
)
def test_invalid_options(tmp_path: Path, values: dict[str, object], match: str) -> None:
    key = ",".join(f"{name}={value}" for name, value in values.items())
    refused(tmp_path, make_sources(tmp_path), UsageError, match, key, **values)


def test_existing_outputs(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    folder = build(sources, tmp_path / "store").folder
    before = contents(folder)
    with pytest.raises(FinishedError, match="complete, nothing to do"):
        build(sources, folder)
    with pytest.raises(OutputError, match=r"exists already, of another run .*seed 0 -> 9.*--overwrite"):
        build(sources, folder, seed=9)
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="mine: exists"):
            build_uniref(settings(tmp_path / "mine"), [sources.uniref50], [], None, SILENT, overwrite=overwrite)
    with pytest.raises(OutputError, match="there is no folder"):
        build(sources, tmp_path / "no/store")
    build_uniref(settings(folder, valid="3"), [sources.uniref50], [], None, SILENT, overwrite=True)
    assert TrainingStore(folder, ESM).splits == ("train", "valid")


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(tmp_path, make_sources(tmp_path), OutputError, r"store: .* MB .* 0\.0 MB")
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("empty", ["error", "drop", "representative"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_build_shows_how_far_it_is(tmp_path: Path, compressed: bool, empty: str) -> None:
    """Long steps have a total, which they reach: bytes that are read, compressed or not, and sequences to write."""
    sources = make_sources(tmp_path, 40)
    if empty != "error":
        sources.clusters["UniRef50_C3"] = []
        sources.write()
        sources.mapping.write_text(sources.mapping.read_text().replace("UniRef50_C3\t\n", ""))
    members = [sources.uniref90]
    if compressed:
        members = [sources.uniref90.with_suffix(".fasta.gz")]
        members[0].write_bytes(gzip.compress(sources.uniref90.read_bytes()))
    recorded = Recorded()
    output = settings(tmp_path / "store", valid="4", empty=empty)
    build_uniref(output, [sources.uniref50], members, sources.mapping, recorded)
    assert recorded.complete == ["read representatives", "read members", "attach members", "write"]
    assert ["read members", members[0].stat().st_size] in [task[:2] for task in recorded.tasks]


def test_two_runs_at_once(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)

    class Meddler(Progress):
        def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
            if task == "write":
                with pytest.raises(ResumeError) as refused:
                    build(sources, tmp_path / "store")
                check_message("data.two_runs", refused.value, tmp=tmp_path)

    same(build(sources, tmp_path / "store", progress=Meddler()), sources)


@pytest.mark.parametrize("name", ["train/sequences.arrow", "train/clusters.arrow", "report.tsv"])
def test_damaged_stores(tmp_path: Path, name: str) -> None:
    store = build(make_sources(tmp_path), tmp_path / "store")
    path = store.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"{name}: .*SHA-256"):
        verify(store.folder, store.manifest, SILENT)
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=rf"{name}: has [\d,]+ bytes"):
        TrainingStore(store.folder, ESM)
    path.unlink()
    with pytest.raises(StoreError, match=f"{name}: is missing"):
        TrainingStore(store.folder, ESM)


def test_folders_that_are_not_stores(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        TrainingStore(tmp_path / "no", ESM)
    with pytest.raises(StoreError, match=str(tmp_path)):
        TrainingStore(tmp_path, ESM)
    store = build(make_sources(tmp_path), tmp_path / "store")
    with pytest.raises(StoreError, match="has no split 'valid', only train"):
        store.split("valid")
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(StoreError, match="version 2"):
        TrainingStore(store.folder, ESM)
