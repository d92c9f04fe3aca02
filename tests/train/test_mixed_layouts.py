"""Stages, divided layers and FSDP2 together, and the layouts of the recipes on machines that nobody has here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from parallel_models import alone, assert_equal, gradients, packs, small, sum_partial_gradients, sum_shared
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from protea.models.encoder import Encoder
from protea.train.model import architecture
from protea.train.objective import masked_loss
from protea.train.pipeline import Pipeline, cut
from protea.train.recipe import read_recipe
from protea.train.tensor_parallel import apply_tensor_parallel
from protea.train.world import World
from protea.transforms.training import recompute_layers
from ranks import run_ranks

NAMES = ("pipeline", "replicate", "shard", "tensor")


def shard(model: Encoder, mesh: object) -> None:
    """FSDP2 that adds up gradients, for every layer and for the rest."""
    options: Any = {"mesh": mesh, "reshard_after_forward": False}
    for layer in model.layers:
        fully_shard(layer, **options)
    outside = {parameter for name, parameter in model.named_parameters() if not name.startswith("layers.")}
    fully_shard(model, ignored_params=outside, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def layout(
    world: World, family: str, pipeline: int, data: int, tensor: int, *, per_rank: int = 1, recompute: bool = False
) -> None:
    """Compare two steps of a layout with one process."""
    mesh = init_device_mesh("cpu", (pipeline, 1, data, tensor), mesh_dim_names=NAMES)
    whole, model = small(family), small(family)
    batches = packs(whole, 4)
    masked = sum(len(batch.rows) for batch in batches)
    expected, complete = alone(whole, batches)
    cut(model, mesh.get_local_rank("pipeline"), pipeline, per_rank)
    if tensor > 1:
        apply_tensor_parallel(model, mesh["tensor"])
    if recompute:
        recompute_layers(model)
    if data > 1:
        shard(model, mesh["shard"])
    stages = Pipeline(model, mesh["pipeline"], per_rank=per_rank, tensor=tensor)

    def before_backward(last: bool) -> None:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)

    for _ in range(2):
        model.zero_grad()
        loss = stages.run(
            batches[mesh.get_local_rank("shard") :: data],
            lambda hidden, pack: masked_loss(model, hidden, pack) / masked,
            before_backward=before_backward,
        )
        sum_shared(world, model, tensor)
        sum_partial_gradients(model)
        torch.testing.assert_close(world.sum(loss) / tensor, expected, rtol=1e-6, atol=0)
        assert_equal(gradients(model), complete, 1e-6 if tensor == 1 else 1e-5)


def all_of_four(world: World) -> None:
    for family in ("esm2", "esm1nv"):
        layout(world, family, 2, 1, 2)
        layout(world, family, 2, 2, 1)
        layout(world, family, 1, 2, 2)
    layout(world, "esm1b", 2, 2, 1, per_rank=2, recompute=True)
    layout(world, "esm1b", 4, 1, 1, recompute=True)
    layout(world, "esm1b", 1, 1, 4)


@pytest.mark.long
def test_layouts_of_four_processes_equal_one() -> None:
    run_ranks(4, all_of_four, seconds=300)


@contextmanager
def pretended(size: int, rank: int) -> Iterator[None]:
    """A process group of many processes, of which only this one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


LARGE = [
    ("esm2_650M", 1, 1, 64),
    ("esm2_3B", 4, 1, 256),
    ("esm2nv_15B", 8, 2, 256),
    ("esm2nv_20B", 8, 8, 256),
]
MORE = [
    (name, pipeline, tensor, size)
    for size in (64, 256)
    for name, pipeline, tensors in (
        ("esm1b", 3, (1, 4)),
        ("esm1nv", 2, (1,)),
        ("esm2_650M", 1, (1, 4)),
        ("esm2_3B", 4, (1, 2, 8)),
        ("esm2nv_3B", 4, (1,)),
        ("esm2_15B", 8, (1, 2, 4, 8)),
        ("esm2nv_20B", 8, (1, 2, 4)),
    )
    for tensor in tensors
]


@pytest.mark.parametrize(
    ("name", "pipeline", "tensor", "size"), [*LARGE, *(pytest.param(*each, marks=pytest.mark.long) for each in MORE)]
)
def test_layouts_of_the_recipes(name: str, pipeline: int, tensor: int, size: int) -> None:
    """Every stage of every recipe builds on the meta device; together they have every parameter once."""
    recipe = read_recipe(name)
    whole = {key: parameter.numel() for key, parameter in architecture(recipe).named_parameters()}
    data = size // (pipeline * tensor)
    found: dict[str, int] = {}
    for stage in range(pipeline):
        with pretended(pipeline * data * tensor, stage * data * tensor + tensor - 1):
            mesh = init_device_mesh("cpu", (pipeline, 1, data, tensor), mesh_dim_names=NAMES)
            model = architecture(recipe)
            assert mesh.get_local_rank("pipeline") == stage
            cut(model, stage, pipeline)
            if tensor > 1:
                apply_tensor_parallel(model, mesh["tensor"])
            shard(model, mesh["shard"])
            for key, parameter in model.named_parameters():
                assert parameter.is_meta
                assert isinstance(parameter, DTensor) == key.startswith("layers.")
                assert key not in found or not key.startswith("layers.")
                found[key] = parameter.numel()
    assert found == whole
