"""Stages on several processes equal one process; the plan of a step holds for any number of ranks, stages and packs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_models import alone, assert_equal, gradients, packs, small, sum_shared
from torch.distributed.device_mesh import init_device_mesh

from protea.errors import UsageError
from protea.train.objective import masked_loss
from protea.train.pipeline import Pipeline, StageTask, cut, schedule, stages_of
from protea.train.world import World
from protea.transforms.training import recompute_layers
from ranks import run_ranks

SEEDS = [11, 12, 13, 14]


def staged(
    world: World,
    family: str,
    *,
    steps: int = 5,
    per_rank: int = 1,
    dropout: float = 0.0,
    number: int = 4,
    recompute: bool = False,
) -> None:
    """Compare losses and gradients of some steps with those of one process, and the copies with each other."""
    whole, model = small(family, dropout=dropout), small(family, dropout=dropout)
    cut(model, world.rank, world.size, per_rank)
    if recompute:
        recompute_layers(model)
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("pipeline",))
    pipeline = Pipeline(model, mesh, per_rank=per_rank)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3, eps=1e-4) for each in (whole, model)]
    for step in range(steps):
        # Packs of another number of tokens in each step.
        batches = packs(whole, number, 48 + step)
        masked = sum(len(batch.rows) for batch in batches)
        seeds = [seed + 100 * step for seed in SEEDS[:number]]
        expected, complete = alone(whole, batches, seeds, keep=True)
        last = []
        loss = pipeline.run(
            batches,
            lambda hidden, pack, masked=masked: masked_loss(model, hidden, pack) / masked,
            seeds=seeds,
            before_backward=last.append,
        )
        assert last.count(True) == per_rank
        assert len(last) == number * per_rank
        sum_shared(world, model)
        torch.testing.assert_close(world.sum(loss.clone()), expected, rtol=1e-6, atol=0)
        assert bool(loss) == (world.rank == world.size - 1)
        found = gradients(model)
        if step == 0:
            assert all(torch.equal(found[name], complete[name]) for name in found if name.startswith("layers."))
        # The optimizer of a tied embedding, whose parts are added up in another order, multiplies differences.
        assert_equal(found, complete, 1e-6 if step == 0 else 3e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    shared = {name: parameter.detach() for name, parameter in parameters.items() if not name.startswith("layers.")}
    for other in world.gather(shared):
        assert other.keys() == shared.keys()
        assert all(torch.equal(other[name], shared[name]) for name in shared)
    assert "word_embeddings.weight" in shared


def validated(world: World) -> None:
    """Without gradients, only forward."""
    whole, model = small("esm1nv", dropout=0.1).eval(), small("esm1nv", dropout=0.1).eval()
    batches = packs(whole, 3)
    expected, _ = alone(whole, batches)
    cut(model, world.rank, world.size)
    pipeline = Pipeline(model, init_device_mesh("cpu", (world.size,), mesh_dim_names=("pipeline",)))
    masked = sum(len(batch.rows) for batch in batches)
    with torch.no_grad():
        loss = pipeline.run(batches, lambda hidden, pack: masked_loss(model, hidden, pack) / masked)
    torch.testing.assert_close(world.sum(loss), expected, rtol=1e-6, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def some(world: World) -> None:
    staged(world, "esm2")
    staged(world, "esm1nv", steps=2, per_rank=2, dropout=0.1, recompute=True)
    staged(world, "esm1b", steps=1, number=1)
    validated(world)


def test_stages_equal_one_process() -> None:
    run_ranks(2, some)


def many(world: World) -> None:
    for family in ("esm2nv", "esm1b", "esm1v", "esm1nv"):
        staged(world, family, number=3, dropout=0.1)
        if world.size == 2:
            staged(world, family, number=3, per_rank=2)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_stages_of_all_families(ranks: int) -> None:
    run_ranks(ranks, many)


def test_parameters_keep_their_names() -> None:
    """Every parameter of the model is on some rank, under its name."""
    model = small("esm1b")
    names = set(dict(model.named_parameters()))
    found = []
    for rank in range(2):
        part = small("esm1b")
        cut(part, rank, 2)
        found.append(set(dict(part.named_parameters())))
    assert found[0] | found[1] == names
    assert all(not name.startswith("layers.") for name in found[0] & found[1])
    assert {name.split(".")[1] for name in found[1] if name.startswith("layers.")} == {"2", "3"}


def test_layers_that_do_not_divide() -> None:
    model = small("esm2", layers=6)
    with pytest.raises(UsageError) as caught:
        stages_of(model, 4)
    assert str(caught.value).endswith("it may be 1, 2, 3, 6")
    with pytest.raises(UsageError) as caught:
        stages_of(model, 2, 2)
    assert str(caught.value).endswith("it may be 1, 3, or set parallel.schedule=1f1b")


@given(ranks=st.integers(1, 8), per_rank=st.integers(1, 4), packs=st.integers(1, 40))
def test_every_plan_is_complete_and_possible(ranks: int, per_rank: int, packs: int) -> None:
    stages = ranks * per_rank
    ticks = schedule(ranks, per_rank, packs)
    when: dict[StageTask, int] = {}
    for time, tick in enumerate(ticks):
        for rank, task in enumerate(tick):
            if task is not None:
                assert task.stage % ranks == rank
                assert task not in when
                when[task] = time
    assert len(when) == 2 * stages * packs
    for task, time in when.items():
        if task.forward and task.stage:
            assert when[task._replace(stage=task.stage - 1)] < time
        elif not task.forward:
            assert when[task._replace(forward=True)] < time
            if task.stage < stages - 1:
                assert when[task._replace(stage=task.stage + 1)] < time
    if per_rank == 1:
        assert len(ticks) == 2 * (packs + ranks - 1)
    elif packs >= ranks:
        assert len(ticks) == 2 * (packs * per_rank + ranks - 1)
    for rank in range(ranks):
        held = most = 0
        for tick in ticks:
            if (task := tick[rank]) is not None:
                held += 1 if task.forward else -1
                most = max(most, held)
        assert most <= (
            ranks - rank if per_rank == 1 else 2 * (ranks - rank) - 1 + (per_rank - 1) * min(packs, 2 * ranks)
        )
