"""What cannot be trained with or on: one message each that names the value, the place and the fix."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from protea.checkpoints import hf
from protea.errors import (
    CapabilityError,
    CheckpointError,
    DataError,
    DeviceError,
    FastaError,
    MissingExtraError,
    OutputError,
    ProgramError,
    ProteaError,
    ProteaWarning,
    StoreError,
    TrainingError,
    UnknownModelError,
    UsageError,
)
from protea.models.esm2 import ESM2Config
from protea.models.registry import build
from protea.train.loop import Outcome, pretrain
from protea.train.model import Trainable
from trials import LETTERS, TINY, Witness, assert_same, make_store, metrics, recipe, train, write_fasta

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


def refused(kind: type[ProteaError], message: str, tmp_path: Path, **sections: Any) -> None:
    """Before anything is trained, in one line."""
    with pytest.raises(kind, match=message) as caught:
        train(recipe(sections.pop("store", None), **sections), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- data --------------------------------------------------------------------------------------------------------


def test_stores(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", alphabet="esm-1nv")
    refused(StoreError, "ESM-1nv .* ESM", tmp_path, store=other)
    refused(StoreError, "nothing: ", tmp_path, store=tmp_path / "nothing")
    refused(StoreError, "other: ", tmp_path, store=tmp_path / "other")
    for name, damage in (("train/clusters.arrow", Path.unlink), ("valid/sequences.arrow", shorten)):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(store, copy)
        damage(copy / name)
        refused(StoreError, f"{name}: ", tmp_path, store=copy)
    bare = make_store(tmp_path / "bare", valid="0")
    refused(
        UsageError, r"has no valid split: .*data fasta --valid 10.* set validation\.every=null", tmp_path, store=bare
    )
    assert train(recipe(bare, validation={"every": None}), tmp_path / "run").finished


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_sequences_that_do_not_fit(store: Path, tmp_path: Path) -> None:
    positions = {**TINY, "architecture": "esm1b_t33_650M_UR50S", "max_position_embeddings": 34}
    message = r"data\.max_tokens 33 exceeds the 32 positions of ESM-1b; lower it"
    refused(UsageError, message, tmp_path, store=store, model=positions, data={"max_tokens": 33})
    assert train(recipe(store, model=positions), tmp_path / "fits").finished
    message = r"batch\.pack 96 .* data\.max_tokens 97"
    refused(UsageError, message, tmp_path, store=store, data={"max_tokens": 97})
    message = "split train: .* 4 residues"
    refused(DataError, message, tmp_path, store=store, data={"max_length": 4})


def test_fasta_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(UsageError, r"data\.store=DIR .* data\.fasta=FILE", tmp_path)
    fasta = write_fasta(tmp_path / "in.fasta", 200)
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(ProgramError, "MMseqs2", tmp_path, data={"fasta": fasta})
    monkeypatch.undo()
    if shutil.which("mmseqs"):
        refused(FastaError, "no.fasta", tmp_path, data={"fasta": tmp_path / "no.fasta"})
        fasta.write_text("not a FASTA file\n")
        refused(FastaError, "in.fasta", tmp_path, data={"fasta": fasta})


def test_a_split_of_nothing_to_predict(tmp_path: Path) -> None:
    """Three residues, 15 % of which are none."""
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">r{n}\n{LETTERS}\n" for n in range(20)) + ">last\nM\n")
    from protea.data.build_settings import BuildSettings
    from protea.data.from_fasta import build_uniref
    from protea.progress import SILENT

    for seed in range(100):
        settings = BuildSettings(output=tmp_path / f"store{seed}", valid="1", filtered=False, seed=seed)
        build_uniref(settings, [fasta], [], None, SILENT)
        manifest = json.loads((settings.output / "manifest.json").read_text())
        if manifest["splits"]["valid"]["residues"] == 1:
            break
    with pytest.raises(UsageError, match=r"validation\.every=null"):
        train(recipe(settings.output), tmp_path / "run")


# --- models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint to go on from."""
    shape = {name: value for name, value in TINY.items() if name != "architecture"}
    hf.write_random(tmp_path / "model", build(ESM2Config(**shape)), seed=1, dtype=torch.float32)
    return tmp_path / "model"


def change(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_init(store: Path, tmp_path: Path, model: Path) -> None:
    refused(CheckpointError, "nothing: no such folder", tmp_path, store=store, init=str(tmp_path / "nothing"))
    refused(UnknownModelError, "esm2_t6_8M_UR50Q", tmp_path, store=store, init="esm2_t6_8M_UR50Q")
    tensors = load_file(model / "model.safetensors")
    change(model, {key: each for key, each in tensors.items() if not key.startswith("lm_head")})
    refused(
        CapabilityError,
        "saved without its language-model head",
        tmp_path,
        store=store,
        init=str(model),
    )
    change(model, {key: each for key, each in tensors.items() if "layer.1" not in key})
    refused(CheckpointError, "layer.1", tmp_path, store=store, init=str(model))
    shorten(model / "model.safetensors")
    refused(CheckpointError, "model.safetensors", tmp_path, store=store, init=str(model))
    (model / "config.json").write_text("{")
    refused(CheckpointError, "config.json", tmp_path, store=store, init=str(model))


def test_unknown_names(store: Path, tmp_path: Path) -> None:
    refused(UsageError, r"optimizer\.name 'adam' .*'adamw' or 'muon'", tmp_path, optimizer={"name": "adam"})
    refused(UsageError, r"'optimizer\.betass'.*'betas'", tmp_path, optimizer={"betass": 1})
    refused(UsageError, "unknown device 'gpu'; use auto, cpu", tmp_path, store=store, run={"device": "gpu"})
    refused(UsageError, r"data\.masking 'bert' .*standard", tmp_path, store=store, data={"masking": "bert"})
    if not torch.cuda.is_available():
        refused(DeviceError, "device 'cuda' is not available", tmp_path, store=store, run={"device": "cuda"})


def test_more_than_memory_holds(store: Path, tmp_path: Path) -> None:
    message = r"[\d,.]+ GB of main memory, .* [\d.,]+ GB .* batch\.pack"
    refused(TrainingError, message, tmp_path, store=store, batch={"pack": 10**9, "tokens": 10**9})


# --- what is optional ---------------------------------------------------------------------------------------------


def test_without_tensorboard(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.warns(ProteaWarning, match=r"TensorBoard is not installed, .*: pip .* install 'protea\[train\]'"):
        assert train(recipe(store, log={"tensorboard": True}), tmp_path / "run").finished
    assert len(metrics(tmp_path / "run")) == 6
    assert not (tmp_path / "run/tensorboard").exists()


def test_without_wandb(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(
        MissingExtraError, "log.wandb needs .*: pip .* install wandb", tmp_path, store=store, log={"wandb": "project"}
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_that_fails(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """It is told in one line; charts that stop do not stop the run."""

    fake: Any = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)

    def call(name: str) -> Any:
        def answer(*_: object, **__: object) -> Any:
            if name == fails:
                raise RuntimeError("api_key not configured (no-tty)")
            return fake

        return answer

    for name in ("init", "log", "finish"):
        setattr(fake, name, call(name))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    told = recipe(store, log={"wandb": "project"})
    if fails == "init":
        with pytest.raises(OutputError, match=r"^log\.wandb: .*: api_key not configured \(no-tty\); log in with "):
            train(told, tmp_path / "run")
        return
    witness = Witness()
    assert pretrain(told, tmp_path / "run", witness).finished
    assert len(metrics(tmp_path / "run")) == 6
    assert any("Weights & Biases: api_key" in note for note in witness.notes)


# --- numbers that are none ----------------------------------------------------------------------------------------


def records_of(run: Path, step: int, fasta: Path) -> list[dict[str, str]]:
    """What a failed step learned from, seen to be parts of the records that there are."""
    lines = fasta.read_text().splitlines()
    known = {name[1:]: letters for name, letters in zip(lines[::2], lines[1::2], strict=True)}
    with (run / f"step-{step:09d}-records.tsv").open() as stream:
        found = list(csv.DictReader(stream, delimiter="\t"))
    for record in found:
        assert int(record["first"]) >= 1
        assert int(record["first"]) + int(record["residues"]) - 1 <= len(known[record["id"]])
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_a_poisoned_weight(store: Path, tmp_path: Path, model: Path, workers: int) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["esm.encoder.layer.1.output.dense.weight"][3, 4] = math.nan
    change(model, tensors)
    run = tmp_path / "run"
    told = recipe(store, init=str(model), run={"workers": workers})
    with pytest.raises(TrainingError, match=r"^step 1: the loss is nan; its (\d+) records \(r\d+, ") as caught:
        train(told, run)
    found = records_of(run, 1, store.parent / "in.fasta")
    assert f"{len(found)} records ({', '.join(one['id'] for one in found[:3])}, ...) are listed in {run}" in str(
        caught.value
    )
    tokens = sum(int(one["residues"]) + 2 for one in found)
    assert 200 < tokens <= 288
    assert not (run / "checkpoints").exists()
    assert metrics(run) == []


def test_a_rate_that_destroys(store: Path, tmp_path: Path) -> None:
    """The last good checkpoint stays, and with a lower rate the run goes on from it."""
    run = tmp_path / "run"
    constant = {"name": "constant", "warmup": 0}
    told = recipe(store, schedule=constant, optimizer={"lr": 1e-3})
    assert pretrain(told, run, Witness(9)).step == 2
    absurd = recipe(store, schedule=constant, optimizer={"lr": 1e38}, save={"every": 1})
    with pytest.raises(TrainingError, match=r"^step 3: weights or moments .* \d+ records"):
        train(absurd, run, accept_changes=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000002"]
    assert records_of(run, 3, store.parent / "in.fasta")
    witness = Witness()
    assert pretrain(told, run, witness, accept_changes=True) == Outcome(4, finished=True)
    assert "continues after step 2" in witness.notes
    train(told, tmp_path / "whole")
    assert_same(run, tmp_path / "whole")


def test_a_rate_that_destroys_between_checkpoints(store: Path, tmp_path: Path) -> None:
    told = recipe(store, optimizer={"lr": 1e38}, schedule={"name": "constant", "warmup": 0}, save={"every": 100})
    with pytest.raises(TrainingError, match=r"^step 2: the loss is nan; "):
        train(recipe(store, **{**told.shown(), "validation": {"every": 100}}), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_nothing_unchecked_is_saved(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU run reads losses late: here only before something is saved or validated."""
    from protea.train import loop
    from protea.train.objective import DivergenceGuard

    class LateGuard(DivergenceGuard):
        def check(self) -> None:
            pass

        def settle(self, trainable: Trainable) -> None:
            super().check()
            super().settle(trainable)

    def poison(trainable: Trainable, *arguments: Any, step: int, **options: Any) -> Any:
        result = train_step(trainable, *arguments, step=step, **options)
        return (result[0] * math.nan, result[1]) if step == 3 and result is not None else result

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", poison)
    monkeypatch.setattr(loop, "DivergenceGuard", LateGuard)
    stop_after_step_4 = Witness(5)
    endings = [
        (recipe(store, run={"steps": 8}, batch={"tokens": 96}, validation={"every": None}), stop_after_step_4),
        (recipe(store, run={"steps": 4}, validation={"every": 4}), Witness()),
        (recipe(store, run={"steps": 8}, validation={"every": None}), Witness()),
    ]
    for number, (told, witness) in enumerate(endings):
        run = tmp_path / str(number)
        with pytest.raises(TrainingError, match=r"^step 3: the loss is nan; "):
            pretrain(told, run, witness)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000002"]


def test_a_loss_that_is_too_high(store: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^step 1: the loss is 3\.\d+; .* run\.max_loss is 1$"):
        train(recipe(store, run={"max_loss": 1}), tmp_path / "run")


def test_a_perplexity_that_no_float_holds(store: Path, tmp_path: Path) -> None:
    """Where the user allows for it: no number in JSON, and no end of the run."""
    wild = {"optimizer": {"lr": 1e3}, "schedule": {"name": "constant", "warmup": 0}, "run": {"max_loss": 1e30}}
    assert train(recipe(store, **wild), tmp_path / "run").finished
    lines = metrics(tmp_path / "run")
    assert max(line["loss"] for line in lines if "loss" in line) > 1000
    assert any(line["perplexity"] is None for line in lines if "loss" in line)


def test_records_are_told_though_they_cannot_be_listed(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "step-000000001-records.tsv").mkdir(parents=True)
    (run / "recipe.yaml").write_text("{}")
    (run / ".lock").touch()
    with pytest.raises(
        TrainingError, match=r"records \(r\d+, r\d+, r\d+, \.\.\.\) .*step-000000001-records\.tsv: Is a"
    ):
        train(recipe(store, run={"max_loss": 1}), run)


def test_gradients_that_overflow_at_any_scale(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 a few are left out; a run that learns nothing any more is no run."""
    from protea.train import objective
    from protea.train.optim import Optimizers

    def clip(self: Optimizers, scaler: torch.amp.GradScaler, limit: float | None) -> torch.Tensor:
        self.parameters["layers.0.fc1.weight"].grad.mul_(math.nan)  # type: ignore[union-attr]
        return plain(self, scaler, limit)

    plain = Optimizers.clip
    monkeypatch.setattr(Optimizers, "clip", clip)
    monkeypatch.setattr(objective, "_MAX_OVERFLOWS", 2)
    with pytest.raises(TrainingError, match=r"^step 3: .*gradient is nan; "):
        train(recipe(store, run={"precision": "fp16-mixed"}, validation={"every": None}), tmp_path / "run")


def test_a_compiler_that_fails(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    from protea.train import loop

    def fail(*_: object, **__: object) -> None:
        raise TorchDynamoException("CppCompileError: C++ compile error\n\nCommand: c++ ...")

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(
        DeviceError, match=r"^run\.compile: .* CppCompileError: C\+\+ compile error; .*run\.compile=false"
    ):
        train(recipe(store), tmp_path / "run")
