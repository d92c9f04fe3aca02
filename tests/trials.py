"""Training runs of a second that may end at any moment, and what must be the same whether they did."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import yaml

from protea import native
from protea.data.build_settings import BuildSettings
from protea.data.from_fasta import build_uniref
from protea.output import sha256
from protea.progress import SILENT
from protea.settings_errors import validate
from protea.train.loop import Outcome, pretrain
from protea.train.metrics import TrainingProgress
from protea.train.recipe import Recipe
from protea.train.run_checkpoints import STATE, _seal, choose

LETTERS: Final = "ACDEFGHIKLMNPQRSTVWY"
TIMES: Final = {"tokens_per_second", "utilisation", "peak_memory"}
TINY: Final = {
    "architecture": "esm2_t6_8M_UR50D",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def write_fasta(path: Path, records: int = 40, *, seed: int = 0, name: str = "r") -> Path:
    """Random sequences of 5 to 60 residues."""
    rng = random.Random(seed)
    letters = ("".join(rng.choices(LETTERS, k=rng.randint(5, 60))) for _ in range(records))
    path.write_text("".join(f">{name}{number}\n{each}\n" for number, each in enumerate(letters)))
    return path


def make_store(folder: Path, *, alphabet: str = "esm", seed: int = 0, valid: str = "8") -> Path:
    """Forty clusters of one sequence, eight of them for validation."""
    folder.mkdir(parents=True)
    return build_store(write_fasta(folder / "in.fasta", seed=seed), alphabet=alphabet, valid=valid)


def build_store(fasta: Path, *, alphabet: str = "esm", valid: str = "0") -> Path:
    """A store beside a FASTA file, each sequence a cluster of its own."""
    settings = BuildSettings(output=fasta.parent / "store", valid=valid, filtered=False, alphabet=alphabet)
    build_uniref(settings, [fasta], [], None, SILENT)
    return settings.output


def recipe(store: Path | None, **sections: Any) -> Recipe:
    """Four steps of three packs, saved and validated every two, with dropout."""
    values: dict[str, dict[str, Any]] = {
        "model": {} if "init" in sections else TINY,
        "data": {"store": store, "max_tokens": 32},
        "batch": {"tokens": 288, "pack": 96},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup": 1},
        "run": {"steps": 4, "precision": "float32", "device": "cpu"},
        "validation": {"every": 2, "tokens": 200},
        "save": {"every": 2},
        "log": {"every": 1, "tensorboard": False, "peak_tflops": 0.1},
    }
    merged = {name: known | sections.pop(name, {}) for name, known in values.items()}
    return validate(Recipe, merged | sections, "test")


def mostly_long(values: Iterable[Any], quick: Container[int]) -> list[Any]:
    """Parameters of a test: those at the ``quick`` places run in ``make test``, the others in ``make test-long``."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=[] if place in quick else [pytest.mark.long]) for place, row in enumerate(rows)]


class Killed(BaseException):
    """What a run dies of in its own process."""


class Witness(TrainingProgress):
    """Writes down what it is told; asked for the n-th time whether to stop, says so, or kills.

    It leaves out that there is no native library: results of tests do not depend on that.
    """

    def __init__(self, asked: int | None = None, *, kill: bool = False) -> None:
        self.asked, self._last, self._kill = 0, asked, kill
        self.notes: list[str] = []
        self.tasks: list[str] = []

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        self.tasks.append(task)

    def note(self, message: str) -> None:
        missing = native.reason()
        if missing is None or missing not in message:
            self.notes.append(message)

    def stop(self) -> bool:
        self.asked += 1
        stop = self._last is not None and self.asked >= self._last
        if stop and self._kill:
            raise Killed
        return stop


def train(told: Recipe, folder: Path, **options: Any) -> Outcome:
    """Without interruption."""
    return pretrain(told, folder, TrainingProgress(), **options)


def finished(store: Path, folder: Path) -> tuple[Recipe, Path]:
    """A finished run with checkpoints after steps 2 and 4, computed by one thread."""
    told, threads = recipe(store), torch.get_num_threads()
    torch.set_num_threads(1)
    train(told, folder)
    torch.set_num_threads(threads)
    return told, folder


def metrics(run: Path) -> list[dict[str, Any]]:
    """All lines, without what tells times and memory."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """The same last checkpoint to the bit, the same metrics, and the same best one."""
    one, other = (choose(run, "newest") for run in (ours, theirs))
    assert one.step == other.step
    ignored = {"files", "sha256"}
    assert {k: v for k, v in one.values.items() if k not in ignored} == {
        k: v for k, v in other.values.items() if k not in ignored
    }
    a, b = one.tensors(), other.tensors()
    assert {*a} == {*b}
    assert any(key.startswith("optimizer.") for key in a)
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key
    assert metrics(ours) == metrics(theirs)
    if any("validation_loss" in line for line in metrics(theirs)):
        best, known = choose(ours, "best"), choose(theirs, "best")
        assert (best.step, best.loss) == (known.step, known.loss)


def reseal(checkpoint: Path, **values: Any) -> None:
    """Make the hashes right again, as somebody who means harm would."""
    known = json.loads((checkpoint / STATE).read_text())
    known["files"] = {name: sha256(checkpoint / name) for name in known["files"] if (checkpoint / name).exists()}
    known |= values
    known["sha256"] = _seal(known)
    (checkpoint / STATE).write_text(json.dumps(known))


def start(told: Recipe, folder: Path, *options: object) -> subprocess.Popen[str]:
    """``protea pretrain`` in a process of its own, with one thread."""
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(told.shown()))
    command = [sys.executable, "-m", "protea", "pretrain", str(path), "-o", str(folder), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error, which is no traceback."""
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, err
