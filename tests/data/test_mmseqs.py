"""Against the real MMseqs2, and against an alignment that is not its own."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import numpy as np
import parasail
import pytest
from sources import contents, make_sources, needs_mmseqs, sequence, settings

from protea.alphabet import ESM
from protea.data.build_settings import ClusterSettings
from protea.data.draws import SPLIT, Permutation, key
from protea.data.from_fasta import build_fasta, build_uniref
from protea.data.mmseqs import SEARCH_FLAGS
from protea.data.training_store import TrainingStore
from protea.errors import ProgramError
from protea.progress import SILENT, Progress
from protea.records import InputColumns

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def relative(rng: random.Random, text: str, identity: float, extra: float = 0.0) -> str:
    """A sequence with substitutions, and a tail that the other does not have."""
    changed = [rng.choice(LETTERS.replace(c, "")) if rng.random() > identity else c for c in text]
    return "".join(changed) + "".join(rng.choices(LETTERS, k=int(extra * len(text))))


def aligned(query: str, target: str) -> tuple[float, float]:
    """Identity over the columns of a local alignment, and the smaller of both coverages."""
    result = parasail.sw_trace_striped_16(query, target, 11, 1, parasail.blosum62)
    trace = result.traceback
    same = sum(a == b for a, b in zip(trace.query, trace.ref, strict=True))
    lengths = [len(text.replace("-", "")) for text in (trace.query, trace.ref)]
    return same / max(1, len(trace.query)), min(lengths[0] / len(query), lengths[1] / len(target))


@needs_mmseqs
def test_similar_clusters_are_removed(tmp_path: Path) -> None:
    """One relative of the validation cluster is similar over its length, another one only over half of it."""
    rng = random.Random(0)
    text = sequence(rng, 200, 200)
    similar, half = relative(rng, text, 0.9), relative(rng, text[:100], 0.9) + sequence(rng, 100, 100)
    records = {"a": text, "b": similar, "c": half, "d": sequence(rng, 200, 200), "e": sequence(rng, 200, 200)}
    (tmp_path / "a.fasta").write_text("".join(f">{name}\n{letters}\n" for name, letters in records.items()))
    flags = SEARCH_FLAGS.replace("-s 7", "-s 1 -k 5")
    seed = next(seed for seed in range(100) if Permutation(5, key(seed, 0, SPLIT))[np.array([0])][0] == 0)
    given = settings(tmp_path / "store", valid="1", filtered=True, filter_flags=flags, seed=seed)
    build_uniref(given, [tmp_path / "a.fasta"], [], None, SILENT)
    split = TrainingStore(tmp_path / "store", ESM).split("train")
    assert split.ids(np.arange(split.sequences)) == ["c", "d", "e"]
    _, line = (tmp_path / "store/removed.tsv").read_text().splitlines()
    assert line.split("\t")[:2] == ["b", "a"]


@pytest.mark.long
@needs_mmseqs
@pytest.mark.parametrize("search_from", ["train", "valid"])
def test_the_filter_removes_what_an_alignment_finds_and_nothing_else(tmp_path: Path, search_from: str) -> None:
    rng = random.Random(0)
    families = [sequence(rng, 150, 300) for _ in range(8)]
    records = {f"f{n}": text for n, text in enumerate(families)}
    for number, text in enumerate(families):
        for step in range(12):
            records[f"f{number}_{step}"] = relative(rng, text, 0.25 + 0.06 * step, rng.choice([0, 0, 0.15, 0.6]))
    records |= {f"other{n}": sequence(rng, 100, 300) for n in range(30)}
    fasta = tmp_path / "uniref50.fasta"
    fasta.write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
    notes = Notes()
    given = settings(tmp_path / "store", valid="12", filtered=True, seed=4, search_from=search_from)
    build_uniref(given, [fasta], [], None, notes)
    store = TrainingStore(tmp_path / "store", ESM)
    kept, valid = ({split.text(n) for n in range(split.sequences)} for split in map(store.split, ("train", "valid")))
    step = next(step for step in store.manifest["steps"] if step["step"] == "filter")
    assert len(kept) == step["kept"] == len(records) - 12 - step["removed"]
    flags = given.flags
    assert (flags == SEARCH_FLAGS) == (search_from == "train")
    assert f"mmseqs search queries targets hits tmp {flags}" in step["commands"]
    assert any(line.endswith(flags) and "mmseqs search" in line for line in notes.lines)
    assert flags in (tmp_path / "store/mmseqs.log").read_text()
    removed = [line.split("\t") for line in (tmp_path / "store/removed.tsv").read_text().splitlines()[1:]]
    assert len(removed) == step["removed"]
    for cluster, like, identity, *covers in removed:
        assert records[cluster] not in kept
        assert records[like] in valid
        ours = aligned(records[cluster], records[like])
        assert abs(ours[0] - float(identity)) < 0.05
        assert abs(ours[1] - min(map(float, covers))) < 0.05
    above = below = 0
    for text in records.values():
        if text in valid:
            continue
        pairs = [aligned(text, reference) for reference in valid]
        # Two programs may differ by a few columns at an alignment's ends: 3 points either way are left to them.
        if any(identity >= 0.53 and cover >= 0.83 for identity, cover in pairs):
            assert text not in kept
            above += 1
        elif not any(identity >= 0.47 and cover >= 0.77 for identity, cover in pairs):
            assert text in kept
            below += 1
    assert above >= 10
    assert below >= 50


@pytest.mark.long
@needs_mmseqs
def test_a_search_in_parts_is_the_same_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from protea import fasta
    from protea.data import build

    rng = random.Random(1)
    base = [sequence(rng, 80, 120) for _ in range(6)]
    texts = [relative(rng, rng.choice(base), 0.8) for _ in range(40)]
    (tmp_path / "a.fasta").write_text("".join(f">s{n}\n{text}\n" for n, text in enumerate(texts)))

    def train(name: str) -> list[str]:
        given = settings(
            tmp_path / name, valid="3", filtered=True, filter_flags=SEARCH_FLAGS.replace("-s 7", "-s 1 -k 5")
        )
        build_uniref(given, [tmp_path / "a.fasta"], [], None, SILENT)
        split = TrainingStore(tmp_path / name, ESM).split("train")
        return split.ids(np.arange(split.sequences))

    in_one_search = train("whole")
    monkeypatch.setattr(fasta, "_BLOCK", 1200)
    monkeypatch.setattr(build, "_SEARCH_PARTS", 2)
    assert train("parts") == in_one_search
    steps = TrainingStore(tmp_path / "parts", ESM).manifest["steps"]
    assert next(step for step in steps if step["step"] == "filter")["searches"] >= 2
    assert 0 < len(in_one_search) < 37


@needs_mmseqs
def test_sequences_are_clustered(tmp_path: Path) -> None:
    rng = random.Random(2)
    families = [sequence(rng, 120, 200) for _ in range(6)]
    records = {}
    for number, text in enumerate(families):
        near = text[: len(text) // 2] + relative(rng, text[len(text) // 2 :], 0.5)
        for step, member in enumerate((text, text[:-2], near, near[1:])):
            records[f"f{number}_{step}"] = member
    names = list(records)
    rng.shuffle(names)
    (tmp_path / "a.fasta").write_text("".join(f">{name}\n{records[name]}\n" for name in names))
    given = ClusterSettings(output=tmp_path / "store", valid="0")
    build_fasta(given, [tmp_path / "a.fasta"], SILENT)
    store = TrainingStore(tmp_path / "store", ESM)
    split = store.split("train")
    clusters = np.arange(split.clusters)
    clusters_members = [
        sorted(split.ids(np.arange(start, start + count)))
        for start, count in zip(split.starts(clusters), split.counts(clusters), strict=True)
    ]
    # The longer of each pair at 90 % represents it; both pairs of a family are one cluster at 50 %.
    assert sorted(clusters_members) == [[f"f{n}_0", f"f{n}_2"] for n in range(6)]
    assert all(split.text(n) == records[name] for n, name in enumerate(split.ids(np.arange(split.sequences))))
    steps = {step["step"]: step for step in store.manifest["steps"]}
    assert (steps["cluster members"]["representatives"], steps["cluster"]["representatives"]) == (12, 6)
    assert steps["clusters"]["left_out_by_members"] == 12
    build_fasta(ClusterSettings(output=tmp_path / "again", valid="0", threads=1), [tmp_path / "a.fasta"], SILENT)
    assert contents(tmp_path / "again") == contents(tmp_path / "store")
    assert "columns" not in store.manifest["command"]
    rows = "".join(f"{name};{text}\n" for name, text in records.items())
    (tmp_path / "a.csv").write_text(f"Name;id;heavy\n{rows.replace(';', ';1;')}")
    columns = InputColumns("name", "heavy")
    build_fasta(ClusterSettings(output=tmp_path / "b", valid="0"), [tmp_path / "a.csv"], SILENT, columns=columns)
    command = TrainingStore(tmp_path / "b", ESM).manifest["command"]
    assert command["columns"] == {"id": "name", "sequence": "heavy"}


def fake(folder: Path, body: str) -> str:
    path = folder / "fake-mmseqs"
    path.write_text(f'#!/bin/sh\n[ "$1" = version ] && echo 0 && exit\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (
            "echo 'Cannot allocate memory' >&2; kill -9 $$",
            ("SIGKILL (out of memory?)", "Cannot allocate"),
        ),
        ("echo 'Input x does not exist'; exit 1", ("code 1", ": Input x does not exist;")),
        ("exit 3", ("code 3", ": nothing;")),
    ],
)
def test_a_failing_program_is_quoted(tmp_path: Path, body: str, parts: tuple[str, ...]) -> None:
    sources = make_sources(tmp_path)
    given = settings(tmp_path / "store", valid="3", filtered=True, mmseqs=fake(tmp_path, body))
    with pytest.raises(ProgramError, match="mmseqs createdb") as caught:
        build_uniref(given, [sources.uniref50], [], None, SILENT)
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_missing_program(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    given = settings(tmp_path / "store", valid="3", filtered=True, mmseqs="no-such-mmseqs")
    with pytest.raises(ProgramError, match=r"no-such-mmseqs: .*apt-get install mmseqs2.*conda.*--mmseqs"):
        build_uniref(given, [sources.uniref50], [], None, SILENT)
    assert not list(tmp_path.glob(".*.partial"))
    (tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(ProgramError, match="broken: "):
        build_uniref(
            settings(tmp_path / "store", valid="3", filtered=True, mmseqs=str(tmp_path / "broken")),
            [sources.uniref50],
            [],
            None,
            SILENT,
        )
