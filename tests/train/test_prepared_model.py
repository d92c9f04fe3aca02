"""What a run makes of a model before its first step: what is trained, what is frozen, and what a step then computes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from runs import CPU, loader, make_store, recipe, take_step, trained
from torch import Tensor
from torch.nn import functional as F

from conftest import CONFIGS, disturb
from protea import native
from protea.checkpoints import hf
from protea.data.loader import TrainingBatch
from protea.data.training_store import TrainingStore
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.packing import PackedRows
from protea.train.estimate import estimate
from protea.train.metrics import TrainingProgress
from protea.train.model import Trainable, architecture, prepare
from protea.train.objective import masked_loss
from protea.train.optim import parameters_to_train
from protea.train.recipe import Recipe, SaveSettings
from protea.train.run_checkpoints import RunCheckpoints, read_verified
from protea.train.run_state import TrainingState, resume, save
from trials import Witness

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 1e-2
FROZEN = "word_embeddings.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def steps(told: Recipe, folder: Path, number: int, packs: int | None = None) -> list[list[TrainingBatch]]:
    """The packs of a recipe's first steps."""
    batches = loader(told, TrainingStore(folder, told.config.alphabet)).batches()
    return [list(islice(batches, packs or told.batch.packs)) for _ in range(number)]


def weights(model: Encoder) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


# --- what is frozen -----------------------------------------------------------------------------------------------


def frozen(told: Recipe) -> Trainable:
    """A model whose word embeddings stay as they are, ready for training."""
    model = architecture(told)
    model.get_parameter(FROZEN).requires_grad_(False)
    return trained(told, model)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "fp16-mixed"])
def test_frozen_parameters_stay(optimizer: str, precision: str, folder: Path) -> None:
    """To the bit, however strong the decay; all others move."""
    told = recipe(optimizer={"name": optimizer, "weight_decay": 0.5}, run={"precision": precision})
    ours = frozen(told)
    if ours.precision.scaler.is_enabled():
        ours.precision.scaler.load_state_dict(ours.precision.scaler.state_dict() | {"scale": 1024.0})
    before = weights(ours.model)
    for number, packs in enumerate(steps(told, folder, 2), start=1):
        take_step(ours, told, packs, number, RATE)
    after = weights(ours.model)
    assert {name for name, each in after.items() if torch.equal(each, before[name])} == {FROZEN}
    assert set(ours.optimizers.parameters) == before.keys() - {FROZEN}
    assert not any(name.startswith(f"optimizer.{FROZEN}") for name, _ in ours.optimizers.state())
    assert ours.model.get_parameter(FROZEN).grad is None


def test_frozen_parameters_are_saved_and_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    told = recipe(optimizer={"weight_decay": 0.5})
    packs = steps(told, folder, 4)
    whole = frozen(told)
    for number in range(4):
        take_step(whole, told, packs[number], number + 1, RATE)
    first = frozen(told)
    for number in range(2):
        take_step(first, told, packs[number], number + 1, RATE)
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", SaveSettings())
    save(checkpoints, first, TrainingState(step=2), recipe=told, data="these")
    checkpoints.wait()
    stored = read_verified(tmp_path / "checkpoints/step-000000002").tensors()
    buffers = {f"model.{name}" for name in first.model.stored_buffers}
    names = {f"model.{name}" for name, _ in first.model.named_parameters()}
    assert {key for key in stored if key.startswith("model.")} == names | buffers
    assert buffers == {"model.inv_freq"}
    assert torch.equal(stored[f"model.{FROZEN}"], first.model.get_parameter(FROZEN))
    # What goes on began from other weights, all of which it gives up.
    again = frozen(recipe(optimizer={"weight_decay": 0.5}, run={"seed": 99}))
    assert not torch.equal(again.model.get_parameter(FROZEN), first.model.get_parameter(FROZEN))
    frequencies = first.model.stored_buffers["inv_freq"].clone()
    again.model.stored_buffers["inv_freq"].zero_()
    progress = resume(RunCheckpoints(tmp_path / "checkpoints", SaveSettings()), again, TrainingProgress(), data="these")
    assert progress.step == 2
    assert torch.equal(again.model.stored_buffers["inv_freq"], frequencies)
    for number in range(2, 4):
        take_step(again, told, packs[number], number + 1, RATE)
    expected = weights(whole.model) | dict(whole.optimizers.state())
    found = weights(again.model) | dict(again.optimizers.state())
    assert found.keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in found.items())


def test_frozen_parameters_cost_their_weights_alone(folder: Path) -> None:
    told = recipe()
    model = architecture(told)
    everything = estimate(model, told, 50.0)
    size = model.get_parameter(FROZEN).requires_grad_(False).numel()
    needs = estimate(model, told, 50.0)
    assert needs.parameters == everything.parameters - size
    assert needs.state == everything.state - 12 * size
    assert needs.copies == everything.copies - 8 * size


def test_the_contact_head_of_a_model_gone_on_from_is_frozen(tmp_path: Path) -> None:
    model = build(CONFIGS["esm1b"])
    model.load_state_dict({name: initial_value(model, name, 0) for name, _ in model.named_parameters()}, assign=True)
    disturb(model)
    hf.save(model, tmp_path / "model")
    told = recipe(init=str(tmp_path / "model"))
    head = {"contact_head.regression.weight", "contact_head.regression.bias"}
    for one in (architecture(told), trained(told).model):
        assert {name for name, _ in one.named_parameters()} - set(parameters_to_train(one)) == head


# --- what is applied ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of PyTorch
def test_parameters_keep_their_names() -> None:
    told = recipe(run={"compile": True, "recompute": True})
    plain = architecture(told)
    ours = trained(told)
    assert ours.model.training
    assert [name for name, _ in ours.model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in ours.model.named_buffers()] == [name for name, _ in plain.named_buffers()]


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed", "float32"])
def test_what_is_slow_is_told(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A native library that is not there, and bfloat16 on a processor without its products."""
    from protea.train import model

    class Notes(TrainingProgress):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    told = recipe(run={"precision": precision})
    for multiplies in (True, False):
        monkeypatch.setattr(model, "native_bfloat16", lambda device, answer=multiplies: answer)
        for missing in (None, "this processor is an abacus"):
            monkeypatch.setattr(native, "reason", lambda missing=missing: missing)
            notes = Notes()
            prepare(architecture(told), told, CPU, notes)
            if precision == "bf16-mixed" and not multiplies:
                expected = ["run.precision=float32 "]
            else:
                expected = [] if missing is None else [missing]
            assert len(notes.notes) == len(expected)
            assert all(part in note for part, note in zip(expected, notes.notes, strict=True))


@pytest.mark.parametrize(("multiplies", "notes"), [(True, 0), (False, 1)])
def test_muon_on_a_processor_without_bfloat16(multiplies: bool, notes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's Muon orthogonalises in bfloat16, also in a run in float32."""
    from protea.train import model

    monkeypatch.setattr(model, "native_bfloat16", lambda device: multiplies)
    told, witness = recipe(optimizer={"name": "muon"}), Witness()
    prepare(architecture(told), told, CPU, witness)
    assert len([note for note in witness.notes if "optimizer.name=adamw" in note]) == notes


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("family", ["esm2", "esm2nv", "esm1nv"])
def test_the_objective_is_the_sum_of_cross_entropies(family: str, precision: str, tmp_path: Path) -> None:
    """Of float32 logits of the alphabet's tokens, whether under autocast or not."""
    told = recipe(family, run={"precision": precision})
    ours = trained(told)
    data = make_store(tmp_path / "data", sequences=20, alphabet="esm-1nv" if family == "esm1nv" else "esm")
    (batch,) = steps(told, data, 1, packs=1)[0]
    assert len(batch.rows) > 5
    with torch.no_grad():
        with ours.precision.autocast():
            found = masked_loss(ours.model, ours.model(batch.inputs, rows=batch.wanted), batch)
            hidden = ours.model(batch.inputs)[batch.rows]
            logits = ours.model.head(hidden)[:, : len(ours.model.alphabet)].float()
        targets = batch.targets[batch.rows]
        assert found.dtype == logits.dtype == torch.float32
        assert torch.equal(found, F.cross_entropy(logits, targets, reduction="sum"))
        exact = -logits.double().log_softmax(-1)[torch.arange(len(targets)), targets].sum()
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_step_of_nothing_to_predict(folder: Path) -> None:
    """Has a loss of 0 and changes no weight by its gradient."""
    told = recipe(optimizer={"weight_decay": 0.0})
    ours = trained(told)
    (batch,) = steps(told, folder, 1, packs=1)[0]
    before = weights(ours.model)
    nothing = replace(batch, wanted=PackedRows.of(batch.rows.numpy()[:0], batch.inputs.cu_seqlens))
    assert take_step(ours, told, [nothing], 1, RATE) == (0.0, 0.0)
    assert all(torch.equal(each, before[name]) for name, each in weights(ours.model).items())
