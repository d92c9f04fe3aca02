"""Small labelled data and encoders for tests of fine-tuning, and the same data as transformers and peft see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

import protea
from conftest import SMALL, disturb
from protea.checkpoints import hf
from protea.checkpoints.formats import open_checkpoint
from protea.finetune import tuning_state
from protea.finetune.examples import EncodedExamples, prepare
from protea.finetune.heads import HeadConfig
from protea.finetune.tasks import MISSING, TASKS, Labelled, LabelledExample
from protea.finetune.tuning import Tuned, TuneSettings, tune
from protea.models.encoder import Encoder
from protea.models.esm2 import ESM2Config
from protea.models.registry import build
from protea.progress import Progress
from protea.transforms.cpu import unpacked

WIDTH: Final = SMALL["hidden_size"]
LETTERS: Final = "ACDEFGHIKLMNPQRSTVWY"
FLOAT32: Final = TuneSettings(precision="float32", apart=1)


def write_model(folder: Path, config: Any = None, seed: int = 1) -> Path:
    """A small model whose biases and norms are disturbed."""
    hf.write_random(folder / "random", build(config or ESM2Config(**SMALL)), seed=seed, dtype=torch.float32)
    with open_checkpoint(folder / "random") as checkpoint:
        model = checkpoint.load(dtype=torch.float32, device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    disturb(model)
    hf.write(folder / "model", model, unpacked(model), torch.float32)
    return folder / "model"


def loader(folder: Path) -> Callable[[], Encoder]:
    return lambda: protea.load(folder, device="cpu", trainable=True).module


def examples(task: str, count: int = 40, *, seed: int = 0, longest: int = 30) -> Labelled:
    """Random sequences; what is to be learned is which residues are hydrophobic, or how many."""
    generator = np.random.default_rng(seed)
    kind, unit = TASKS[task].kind, TASKS[task].unit
    found, targets = [], []
    for number in range(count):
        sequences = tuple(
            "".join(generator.choice(list(LETTERS), generator.integers(5, longest)))
            for _ in range(2 if unit == "pair" else 1)
        )
        part = "validation" if number % 4 == 3 else "train"
        found.append(LabelledExample(f"p{number}", sequences, part, f"record {number}"))
        greasy = np.array([letter in "AILMFVWY" for letter in sequences[0]])
        if unit != "residue":
            greasy = greasy.mean(keepdims=True) if kind == "value" else greasy.mean(keepdims=True) > 0.4
        values = greasy.astype(np.float64 if kind != "class" else np.int64)
        if kind == "labels":
            values = np.stack([values, 1 - values], 1)
        if unit == "residue":
            values[generator.random(len(values)) < 0.2] = MISSING if kind == "class" else np.nan
        targets.append(values)
    classes = () if kind == "value" else ("no", "yes")
    return Labelled(TASKS[task], classes, found, targets)


def prepared(folder: Path, labelled: Labelled) -> EncodedExamples:
    return prepare(labelled, loader(folder)(), "truncate", [])


def head(labelled: Labelled, kind: str = "linear", **options: Any) -> HeadConfig:
    outputs = max(1, len(labelled.classes))
    return HeadConfig(kind=kind, task=labelled.task.name, width=WIDTH, outputs=outputs, **options)


class Notes(Progress):
    """Keeps what the user is told, and raises an error before an update if told so."""

    def __init__(self, ends_after: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.notes: list[str] = []
        self.left, self.error = ends_after, error

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, amount: int = 1) -> None:
        if self.left is not None:
            self.left -= amount
            if self.left <= 0:
                raise self.error


def run(
    folder: Path,
    labelled: Labelled,
    work: Path,
    *,
    config: HeadConfig | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    **changes: Any,
) -> Tuned:
    """Tune on the labelled examples, in float32 and without notes unless told otherwise."""
    return tune(
        loader(folder),
        prepared(folder, labelled),
        config or head(labelled),
        replace(FLOAT32, **changes),
        work,
        identity={"model": "small"},
        seed=seed,
        progress=progress or Notes(),
    )


def save_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tuning_state, "SAVE_SHARE", inf)


def tensors(tuned: Tuned) -> dict[str, torch.Tensor]:
    parts: Iterable[tuple[str, torch.nn.Module]] = (("encoder", tuned.model), ("head", tuned.head))
    return {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}


def assert_same(a: Tuned, b: Tuned) -> None:
    """The same bits of weights, and the same curve."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    different = [name for name, value in left.items() if not torch.equal(value, right[name])]
    assert not different, different
    np.testing.assert_equal(a.curve, b.curve)
    np.testing.assert_equal((a.selected, a.loss), (b.selected, b.loss))
