"""How many processes of each kind share a run: its layout, and what it asks of a recipe."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import nn

from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.text import counted
from protea.train.recipe import Recipe

_KEPT: Final = 16 << 30
"""Bytes of a model's weights and gradients up to which each process keeps all of them until the end of a step."""


class Division(NamedTuple):
    """The number of processes of each kind."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def data(self) -> int:
        """Processes that compute different packs."""
        return self.replicate * self.shard

    @property
    def processes(self) -> int:
        """All processes."""
        return self.data * self.tensor * self.pipeline

    def keeps_layers(self, weights: int) -> bool:
        """Whether a process keeps the whole layers of its stage during a step, which have so many bytes of weights."""
        # A stage would gather its layers again for each pack.
        return self.pipeline > 1 or 2 * weights <= _KEPT

    def gathers_narrow(self, model: Encoder, dtype: torch.dtype) -> bool:
        """Whether processes gather the weights of layers in the type of their products, which rounds them anyway."""
        if dtype == torch.float32 or self.tensor * self.pipeline > 1:
            return False
        owners = [part for part in model.layers.modules() if any(each.ndim > 1 for each in part.parameters(False))]
        return all(isinstance(owner, nn.Linear) for owner in owners)

    def __str__(self) -> str:
        kinds = [f"{name} {number}" for name, number in self._asdict().items() if number > 1]
        return " x ".join(kinds) or "one process"


def named_layout(recipe: Recipe) -> Division:
    """The smallest layout that a recipe names."""
    told = recipe.parallel
    return Division(told.replicate, 1 if told.shard == "auto" else told.shard, told.tensor, told.pipeline)


def nearest_layout(recipe: Recipe, processes: int) -> Division:
    """The layout that a recipe names, with as many shards as a number of processes allows if it leaves that open."""
    told = recipe.parallel
    others = told.replicate * told.tensor * told.pipeline
    shard = max(1, processes // others) if told.shard == "auto" else told.shard
    return Division(told.replicate, shard, told.tensor, told.pipeline)


def product(recipe: Recipe) -> str:
    """The layout that a recipe names, in words."""
    told = recipe.parallel
    sizes = f"replicate {told.replicate} x shard {told.shard} x tensor {told.tensor} x pipeline {told.pipeline}"
    return f"parallel: {sizes}"


def plan_layout(recipe: Recipe, processes: int) -> Division:
    """The layout of a recipe for a number of processes; ``UsageError`` if they do not fit."""
    layout = nearest_layout(recipe, processes)
    if layout.processes != processes:
        raise UsageError(
            f"{product(recipe)} makes {layout.processes}, but the number of processes is {processes}; change parallel, "
            f"or start {layout.processes} with torchrun"
        )
    if layout.shard * layout.tensor > 1 and recipe.optimizer.name == "muon":
        raise UsageError(
            "optimizer.name=muon needs whole matrices, which parallel.shard and parallel.tensor cut; set both to 1 and "
            f"parallel.replicate={processes // layout.pipeline}, or optimizer.name=adamw"
        )
    if recipe.batch.pack % layout.tensor:
        raise UsageError(
            f"parallel.tensor={layout.tensor} does not divide the {recipe.batch.pack:,} tokens of batch.pack; set it "
            f"to a multiple of {layout.tensor}"
        )
    if processes > 1 and recipe.run.precision == "fp16-mixed":
        raise UsageError(
            "run.precision=fp16-mixed works in one process only: its loss scale is not shared between processes; use "
            "bf16-mixed, or float32"
        )
    _check_packs(recipe, layout)
    return layout


def _check_packs(recipe: Recipe, layout: Division) -> None:
    packs, pack, ranks = recipe.batch.packs, recipe.batch.pack, layout.data
    if packs % ranks == 0:
        return
    nearest = [number for number in (packs // ranks * ranks, -(-packs // ranks) * ranks) if number]
    raise UsageError(
        f"batch.tokens {recipe.batch.tokens:,} are {counted(packs, 'pack')} of {pack:,}, which {ranks} data ranks "
        f"cannot share equally; set batch.tokens={' or '.join(str(number * pack) for number in nearest)}, or change "
        "batch.pack"
    )
