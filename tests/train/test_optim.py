"""Optimizers beside PyTorch's own, parameter by parameter."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import CONFIGS, disturb
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.recipe import OptimizerSettings

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = torch.amp.GradScaler("cpu", enabled=False)
MATRICES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def new_model() -> Encoder:
    """With a contact head that is not trained, as in every run."""
    model = build(CONFIGS["esm1b"])
    model.load_state_dict({name: initial_value(model, name, 0) for name, _ in model.named_parameters()}, assign=True)
    disturb(model)
    assert model.contact_head is not None
    model.contact_head.requires_grad_(False)
    return model


def give_gradients(model: nn.Module, seed: int, size: float = 1e-2) -> None:
    """Random gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty(parameter.shape).normal_(0, size, generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def test_parameters_that_require_gradients_are_trained() -> None:
    model = new_model()
    names = {name for name, _ in model.named_parameters()}
    head = {"contact_head.regression.weight", "contact_head.regression.bias"}
    assert names - set(parameters_to_train(model)) == head
    model.word_embeddings.requires_grad_(False)
    assert names - set(parameters_to_train(model)) == {*head, "word_embeddings.weight"}


def test_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="there is nothing to train: no parameter of the model requires gradients"):
        Optimizers(parameters_to_train(new_model().requires_grad_(False)), OptimizerSettings())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_of_layers_alone(name: str) -> None:
    """Muon then has no AdamW beside it; both clip, step, and give their state back."""
    model = new_model().requires_grad_(False)
    matrices = {key for key, each in model.named_parameters() if each.ndim == 2 and key.startswith("layers.")}
    for key in matrices:
        model.get_parameter(key).requires_grad_(True)
    optimizers = Optimizers(parameters_to_train(model), OptimizerSettings(name=name))
    assert len(optimizers.members) == 1
    before = weights(model)
    for key in matrices:
        model.get_parameter(key).grad = torch.ones_like(before[key])
    assert optimizers.clip(OFF, 1.0) > 1
    optimizers.step(OFF, 1e-2)
    assert {key for key, each in weights(model).items() if not torch.equal(each, before[key])} == matrices
    Optimizers(parameters_to_train(model), OptimizerSettings(name=name)).load(dict(optimizers.state()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_alone_decay(name: str) -> None:
    model = new_model()
    optimizers = Optimizers(parameters_to_train(model), OptimizerSettings(name=name, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = weights(model)
    optimizers.step(OFF, 0.1)
    for key, after in weights(model).items():
        decays = re.search(r"(_proj|fc1|fc2|dense|embeddings)\.weight$", key)
        expected = before[key] * (1 - 0.1 * 0.5) if decays else before[key]
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0, msg=key)


def test_adamw() -> None:
    model, twin = new_model(), new_model()
    settings = OptimizerSettings(betas=(0.8, 0.95), eps=1e-5, weight_decay=0.3, clip=None)
    optimizers = Optimizers(parameters_to_train(model), settings)
    trained = list(parameters_to_train(twin).values())
    plain = torch.optim.AdamW(
        [
            {"params": [each for each in trained if each.ndim == 2], "weight_decay": 0.3},
            {"params": [each for each in trained if each.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-5,
        foreach=False,
        fused=False,
    )
    for step in range(1, 11):
        for each in (model, twin):
            give_gradients(each, step)
        optimizers.step(OFF, 1e-2 / step)
        for group in plain.param_groups:
            group["lr"] = 1e-2 / step
        plain.step()
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=key)


def test_muon_takes_the_matrices_of_layers() -> None:
    model = new_model()
    optimizers = Optimizers(parameters_to_train(model), OptimizerSettings(name="muon"))
    give_gradients(model, 0)
    optimizers.step(OFF, 1e-3)
    kinds: dict[str, set[str]] = {}
    for key, _ in optimizers.state():
        name, _, kind = key.removeprefix("optimizer.").rpartition(".")
        kinds.setdefault(name, set()).add(kind)
    expected = {
        f"layers.{layer}.{'' if matrix.startswith('fc') else 'self_attn.'}{matrix}.weight"
        for layer in range(3)
        for matrix in MATRICES
    }
    assert {name for name, found in kinds.items() if found == {"momentum_buffer"}} == expected
    rest = set(parameters_to_train(model)) - expected
    assert {name for name, found in kinds.items() if found == {"step", "exp_avg", "exp_avg_sq"}} == rest


def test_muon() -> None:
    """The first update of a matrix is its gradient with all singular values near one, scaled as Liu et al. say."""
    model = new_model()
    optimizers = Optimizers(parameters_to_train(model), OptimizerSettings(name="muon", weight_decay=0.0))
    give_gradients(model, 0)
    before = weights(model)
    optimizers.step(OFF, 1e-2)
    for layer in range(3):
        for key in (f"layers.{layer}.fc1.weight", f"layers.{layer}.self_attn.q_proj.weight"):
            parameter = model.get_parameter(key)
            update = (before[key] - parameter.detach()) / (1e-2 * 0.2 * math.sqrt(max(parameter.shape)))
            assert parameter.grad is not None
            left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
            turned = left.T @ update @ right.T
            values = turned.diagonal()
            # Five iterations of Newton and Schulz in bfloat16 bring them between 0.7 and 1.2, but for the smallest.
            assert ((values > 0.6) & (values < 1.3)).float().mean() > 0.9
            assert (turned - turned.diag().diag()).abs().max() < 0.1


@given(st.floats(1e-6, 1e3), st.sampled_from([None, 1e-3, 0.5, 1.0, 100.0]), st.integers(0, 9))
def test_clipping(size: float, limit: float | None, seed: int) -> None:
    model, twin = nn.Linear(7, 5), nn.Linear(7, 5)
    optimizers = Optimizers(dict(model.named_parameters()), OptimizerSettings())
    for each in (model, twin):
        give_gradients(each, seed, size)
    norm = optimizers.clip(OFF, limit)
    expected = nn.utils.clip_grad_norm_(twin.parameters(), math.inf if limit is None else limit)
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


def _stepped(
    model: Encoder, settings: OptimizerSettings, steps: range, state: dict[str, Tensor] | None = None
) -> Optimizers:
    optimizers = Optimizers(parameters_to_train(model), settings)
    if state is not None:
        optimizers.load(state)
    for step in steps:
        give_gradients(model, step)
        optimizers.clip(OFF, settings.clip)
        optimizers.step(OFF, 1e-2)
    return optimizers


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_round(name: str) -> None:
    settings = OptimizerSettings(name=name)
    whole, first, second = (new_model() for _ in range(3))
    undisturbed = dict(_stepped(whole, settings, range(6)).state())
    state = dict(_stepped(first, settings, range(3)).state())
    kept = {key: value.clone() for key, value in state.items()}
    second.load_state_dict(weights(first) | dict(first.named_buffers()))
    resumed = dict(_stepped(second, settings, range(3, 6), state).state())
    assert resumed.keys() == undisturbed.keys() == state.keys()
    for key, value in undisturbed.items():
        assert torch.equal(resumed[key], value), key
    for key, value in weights(whole).items():
        assert torch.equal(second.get_parameter(key), value), key
    # What was loaded is a copy.
    assert all(torch.equal(state[key], value) for key, value in kept.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer.layers.9.fc1.weight.exp_avg": torch.zeros(160, 40)}, "layers.9.fc1.weight.exp_avg"),
        ({"optimizer.layers.0.fc1.weight.exp_avg": torch.zeros(40, 160)}, "layers.0.fc1.weight.exp_avg"),
        ({"optimizer.layers.0.fc1.weight.momentum_buffer": torch.zeros(160, 40)}, "momentum_buffer"),
        ({"optimizer.layers.0.fc1.weight.exp_avg": None}, "layers.0.fc1.weight"),
    ],
)
def test_state_of_another_model(change: dict[str, Any], message: str) -> None:
    state: dict[str, Any] = dict(_stepped(new_model(), OptimizerSettings(), range(1)).state()) | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        Optimizers(parameters_to_train(new_model()), OptimizerSettings()).load(state)


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_state_of_another_optimizer(before: str, after: str) -> None:
    state = dict(_stepped(new_model(), OptimizerSettings(name=before), range(1)).state())
    with pytest.raises(CheckpointError, match=r"optimizer.name"):
        Optimizers(parameters_to_train(new_model()), OptimizerSettings(name=after)).load(state)
