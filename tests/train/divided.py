"""A small model divided among processes by PyTorch's own transforms, in every layout that training has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from protea.train.world import World

LAYOUTS = {
    1: ["whole"],
    2: ["shard", "tensor", "pipeline", "copies"],
    4: ["shard", "replicate", "tensor", "shard and tensor", "pipeline and shard"],
}
"""Layouts by the number of processes."""


class Toy(nn.Module):
    """Tensors of all kinds: even and uneven ones, vectors, one that is shorter than the processes are many."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.odd = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(6)


def full(seed: int = 0) -> dict[str, Tensor]:
    """All weights, moments and steps of the model, undivided."""
    torch.manual_seed(seed)
    toy = Toy()
    for parameter in toy.parameters():
        nn.init.normal_(parameter)
    return {name: tensor.clone() for name, tensor in tensors(toy).items()}


def tensors(toy: nn.Module) -> dict[str, Tensor]:
    """What a run saves of the model; moments are functions of weights, so that they are divided as these are."""
    found: dict[str, Tensor] = {}
    for name, parameter in toy.named_parameters():
        found[f"model.{name}"] = parameter.detach()
        found[f"optimizer.{name}.step"] = torch.tensor(7.0)
        found[f"optimizer.{name}.exp_avg"] = parameter.detach() * 2
        found[f"optimizer.{name}.exp_avg_sq"] = (parameter.detach() * 3).to(torch.bfloat16)
    return found


def divided(world: World, layout: str, values: dict[str, Tensor]) -> nn.Module:
    """The model with some weights, in a layout."""
    toy = Toy()
    toy.load_state_dict({name: values[f"model.{name}"] for name, _ in toy.named_parameters()})
    if layout in ("whole", "copies"):
        return toy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    sizes = {
        "shard": (1, 1, world.size, 1),
        "replicate": (1, 2, world.size // 2, 1),
        "tensor": (1, 1, 1, world.size),
        "shard and tensor": (1, 1, world.size // 2, 2),
        "pipeline": (world.size, 1, 1, 1),
        "pipeline and shard": (2, 1, world.size // 2, 1),
    }[layout]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pipeline", "replicate", "shard", "tensor"))
    if sizes[0] > 1:
        # The first stage has the words, the second what is left, and both the norm.
        first = mesh["pipeline"].get_local_rank() == 0
        for name in ("up", "down", "odd") if first else ("words",):
            delattr(toy, name)
    if sizes[3] > 1:
        parallelize_module(toy, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if sizes[1] * sizes[2] > 1:
        data: Any = mesh["replicate", "shard"] if sizes[1] > 1 else mesh["shard"]
        ignored = set(toy.words.parameters()) if hasattr(toy, "words") else set()
        fully_shard(toy, mesh=data, ignored_params=ignored)
    return toy


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor, put together by PyTorch."""
    put_together = getattr(tensor, "full_tensor", None)
    return tensor if put_together is None else put_together()
