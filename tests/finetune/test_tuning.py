"""Encoders that are trained with a head: beside transformers and peft, and what a run promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from messages import check_message
from plain_tuning import PlainLoop
from protea.errors import ArgumentError, DataError, ResumeError, TrainingError, UsageError
from protea.finetune.adapters import Adapter, insert
from protea.finetune.examples import prepare
from protea.finetune.heads import Head
from protea.finetune.tasks import MISSING, Labelled
from protea.finetune.tuning import Tuned, TuneSettings, tune
from protea.finetune.tuning_state import TuningCheckpoints, TuningState
from protea.finetune.updates import Packer, Updates, head_inputs
from protea.models.encoder import Encoder
from protea.train.model import Precision
from tunings import (
    FLOAT32,
    Notes,
    assert_same,
    examples,
    head,
    loader,
    prepared,
    run,
    save_every_step,
    tensors,
    write_model,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft reads it
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tuned"))


# --- beside transformers and peft ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "changes", "tolerance"),
    [
        ("residue-class", {"steps": 25}, 1e-5),
        pytest.param("residue-class", {}, 1e-5, marks=pytest.mark.long),
        pytest.param("residue-value", {"method": "full", "layer_decay": 0.7, "lr": 1e-4}, 1e-5, marks=pytest.mark.long),
        pytest.param("residue-value", {"dora": True, "token_budget": 40}, 1e-5, marks=pytest.mark.long),
        # Means over random sequences differ little, and dividing by their spread magnifies rounding: with the other of
        # its two attention kernels, transformers' own losses differ by 8e-4 here.
        pytest.param("sequence-value", {}, 1e-3, marks=pytest.mark.long),
        pytest.param("sequence-class", {"method": "full", "token_budget": 40}, 1e-3, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_losses_beside_a_plain_loop(
    folder: Path, tmp_path: Path, task: str, changes: dict[str, Any], tolerance: float
) -> None:
    """The same losses of each of 50 steps, in packs and in padded batches."""
    labelled = examples(task)
    settings = replace(FLOAT32, **{"steps": 50, "validations": 100, "patience": 100, "clip": 0.5} | changes)
    config = head(labelled)
    ours = run(folder, labelled, tmp_path / "work", config=config, **vars(settings))
    theirs = PlainLoop(folder, prepared(folder, labelled), tmp_path / "initial", settings, config)
    train = theirs.prepared.places("train")
    theirs.scale(train)
    assert settings.steps is not None
    updates = Updates(len(train), settings.batch, settings.steps, 100, 1, 0)
    losses = theirs.train(settings, [train[updates[step]] for step in range(1, settings.steps + 1)])
    assert losses[-1] < losses[0]
    assert [row[0] for row in ours.curve] == list(range(1, len(losses) + 1))
    np.testing.assert_allclose([row[1] for row in ours.curve], losses, rtol=tolerance)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_beside_peft(folder: Path, tmp_path: Path, method: Any) -> None:
    labelled = examples("residue-class")
    settings, config = replace(FLOAT32, method=method), head(labelled)
    theirs = PlainLoop(folder, prepared(folder, labelled), tmp_path / "initial", settings, config)
    places = theirs.prepared.places("train")[:7]
    theirs.scale(places)
    theirs.loss(places).backward()
    model = loader(folder)()
    if method == "lora":
        insert(model, rank=8, alpha=16, seed=0)
    torch.manual_seed(0)
    ours = Head(config)
    assert theirs.scales is not None
    ours.centre.copy_(theirs.scales[0])
    ours.spread.copy_(theirs.scales[1])
    packer = Packer(theirs.prepared, model.alphabet.frame, 60)
    packs = list(packer.packs(places))
    assert len(packs) > 2
    count = sum(float(ours.rated(pack.targets)) for pack in packs)
    for pack in packs:
        batch = head_inputs(model, pack, config.reads, Precision("float32", model.device))
        (ours.loss(ours(batch.x, batch.lengths), batch.targets)[0] / count).backward()
    torch.testing.assert_close(ours.body.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-6)
    named = theirs.parameters()
    for layer in range(3):
        kind = ".lora_B.default.weight" if method == "lora" else ".weight"
        mine = model.get_parameter(f"layers.{layer}.fc1{kind}").grad
        root = "base_model.model." if method == "lora" else ""
        its = named[f"{root}encoder.layer.{layer}.intermediate.dense{kind}"].grad
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-6)


# --- what a run promises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kind"),
    [("residue-class", "cnn"), ("sequence-value", "light-attention"), ("multilabel", "mlp"), ("pair-class", "linear")],
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_kind_of_task(folder: Path, tmp_path: Path, task: str, kind: str, method: Any) -> None:
    """The result predicts, without gradients, what the best validation measured."""
    labelled = examples(task)
    options: dict[str, Any] = {"method": method, "steps": 6, "lora_dropout": 0.1, "class_weights": True, "lr": 1e-3}
    tuned = run(folder, labelled, tmp_path, config=head(labelled, kind), **options)
    assert (tuned.adapter is None) == (method == "full")
    assert not any(value.requires_grad for value in tuned.model.parameters())
    assert not tuned.model.training
    assert not tuned.head.training
    assert all(type(module).__module__.partition(".")[0] != "peft" for module in tuned.model.modules())
    assert "forward" not in vars(tuned.model.layers[0])
    np.testing.assert_allclose(validation_loss(tuned, folder, labelled), tuned.loss, rtol=1e-4)
    assert tuned.loss == min(row[2] for row in tuned.curve if row[3] == tuned.selected or np.isnan(tuned.selected))


def validation_loss(tuned: Tuned, folder: Path, labelled: Labelled) -> float:
    data = prepared(folder, labelled)
    packer = Packer(data, tuned.model.alphabet.frame, 1000)
    total = count = 0.0
    with torch.no_grad():
        for pack in packer.packs(data.places("validation")):
            batch = head_inputs(tuned.model, pack, tuned.head.config.reads, Precision("float32", tuned.model.device))
            loss, rated = tuned.head.loss(tuned.head(batch.x, batch.lengths), batch.targets)
            total, count = total + float(loss), count + float(rated)
    return total / count


def test_packs_do_not_change_an_update(folder: Path, tmp_path: Path) -> None:
    """The budget bounds memory alone; examples without any label change nothing."""
    labelled = examples("residue-class")
    whole = run(folder, labelled, tmp_path / "whole", steps=8)
    parts = run(folder, labelled, tmp_path / "parts", steps=8, token_budget=20)
    saving = run(folder, labelled, tmp_path / "saving", steps=8, recompute=True)
    for other in (parts, saving):
        np.testing.assert_allclose(whole.curve, other.curve, rtol=1e-4)


def test_layer_decay_orders_the_changes(folder: Path, tmp_path: Path) -> None:
    """After one update, AdamW has moved each weight by its learning rate, half of the highest."""
    tuned = run(
        folder, examples("residue-class"), tmp_path, method="full", layer_decay=0.5, lr=2e-3, steps=1, weight_decay=0.0
    )
    before = loader(folder)()

    def moved(name: str) -> float:
        change = tuned.model.get_parameter(name) - before.get_parameter(name)
        return float(change.detach().abs().median())

    names = ["emb_layer_norm_after.bias", "layers.2.fc1.bias", "layers.1.fc1.bias", "layers.0.fc1.bias"]
    np.testing.assert_allclose([moved(name) for name in names], [1e-3, 1e-3, 5e-4, 2.5e-4], rtol=0.02)
    words = (tuned.model.get_parameter("word_embeddings.weight") - before.get_parameter("word_embeddings.weight")).abs()
    np.testing.assert_allclose(float(words.detach().max()), 1.25e-4, rtol=0.02)
    for part in ("lm_head", "contact_head"):
        for name, value in before.get_submodule(part).named_parameters():
            assert torch.equal(value, tuned.model.get_parameter(f"{part}.{name}"))


@pytest.mark.parametrize(("patience", "waits"), [(3, 12), (0.5, 2)])
def test_early_stopping(folder: Path, tmp_path: Path, patience: float, waits: int) -> None:
    """The weights of the best validation are kept; for so many epochs, of four updates, neither number was better."""
    tuned = run(folder, examples("residue-class"), tmp_path, lr=0.05, head_lr=0.1, epochs=40, patience=patience)
    ranks = [(row[3], -row[2]) for row in tuned.curve]
    best = max(ranks)
    losses = [row[2] for row in tuned.curve]
    last = max(ranks.index(best), losses.index(min(losses)))
    assert [row[0] for row in tuned.curve] == list(range(1, last + waits + 2))
    assert (tuned.selected, -tuned.loss) == best
    assert any("stopped after step" in note for note in tuned.notes)


def test_the_folder_keeps_the_end(folder: Path, tmp_path: Path) -> None:
    """The same call again trains nothing."""
    labelled = examples("sequence-class")
    first = run(folder, labelled, tmp_path, steps=4)
    again = Notes(ends_after=1, error=AssertionError)
    assert_same(first, run(folder, labelled, tmp_path, steps=4, progress=again))
    assert not again.notes


@pytest.mark.parametrize(
    ("changes", "steps", "ends"),
    [
        ({}, 4, [3]),
        pytest.param({}, 7, [1, 3, 6], marks=pytest.mark.long),
        pytest.param({"dora": True, "precision": "fp16-mixed"}, 7, [3, 6], marks=pytest.mark.long),
        pytest.param(
            {"method": "full", "recompute": True, "precision": "bf16-mixed"}, 7, [1, 3, 6], marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_stopped_after_any_step(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    steps: int,
    ends: list[int],
) -> None:
    """Ctrl-C, and the same command again: the same bits, dropout of head and adapters included."""
    save_every_step(monkeypatch)
    labelled, told = examples("residue-class"), {"steps": steps, "lora_dropout": 0.1, "validations": 2} | changes
    config = head(labelled, "cnn")
    whole = run(folder, labelled, tmp_path / "whole", config=config, **told)
    for after in ends:
        notes = Notes(ends_after=after)
        with pytest.raises(KeyboardInterrupt):
            run(folder, labelled, tmp_path / str(after), config=config, progress=notes, **told)
        assert f"the same command continues after step {after}" in notes.notes[-1]
        again = Notes()
        assert_same(whole, run(folder, labelled, tmp_path / str(after), config=config, progress=again, **told))
        assert any("continues after step" in note for note in again.notes)


@pytest.mark.parametrize("saves", [0, 2])
def test_the_step_of_the_last_checkpoint_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """Checkpoints are rare, and a run continues from the last one, not from where it stopped."""
    save = TuningCheckpoints.save

    def first_ones(self: TuningCheckpoints, state: TuningState, best: Any, *, now: bool = False) -> None:
        if state.step <= saves:
            save(self, state, best, now=True)

    monkeypatch.setattr(TuningCheckpoints, "save", first_ones)
    notes = Notes(ends_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(folder, examples("sequence-value"), tmp_path, steps=6, progress=notes)
    where = "after step 2" if saves else "from the beginning"
    assert notes.notes[-1].endswith(f"the same command continues {where}")


def test_damaged_checkpoints_are_skipped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_every_step(monkeypatch)
    labelled = examples("sequence-value")
    whole = run(folder, labelled, tmp_path / "whole", steps=5)
    with pytest.raises(KeyboardInterrupt):
        run(folder, labelled, tmp_path / "torn", steps=5, progress=Notes(ends_after=4))
    newest = tmp_path / "torn" / "checkpoints" / "step-000000004"
    next(newest.glob("*.distcp")).write_bytes(b"torn")
    again = Notes()
    assert_same(whole, run(folder, labelled, tmp_path / "torn", steps=5, progress=again))
    assert any("damaged" in note and "skipped" in note for note in again.notes)


def test_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    labelled = examples("sequence-class")
    run(folder, labelled, tmp_path, steps=2)
    with pytest.raises(ResumeError, match="rank 8 -> 4") as caught:
        run(folder, labelled, tmp_path, steps=2, rank=4)
    check_message("finetune.other-settings", caught.value, folder=tmp_path)
    with pytest.raises(ResumeError, match="data"):
        run(folder, examples("sequence-class", seed=1), tmp_path, steps=2)
    with pytest.raises(ResumeError, match="seed 0 -> 1"):
        run(folder, labelled, tmp_path, steps=2, seed=1)
    notes = Notes()
    run(folder, labelled, tmp_path, steps=2, token_budget=50, progress=notes)
    assert any("token_budget" in note and "last bit" in note for note in notes.notes)


# --- errors --------------------------------------------------------------------------------------------------------


def test_one_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun") as caught:
        run(folder, examples("sequence-class"), tmp_path)
    check_message("finetune.one-process", caught.value)


def test_a_loss_that_is_not_finite(folder: Path, tmp_path: Path) -> None:
    """The message names the step and the records."""

    def broken() -> Encoder:
        model = loader(folder)()
        weight = model.get_parameter("layers.1.fc1.weight")
        weight.data = torch.full_like(weight, float("nan"))
        return model

    labelled = examples("sequence-class")
    data = prepared(folder, labelled)
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; its 7 records: p0,") as caught:
        tune(broken, data, head(labelled), replace(FLOAT32, batch=8), tmp_path, identity={}, seed=0)
    check_message("finetune.not-finite", caught.value)


def test_memory_that_does_not_suffice(folder: Path, tmp_path: Path) -> None:
    def full() -> Encoder:
        model = loader(folder)()

        def fail(*_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

        model.layers[1].register_forward_hook(fail)
        return model

    labelled = examples("sequence-class")
    with pytest.raises(Exception, match="--token-budget") as caught:
        tune(full, prepared(folder, labelled), head(labelled), FLOAT32, tmp_path, identity={}, seed=0)
    check_message("finetune.memory", caught.value)


def test_parts_without_labels(folder: Path, tmp_path: Path) -> None:
    labelled = examples("residue-class")
    for place, example in enumerate(labelled.examples):
        if example.part == "validation":
            labelled.targets[place] = np.full_like(labelled.targets[place], MISSING)
    with pytest.raises(DataError, match="validation part has no label"):
        run(folder, labelled, tmp_path)
    train_alone = labelled.chosen([place for place, each in enumerate(labelled.examples) if each.part == "train"])
    with pytest.raises(DataError, match="validation part has no label"):
        run(folder, train_alone, tmp_path)


def test_windows_are_refused(folder: Path, tmp_path: Path) -> None:
    labelled = examples("sequence-class", 4)
    labelled.examples[1] = replace(labelled.examples[1], sequences=("M" * 1500,))
    model = loader(folder)()
    data = prepare(labelled, model, "window", [])
    with pytest.raises(UsageError, match=r"record 1: 1,500 residues"):
        tune(loader(folder), data, head(labelled), FLOAT32, tmp_path, identity={}, seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("rank", 0), ("warmup", 1.5), ("layer_decay", 2.0), ("precision", "int8"), ("method", "ia3")],
)
def test_settings_that_are_not_allowed(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}="):
        TuneSettings(**{name: value})


@pytest.mark.parametrize(
    ("of_epoch", "settings", "updates", "waits"),
    [
        (1000, {}, 10_000, 3334),
        (40, {}, 400, 134),
        (12, {}, 400, 134),  # 33 epochs of 381 examples, 32 at a time
        (3, {}, 150, 50),  # 50 epochs are the most
        (12, {"epochs": 10}, 120, 40),
        (12, {"epochs": 1}, 12, 12),  # one epoch, at least
        (12, {"epochs": 0.5, "patience": 0.1}, 6, 1),
        (12, {"epochs": 20, "patience": 2.5}, 240, 30),
        (12, {"steps": 7}, 7, 12),
    ],
)
def test_lengths_of_training(of_epoch: int, settings: dict[str, Any], updates: int, waits: int) -> None:
    found = TuneSettings(**settings)
    assert (found.updates(of_epoch), found.waits(of_epoch)) == (updates, waits)


def test_validations_are_some_updates_apart() -> None:
    def validated(examples: int, steps: int) -> list[int]:
        updates = Updates(examples=examples, batch=8, steps=steps, validations=4, apart=10, seed=0)
        return [step for step in range(1, steps + 1) if updates.validates(step)]

    assert validated(24, 35) == [10, 20, 30, 35]
    assert validated(12 * 8, 25) == [10, 20, 25]
    assert validated(100 * 8, 110) == [25, 50, 75, 100, 110]


def test_updates_cover_an_epoch() -> None:
    """Each example once in every epoch, in another order, in updates of nearly equal size."""
    updates = Updates(examples=23, batch=8, steps=9, validations=2, apart=1, seed=4)
    groups = [updates[step] for step in range(1, 10)]
    for first in (0, 3, 6):
        assert sorted(np.concatenate(groups[first : first + 3])) == list(range(23))
    assert {len(group) for group in groups} == {7, 8}
    assert not np.array_equal(groups[0], groups[3])
    assert [step for step in range(1, 10) if updates.validates(step)] == [2, 3, 5, 6, 8, 9]


def test_adapters_and_weights_on_disk_are_the_result(folder: Path, tmp_path: Path) -> None:
    tuned = run(folder, examples("residue-class"), tmp_path / "work", steps=5, dora=True, lr=1e-2)
    assert tuned.adapter is not None
    tuned.adapter.write(tmp_path / "adapter", "small")
    model = loader(folder)()
    Adapter.read(tmp_path / "adapter").merge_into(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors(tuned)[f"encoder.{name}"]), name
