"""Validation beside a slow loop over transformers: one sequence at a time, the same masks, sums in float64."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import CPU, make_store, recipe, trained
from torch.nn import functional as F

from conftest import disturb
from protea.checkpoints import hf
from protea.data.loader import TrainingBatch
from protea.data.training_store import TrainingStore
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.train.loop import pretrain
from protea.train.metrics import TrainingProgress
from protea.train.model import Precision
from protea.train.objective import Validation
from protea.train.recipe import Recipe
from protea.train.run_export import export
from references import load_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = Precision("float32", CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"), sequences=60, valid=25)


def told(folder: Path, **sections: object) -> Recipe:
    return recipe(data={"store": str(folder), "max_tokens": 40}, validation={"every": 2}, **sections)


def slow(model: Path, batches: list[TrainingBatch]) -> float:
    theirs = load_transformers(model)
    total, masked = 0.0, 0
    for batch in batches:
        ids, targets = batch.inputs.input_ids, batch.targets
        rows = set(batch.rows.tolist())
        for start, end in pairwise(batch.inputs.cu_seqlens.host_offsets.tolist()):
            with torch.no_grad():
                logits = theirs(ids[None, start:end], attention_mask=torch.ones(1, end - start)).logits[0].double()
            for row in rows.intersection(range(start, end)):
                total += F.cross_entropy(logits[row - start], targets[row]).item()
                masked += 1
    return total / masked


def same(one: list[TrainingBatch], other: list[TrainingBatch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.inputs.input_ids, b.inputs.input_ids)
        and torch.equal(a.inputs.cu_seqlens.offsets, b.inputs.cu_seqlens.offsets)
        and torch.equal(a.rows, b.rows)
        and torch.equal(a.targets, b.targets)
        for a, b in zip(one, other, strict=True)
    )


def _store(folder: Path) -> TrainingStore:
    return TrainingStore(folder, recipe().config.alphabet)


def _model(model: dict[str, float] | None = None) -> Encoder:
    made = trained(recipe(model=model)).model
    disturb(made)
    return made


def test_loss(folder: Path, tmp_path: Path) -> None:
    model = _model({"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2})
    hf.save(model, tmp_path / "model")
    validation = Validation(_store(folder), told(folder))
    batches = list(validation.batches())
    expected = slow(tmp_path / "model", batches)
    found = validation.loss(model, EXACT)
    assert found == pytest.approx(expected, rel=1e-6)
    assert model.training
    # It is the same at every call, whatever random numbers were drawn between.
    torch.randn(7)
    assert validation.loss(model, EXACT) == found
    narrow = validation.loss(model, Precision("bf16-mixed", CPU))
    assert narrow == pytest.approx(expected, rel=5e-3)
    assert narrow != found


def test_the_same_masks_every_time(folder: Path) -> None:
    """Whatever the run's seed and whatever was validated before; another validation seed has others."""
    store = _store(folder)
    validation = Validation(store, told(folder))
    first = list(validation.batches())
    assert same(first, list(validation.batches()))
    assert same(first, list(Validation(store, told(folder, run={"seed": 99})).batches()))
    other = recipe(data={"store": str(folder), "max_tokens": 40}, validation={"every": 2, "seed": 43})
    assert not same(first, list(Validation(store, other).batches()))
    # All of the split, once, and none of the rest.
    split = store.split("valid")
    assert sum(len(batch.inputs) for batch in first) == split.sequences == 25
    wanted = {split.text(row)[:38] for row in range(25)}
    texts = [store.alphabet.decode(ids) for batch in first for ids in _residues(batch)]
    assert sum(len(text) < 38 for text in texts) == sum(len(text) < 38 for text in wanted)
    assert {text for text in texts if len(text) < 38} == {text for text in wanted if len(text) < 38}


def _residues(batch: TrainingBatch) -> list[object]:
    """Each sequence as it was, between BOS and EOS."""
    tokens = batch.targets.numpy()
    return [tokens[start + 1 : end - 1] for start, end in pairwise(batch.inputs.cu_seqlens.host_offsets.tolist())]


def test_part_of_the_split(folder: Path, tmp_path: Path) -> None:
    """Whole packs, until there are as many tokens as asked for; one at least."""
    model = _model()
    hf.save(model, tmp_path / "model")
    store = _store(folder)
    every = list(Validation(store, told(folder)).batches())
    sizes = [batch.inputs.input_ids.numel() for batch in every]
    assert len(sizes) > 2
    for tokens, packs in ((1, 1), (sizes[0], 1), (sizes[0] + 1, 2), (sum(sizes), len(sizes)), (10**9, len(sizes))):
        some = recipe(data={"store": str(folder), "max_tokens": 40}, validation={"every": 2, "tokens": tokens})
        validation = Validation(store, some)
        assert same(list(validation.batches()), every[:packs])
        assert validation.loss(model, EXACT) == pytest.approx(slow(tmp_path / "model", every[:packs]), rel=1e-6)
    everything = recipe(data={"store": str(folder), "max_tokens": 40}, validation={"every": 2, "tokens": None})
    assert same(list(Validation(store, everything).batches()), every)


def test_a_run_tells_it(folder: Path, tmp_path: Path) -> None:
    """Of the weights at that step; exported, they give it again. The last step is validated, too."""
    run = tmp_path / "run"
    assert pretrain(told(folder, run={"steps": 5}, save={"every": 1, "newest": 9}), run, TrainingProgress()).finished
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line for line in lines if "validation_loss" in line}
    assert list(losses) == [2, 4, 5]
    batches = list(Validation(_store(folder), told(folder)).batches())
    for step, line in losses.items():
        export(run, tmp_path / str(step), which=str(step))
        expected = slow(tmp_path / str(step), batches)
        assert line["validation_loss"] == pytest.approx(expected, rel=1e-6)
        assert line["validation_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert len({line["validation_loss"] for line in losses.values()}) == 3


def test_stopping(folder: Path) -> None:
    model = _model()
    asked = iter([False, True])
    assert Validation(_store(folder), told(folder)).loss(model, EXACT, lambda: next(asked)) is None
    assert model.training


def test_no_validation_split(tmp_path: Path) -> None:
    store = make_store(tmp_path / "data", sequences=20)
    with pytest.raises(UsageError, match=r"valid split: .*--valid.* validation\.every=null"):
        pretrain(told(store), tmp_path / "run", TrainingProgress())
    without = recipe(data={"store": str(store)}, run={"steps": 1})
    assert pretrain(without, tmp_path / "run", TrainingProgress()).finished


def test_nothing_to_predict(tmp_path: Path) -> None:
    store = make_store(tmp_path / "data", sequences=20, low=1, high=1, valid=1)
    with pytest.raises(UsageError, match=r"validation\.every=null"):
        Validation(_store(store), told(store)).loss(_model(), EXACT)
