"""Alphabets by name, those of families that are added among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sources import build, make_sources, needs_mmseqs, settings

from protea.alphabet import ESM, ESM1NV, Alphabet
from protea.data.from_fasta import build_uniref
from protea.data.loader import Loader, Packing
from protea.data.manifest import alphabet_named, name_of
from protea.data.sampler import Sampler
from protea.data.training_store import TrainingStore
from protea.errors import StoreError, UsageError
from protea.models import registry
from protea.models.encoder import Encoder
from protea.progress import SILENT
from protea.settings_errors import validate
from protea.train.recipe import Recipe
from protea.train.run_store import STORE, open_store

MINE = Alphabet(
    name="Mine",
    tokens=("<pad>", "<unk>", "<mask>", "<start>", *"ACDEFGHIKLMNPQRSTVWYX"),
    bos=3,
    eos=None,
    pad=0,
    unk=1,
    mask=2,
)


@pytest.fixture
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with an alphabet of its own."""
    family = type("Family", (Encoder,), {"config_type": SimpleNamespace(alphabet=MINE), "stored": {}})
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, family])


added = pytest.mark.usefixtures("_added")


def test_names() -> None:
    assert (alphabet_named("esm"), alphabet_named("esm-1nv")) == (ESM, ESM1NV)
    assert (name_of(ESM), name_of(ESM1NV)) == ("esm", "esm-1nv")
    # Tokens are what a store is read by; what a family puts around them is its own affair.
    assert name_of(replace(ESM, name="another", eos=None)) == "esm"
    assert name_of(MINE) == "Mine"
    with pytest.raises(UsageError, match=r"unknown alphabet 'mine'; use .*esm or .*esm-1nv"):
        alphabet_named("mine")


@added
def test_a_family_that_is_added_brings_its_alphabet(tmp_path: Path) -> None:
    assert alphabet_named("mine") is MINE
    assert name_of(MINE) == "mine"
    with pytest.raises(UsageError, match=r"unknown alphabet 'esm3'; use .*esm-1nv or mine"):
        alphabet_named("esm3")
    sources = make_sources(tmp_path, 12)
    files = [sources.uniref50], [sources.uniref90], sources.mapping
    build_uniref(settings(tmp_path / "store", alphabet="mine"), *files, SILENT)
    split = TrainingStore(tmp_path / "store", MINE).split("train")
    assert split.sequences == sum(map(len, sources.clusters.values()))
    (batch, *_) = Loader(Sampler(split, max_tokens=40), packing=Packing(tokens=200), workers=0).batches(epochs=1)
    for start, end in batch.inputs.cu_seqlens.spans():
        assert batch.targets[start] == MINE.bos
        assert set(batch.targets[start + 1 : end].tolist()) <= set(range(4, 25))
    with pytest.raises(StoreError, match=r"Mine .* ESM; .* alphabet esm$"):
        TrainingStore(tmp_path / "store", ESM)
    build(sources, tmp_path / "other")
    with pytest.raises(StoreError, match=r"ESM .* Mine; .* alphabet mine$"):
        TrainingStore(tmp_path / "other", MINE)


@added
@needs_mmseqs
def test_a_run_of_such_a_family_makes_its_store(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 12)
    values = {"model": {"architecture": "esm2_t6_8M_UR50D"}, "data": {"fasta": str(sources.uniref90)}}
    values |= {"validation": {"every": None}}
    told = validate(Recipe, values, "test")
    made = open_store(told, tmp_path, MINE, SILENT)
    assert (made.folder, made.alphabet) == (tmp_path / STORE, MINE)
    split = made.split("train")
    assert {split.text(row) for row in range(split.sequences)} <= set(sources.sequences.values())
    written = (tmp_path / STORE / "manifest.json").stat().st_mtime_ns
    again = open_store(told, tmp_path, MINE, SILENT)
    assert (tmp_path / STORE / "manifest.json").stat().st_mtime_ns == written
    assert np.array_equal(again.split("train").residues(0), split.residues(0))
