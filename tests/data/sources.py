"""Small UniRefs: FASTA of representatives and members, and a mapping."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from protea.alphabet import ESM, Alphabet
from protea.data.build_settings import BuildSettings
from protea.data.from_fasta import build_uniref
from protea.data.training_store import TrainingStore
from protea.progress import SILENT, Progress

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
FRAMES: dict[str, Alphabet] = {
    "both": ESM,
    "no-eos": replace(ESM, eos=None),
    "no-bos": replace(ESM, bos=None),
    "neither": replace(ESM, bos=None, eos=None),
}
"""The same tokens with whatever may stand around a sequence."""
ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"

needs_mmseqs = pytest.mark.skipif(
    shutil.which("mmseqs") is None, reason="MMseqs2 is not installed: apt-get install mmseqs2"
)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")


def sequence(rng: random.Random, low: int = 20, high: int = 80) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


@dataclass
class Sources:
    """Files of a small UniRef, and what is in them."""

    folder: Path
    clusters: dict[str, list[str]]
    sequences: dict[str, str]

    @property
    def uniref50(self) -> Path:
        return self.folder / "uniref50.fasta"

    @property
    def uniref90(self) -> Path:
        return self.folder / "uniref90.fasta"

    @property
    def mapping(self) -> Path:
        return self.folder / "mapping.tsv"

    def write(self) -> None:
        """Write the files; members are not in the order of the clusters."""
        members = [member for members in self.clusters.values() for member in members]
        random.Random(1).shuffle(members)
        fasta = "".join(f">{name} n=1\n{self.sequences[name]}\n" for name in members)
        self.uniref90.write_text(fasta)
        self.uniref50.write_text("".join(f">{name} n=2\n{self.sequences[name]}\n" for name in self.clusters))
        lines = (f"{cluster}\t{','.join(members)}\n" for cluster, members in self.clusters.items())
        self.mapping.write_text("UR50_cluster_name\tmapped_id\n" + "".join(lines))


def make_sources(
    folder: Path, clusters: int = 30, *, most: int = 5, seed: int = 0, low: int = 20, high: int = 80
) -> Sources:
    """Random clusters of random sequences, written into a folder."""
    rng = random.Random(seed)
    sources = Sources(folder, {}, {})
    for number in range(clusters):
        name = f"UniRef50_C{number}"
        members = [f"UniRef90_M{number}_{n}" for n in range(rng.randint(1, most))]
        sources.clusters[name] = members
        sources.sequences |= {sequence_id: sequence(rng, low, high) for sequence_id in (name, *members)}
    sources.write()
    return sources


def settings(output: Path, **values: object) -> BuildSettings:
    """Settings of a build without MMseqs2, unless ``values`` change that."""
    return BuildSettings(output=output, **{"valid": "0", "filtered": False, **values})  # type: ignore[arg-type]


def build(sources: Sources, output: Path, *, progress: Progress = SILENT, **values: object) -> TrainingStore:
    files = [sources.uniref50], [sources.uniref90], sources.mapping
    build_uniref(settings(output, **values), *files, progress)
    return TrainingStore(output, ESM)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the log, which tells times."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "mmseqs.log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
