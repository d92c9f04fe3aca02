"""Layers divided among processes equal those of one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from parallel_models import TOKENS, alone, assert_equal, gradients, packs, small, sum_partial_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from protea.errors import UsageError
from protea.train.objective import masked_loss
from protea.train.tensor_parallel import apply_tensor_parallel, check_tensor_parallel
from protea.train.world import World
from protea.transforms.training import recompute_layers
from ranks import run_ranks


def divided(world: World, family: str, *, recompute: bool = False) -> None:
    """Compare the loss and all gradients of a divided model with those of the whole one."""
    model = small(family)
    batches = packs(model, 3)
    expected, whole = alone(model, batches)
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("tensor",))
    apply_tensor_parallel(model, mesh)
    if recompute:
        recompute_layers(model)
    fc2 = model.get_parameter("layers.1.fc2.weight")
    assert isinstance(fc2, DTensor)
    assert fc2.to_local().shape == (32, 64 // world.size)
    # Two steps: nothing of the first is left in the second.
    for _ in range(2):
        model.zero_grad()
        total = torch.zeros(())
        masked = sum(len(batch.rows) for batch in batches)
        for batch in batches:
            share = masked_loss(model, model(batch.inputs, rows=batch.wanted), batch) / masked
            share.backward()
            total += share.detach()
        sum_partial_gradients(model)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
        assert_equal(gradients(model), whole, 1e-5)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            assert not name.startswith("layers.")
            copies = world.gather(parameter.grad)
            assert all(torch.equal(copy, copies[0]) for copy in copies), name
        else:
            assert parameter.grad.placements == parameter.placements, name


def odd_pack(world: World) -> None:
    model = small("esm2")
    apply_tensor_parallel(model, init_device_mesh("cpu", (world.size,), mesh_dim_names=("tensor",)))
    with pytest.raises(UsageError, match=r"batch\.pack"):
        model(packs(model, 1, TOKENS + 1)[0].inputs)


def several(world: World, families: Sequence[str]) -> None:
    for family in families:
        divided(world, family, recompute=family == "esm2")
    odd_pack(world)


def test_divided_layers_equal_one_process() -> None:
    run_ranks(2, several, ("esm2", "esm1nv"))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_families_can_be_divided(ranks: int) -> None:
    run_ranks(ranks, several, ("esm2", "esm2nv", "esm1b", "esm1v", "esm1nv"))


@pytest.mark.parametrize("ranks", [3, 8])
def test_heads_that_do_not_divide(ranks: int) -> None:
    with pytest.raises(UsageError) as caught:
        check_tensor_parallel(small("esm2"), ranks)
    assert f"parallel.tensor={ranks} " in str(caught.value)
    assert str(caught.value).endswith("it may be 1, 2, 4")


def test_dropout_is_refused() -> None:
    with pytest.raises(UsageError, match="hidden_dropout_prob=0"):
        check_tensor_parallel(small("esm1nv", dropout=0.1), 2)


def test_other_layers_are_refused() -> None:
    model = small("esm2")
    model.layers[1] = torch.nn.Identity()
    with pytest.raises(UsageError, match="cannot be divided"):
        check_tensor_parallel(model, 2)
