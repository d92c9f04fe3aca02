"""Training on an NVIDIA GPU beside training on the CPU. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import make_store, recipe

from protea.train.loop import pretrain
from protea.train.metrics import TrainingProgress
from protea.train.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class StopAfter(TrainingProgress):
    """Stops once a step was logged."""

    def __init__(self, step: int) -> None:
        self._step, self._stop = step, False

    def log(self, step: int, values: object) -> None:
        self._stop = step >= self._step

    def stop(self) -> bool:
        return self._stop


def told(store: Path, device: str, family: str = "esm2", **run: object) -> Recipe:
    return recipe(
        family,
        data={"store": store, "max_tokens": 64},
        run={"steps": 12, "device": device, **run},
        validation={"every": 6, "tokens": None},
        log={"every": 1, "tensorboard": False, "peak_tflops": 1.0},
    )


def curve(run: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("cuda"), valid=10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler imports
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"precision": "float32"}, 1e-4),
        ({"precision": "bf16-mixed"}, 2e-2),
        ({"precision": "fp16-mixed"}, 1e-2),
        ({"precision": "bf16-mixed", "recompute": True}, 2e-2),
        ({"precision": "bf16-mixed", "compile": True, "recompute": True}, 2e-2),
    ],
    ids=str,
)
def test_losses_are_those_of_the_cpu(changes: dict[str, object], tolerance: float, store: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        run = changes if device == "cuda" else {"precision": "float32"}
        pretrain(told(store, device, **run), tmp_path / device, TrainingProgress())
    for name in ("loss", "validation_loss"):
        expected = curve(tmp_path / "cpu", name)
        assert curve(tmp_path / "cuda", name) == pytest.approx(expected, rel=tolerance)


def test_a_stopped_run_goes_on(store: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(told(store, "cuda", precision="fp16-mixed"), whole, TrainingProgress())
    outcome = pretrain(told(store, "cuda", precision="fp16-mixed"), parts, StopAfter(5))
    assert outcome.step == 5
    pretrain(told(store, "cuda", precision="fp16-mixed"), parts, TrainingProgress())
    assert curve(parts) == pytest.approx(curve(whole), rel=1e-3)
    assert len(curve(parts)) == 12
