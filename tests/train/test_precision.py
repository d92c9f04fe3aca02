"""Narrow types, recomputation and compilation, each beside float32 that is computed plainly."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, loader, make_store, recipe, take_step, trained
from torch import Tensor

from protea.data.loader import TrainingBatch
from protea.data.training_store import TrainingStore
from protea.errors import DeviceError
from protea.text import duration_text
from protea.train import metrics
from protea.train.estimate import estimate
from protea.train.model import TYPES, Precision, Trainable, architecture
from protea.train.recipe import LogSettings, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 1e-3
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def steps(told: Recipe, folder: Path, number: int) -> list[list[TrainingBatch]]:
    """The packs of a recipe's first steps."""
    batches = loader(told, TrainingStore(folder, told.config.alphabet)).batches()
    return [list(islice(batches, told.batch.packs)) for _ in range(number)]


def set_scale(ours: Trainable, scale: float) -> torch.amp.GradScaler:
    """Its float16 gradients would overflow now and then at the scale that PyTorch begins with."""
    scaler = ours.precision.scaler
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
    return scaler


def losses(told: Recipe, folder: Path, number: int) -> tuple[list[float], Trainable]:
    ours = trained(told)
    set_scale(ours, 1024.0)
    packs = steps(told, folder, number)
    return [take_step(ours, told, packs[n], n + 1, RATE)[0] for n in range(number)], ours


def everything(ours: Trainable) -> dict[str, Tensor]:
    """Copies of weights and optimizers' state."""
    both = dict(ours.model.named_parameters()) | dict(ours.optimizers.state())
    return {name: each.detach().clone() for name, each in both.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_mixed_precision_is_close(precision: str, folder: Path) -> None:
    exact, _ = losses(recipe(), folder, 20)
    mixed, ours = losses(recipe(run={"precision": precision}), folder, 20)
    assert mixed == pytest.approx(exact, rel=5e-3)
    assert mixed != exact
    assert exact[-1] < exact[0] - 0.1
    assert {each.dtype for each in everything(ours).values()} == {torch.float32}
    assert all(
        each.grad is not None and each.grad.dtype == torch.float32 for each in ours.optimizers.parameters.values()
    )


def test_products_are_narrow(folder: Path) -> None:
    """Of bf16-mixed, what the layers' products take and give; norms and the residual stream stay float32."""
    told = recipe(run={"precision": "bf16-mixed"})
    ours = trained(told)
    seen: dict[str, set[torch.dtype]] = {}

    def note(kind: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(kind, set()).add(output.dtype)

    layer = ours.model.layers[0]
    for name in ("self_attn.q_proj", "fc1", "fc2", "self_attn_layer_norm"):
        layer.get_submodule(name).register_forward_hook(note(name))
    layer.register_forward_hook(note("stream"))
    take_step(ours, told, steps(told, folder, 1)[0], 1, RATE)
    narrow, wide = {torch.bfloat16}, {torch.float32}
    assert seen == {
        "self_attn.q_proj": narrow,
        "fc1": narrow,
        "fc2": narrow,
        "self_attn_layer_norm": wide,
        "stream": wide,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overflow_is_left_out(optimizer: str, folder: Path) -> None:
    """One poisoned gradient: nothing changes but the scale, and the next step goes through."""
    told = recipe(run={"precision": "fp16-mixed"}, optimizer={"name": optimizer})
    ours = trained(told)
    scaler = set_scale(ours, 1024.0)
    first, second, third = steps(told, folder, 3)
    take_step(ours, told, first, 1, RATE)
    before = everything(ours)
    poison = ours.model.layers[1].fc1.weight.register_hook(lambda gradient: gradient * torch.inf)
    loss, norm = take_step(ours, told, second, 2, RATE)
    poison.remove()
    assert loss < 10
    assert not torch.tensor(norm).isfinite()
    assert same(everything(ours), before)
    assert scaler.get_scale() == 512
    assert take_step(ours, told, third, 3, RATE)[1] < 10
    assert scaler.get_scale() == 512
    changed = everything(ours)
    assert all(each.isfinite().all() and not torch.equal(each, before[name]) for name, each in changed.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_scale_that_is_too_large(optimizer: str, folder: Path) -> None:
    """Gradients of 2^27 times their size are beyond float16: the scale halves until they are not."""
    told = recipe(run={"precision": "fp16-mixed"}, optimizer={"name": optimizer})
    ours = trained(told)
    scaler = set_scale(ours, 2.0**27)
    packs = steps(told, folder, 1)[0]
    begun = {name: each.detach().clone() for name, each in ours.model.named_parameters()}
    number, norm = 0, torch.inf
    while same(dict(ours.model.named_parameters()), begun):
        assert scaler.get_scale() == 2.0 ** (27 - number)
        number += 1
        _, norm = take_step(ours, told, packs, number, RATE)
    assert 5 < number < 25
    assert all(each.isfinite().all() for each in everything(ours).values())
    # What got through is the gradient that float32 has.
    exact = recipe()
    assert norm == pytest.approx(take_step(trained(exact), exact, packs, 1, RATE)[1], rel=0.01)


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("family", ["esm2", "esm1nv"])
def test_recomputing_changes_nothing(family: str, dropout: dict[str, float], precision: str, tmp_path: Path) -> None:
    data = make_store(tmp_path / "data", sequences=30, alphabet="esm-1nv" if family == "esm1nv" else "esm")
    results = []
    for recompute in (False, True):
        told = recipe(family, model=dropout, run={"precision": precision, "recompute": recompute})
        found, ours = losses(told, data, 2)
        results.append((found, {name: each.grad for name, each in ours.model.named_parameters()}, everything(ours)))
    (plain, gradients, weights), (again, others, twins) = results
    assert plain == again
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, others[name]), name  # type: ignore[arg-type]
    assert same(weights, twins)


def test_dropout_is_drawn_for_each_step(folder: Path) -> None:
    packs = steps(recipe(), folder, 1)[0]

    def loss(number: int, dropout: dict[str, float]) -> float:
        told = recipe(model=dropout)
        return take_step(trained(told), told, packs, number, RATE)[0]

    assert loss(1, DROPOUT) == loss(1, DROPOUT)
    assert loss(1, {}) == loss(2, {})
    assert len({loss(1, DROPOUT), loss(2, DROPOUT), loss(1, {})}) == 3


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of PyTorch
def test_compiling(folder: Path) -> None:
    eager, _ = losses(recipe(), folder, 3)
    try:
        compiled, ours = losses(recipe(run={"compile": True}), folder, 3)
    except DeviceError as error:
        pytest.skip(str(error))
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert dict(ours.model.named_parameters()).keys() == dict(trained(recipe()).model.named_parameters()).keys()


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    from torch._inductor import config

    message = r"run.compile: no C\+\+ compiler was found; install one \(g\+\+\), or set run.compile=false"
    # Not by monkeypatch, which takes the setting away for good.
    with config.patch({"cpp.cxx": ("/nowhere/c++",)}), pytest.raises(DeviceError, match=message):
        trained(recipe(run={"compile": True}))


def test_the_first_scale_is_in_proportion_to_the_packs() -> None:
    """Each pack's gradient is as large as that of a step of one."""
    for packs, doublings in ((1, 0), (2, 1), (3, 2), (1008, 10)):
        assert Precision("fp16-mixed", CPU, packs).scaler.get_scale() == 2.0 ** (16 + doublings)


@pytest.mark.parametrize(
    ("name", "native", "measured"),
    [
        ("float32", True, torch.float32),
        ("bf16-mixed", True, torch.bfloat16),
        ("bf16-mixed", False, torch.float32),
        ("fp16-mixed", False, torch.float32),
    ],
)
def test_the_peak_is_that_of_the_type_that_computes(
    name: str, native: bool, measured: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in a type that the processor only emulates are not the measure of what it can do."""
    seen = set()

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.add(a.dtype)
        return a

    monkeypatch.setattr(metrics, "native_bfloat16", lambda device: native)
    monkeypatch.setattr(torch, "mm", product)
    peak = metrics.peak_flops(LogSettings(), CPU, TYPES[name])
    assert peak is not None
    assert peak > 0
    assert seen == {measured}
    assert metrics.peak_flops(LogSettings(peak_tflops=2), None, TYPES[name]) == 2e12
    assert metrics.peak_flops(LogSettings(), None, TYPES[name]) is None


def test_what_a_run_takes_is_told_at_the_rate_of_the_device() -> None:
    told = recipe(run={"steps": 1000})
    costs = estimate(architecture(told), told, 50.0)
    total = costs.flops * told.run.steps * told.batch.packs * told.batch.pack
    lines = "\n".join(costs.lines(told, total / 150))
    assert f"in all: 2.5 minutes of matrix products at {total / 150e12:.3g} TFLOP/s" in lines
    assert "TFLOP/s" not in "\n".join(costs.lines(told, None))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1 second"), (99.4, "99 seconds"), (150, "2.5 minutes"), (3e4, "8.3 hours"), (9e8, "10,417 days")],
)
def test_times(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
