"""How the processes of a run share its model and its packs.

A ``Layout`` says how many processes there are of each kind: replicas of the model, shards of its weights, parts of its
matrices (tensor) and stages of its layers (pipeline). ``replicate x shard`` processes, the data ranks, compute
different packs: data rank r of d takes packs r, r + d, ... of a step.

Everything is a sum over processes, never a mean of means. The gradient of a step is the sum of those of all packs, each
already divided by the number of tokens predicted in the whole step. Dropout depends on the number of the pack in the
step. So all layouts compute what one process does, except for the order of sums.

FSDP2 shards the layers. What is outside them, such as the word embeddings, which the head uses too, is small: every
process has it whole, and its gradients are summed after the last pack.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.text import counted
from protea.train.recipe import Recipe
from protea.train.world import World, local

_KEPT: Final = 16 << 30
"""Bytes of a model's weights and gradients up to which each process keeps all of them until the end of a step."""


class Layout(NamedTuple):
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

    def __str__(self) -> str:
        kinds = [f"{name} {number}" for name, number in self._asdict().items() if number > 1]
        return " x ".join(kinds) or "one process"


def named_layout(recipe: Recipe) -> Layout:
    """The smallest layout that a recipe names."""
    told = recipe.parallel
    return Layout(told.replicate, 1 if told.shard == "auto" else told.shard, told.tensor, told.pipeline)


def plan_layout(recipe: Recipe, processes: int) -> Layout:
    """The layout of a recipe for a number of processes; ``UsageError`` if they do not fit."""
    told = recipe.parallel
    others = told.replicate * told.tensor * told.pipeline
    shard = max(1, processes // others) if told.shard == "auto" else told.shard
    layout = Layout(told.replicate, shard, told.tensor, told.pipeline)
    if layout.processes != processes:
        raise UsageError(
            f"parallel: replicate {told.replicate} x shard {told.shard} x tensor {told.tensor} x pipeline "
            f"{told.pipeline} needs {layout.processes}, but the number of processes is {processes}; change parallel, "
            f"or start {layout.processes} with torchrun"
        )
    if layout.tensor > 1 or layout.pipeline > 1:
        raise UsageError("parallel.tensor and parallel.pipeline must be 1; use parallel.shard for large models")
    if layout.shard > 1 and recipe.optimizer.name == "muon":
        raise UsageError(
            "optimizer.name=muon needs whole matrices, which parallel.shard cuts; set parallel.shard=1 and "
            f"parallel.replicate={layout.data}, or optimizer.name=adamw"
        )
    if processes > 1 and recipe.run.precision == "fp16-mixed":
        raise UsageError(
            "run.precision=fp16-mixed works in one process only: its loss scale is not shared between processes; use "
            "bf16-mixed, or float32"
        )
    _check_packs(recipe, layout)
    return layout


def _check_packs(recipe: Recipe, layout: Layout) -> None:
    packs, pack, ranks = recipe.batch.packs, recipe.batch.pack, layout.data
    if packs % ranks == 0:
        return
    nearest = [number for number in (packs // ranks * ranks, -(-packs // ranks) * ranks) if number]
    raise UsageError(
        f"batch.tokens {recipe.batch.tokens:,} are {counted(packs, 'pack')} of {pack:,}, which {ranks} data ranks "
        f"cannot share equally; set batch.tokens={' or '.join(str(number * pack) for number in nearest)}, or change "
        "batch.pack"
    )


class Parallel:
    """The part of one process that trains alone: the whole model and all packs.

    Attributes:
        share: the number of this process among those that compute different packs.
        fixed: whether all packs have the same number of tokens, the last of them padding in no count.
    """

    share = 0
    fixed = False

    def __init__(self, world: World, layout: Layout) -> None:
        self.world, self.layout = world, layout

    def apply(self, model: Encoder) -> None:
        """Divide a finished model, in place; its parameters keep their names."""

    def number(self, place: int) -> int:
        """The number in its step of a pack that is at a place among those of this process."""
        return self.share + place * self.layout.data

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number that data ranks have, over them."""
        return list(numbers)

    def sum(self, tensor: Tensor) -> Tensor:
        """The same of a tensor, which is replaced."""
        return tensor

    def begin(self, model: Encoder, *, last: bool) -> None:
        """Before a pack's forward pass; after the ``last`` pack of a step, gradients are summed over processes."""

    def reduce(self, model: Encoder, loss: Tensor) -> Tensor:
        """After the last pack: complete the gradients; returns the sum of the losses of all processes."""
        return loss

    def rest(self, model: Encoder) -> None:
        """After passes without gradients: let go of other processes' parts of the model."""

    def norm(self, tensors: list[Tensor]) -> Tensor:
        """The norm of all values of some tensors, those of other processes included."""
        return nn.utils.get_total_norm(tensors)


class Sharded(Parallel):
    """One of many processes, each with a part of the model and of the packs."""

    def __init__(self, world: World, layout: Layout, recipe: Recipe, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(world, layout)
        sizes = (layout.pipeline, layout.replicate, layout.shard, layout.tensor)
        names = ("pipeline", "replicate", "shard", "tensor")
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        place = dict(zip(names, self.mesh.get_coordinate() or (), strict=True))
        self.share = place["replicate"] * layout.shard + place["shard"]
        self.fixed = recipe.run.compile
        self._reshards = True

    def apply(self, model: Encoder) -> None:
        """Divide a finished model, in place; its parameters keep their names."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        layers = sum(local(parameter).numel() for parameter in model.layers.parameters())
        self._reshards = not self.layout.keeps_layers(4 * layers)
        options: dict[str, Any] = {
            "mesh": self.mesh["shard"] if self.layout.replicate == 1 else self.mesh["replicate", "shard"],
            "reshard_after_forward": self._reshards,
            # The default would round the rotary angles, too.
            "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
        }
        for layer in model.layers:
            fully_shard(layer, **options)
        # The root has no parameters of its own: it lets the layers share streams and fetch ahead.
        root: Any = fully_shard(model, ignored_params={*self._outside(model)}, **options)
        for part in (root, *model.layers):
            part.set_gradient_divide_factor(1.0)
            # Without this, the factor becomes an operation that Gloo lacks.
            part.set_force_sum_reduction_for_comms(True)

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number that data ranks have, over them."""
        return [number // (self.layout.tensor * self.layout.pipeline) for number in self.world.total(*numbers)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The same of a tensor, which is replaced."""
        return self.world.sum(tensor).div_(self.layout.tensor * self.layout.pipeline)

    def begin(self, model: Encoder, *, last: bool) -> None:
        """Before a pack's forward pass; after the ``last`` pack of a step, gradients are summed over processes."""
        self.world.at("")
        root: Any = model
        root.set_is_last_backward(last)
        if self._reshards:
            # Whole gradients of all layers would not fit.
            root.set_requires_all_reduce(last)
        else:
            root.set_requires_gradient_sync(last)

    def reduce(self, model: Encoder, loss: Tensor) -> Tensor:
        """After the last pack: complete the gradients; returns the sum of the losses of all processes."""
        gradients = [parameter.grad for parameter in self._outside(model) if parameter.grad is not None]
        flat = self.world.sum(torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)]))
        parts = torch.split(flat[1:], [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[0]

    def rest(self, model: Encoder) -> None:
        """After passes without gradients: let go of other processes' parts of the model."""
        for layer in model.layers:
            layer.reshard()  # type: ignore[operator]

    def norm(self, tensors: list[Tensor]) -> Tensor:
        """The norm of all values of some tensors, those of other processes included."""
        squares = [local(each).double().square().sum() / self._holders(each) for each in tensors]
        return self.world.sum(torch.stack(squares).sum()).sqrt().float()

    def _holders(self, tensor: Any) -> int:
        """The number of processes that hold the same part of a tensor."""
        if not hasattr(tensor, "placements"):
            return self.world.size
        sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
        outside = self.world.size // tensor.device_mesh.size()
        for placement, size in sizes:
            outside *= size if placement.is_replicate() else 1
        return int(outside)

    def _outside(self, model: Encoder) -> list[nn.Parameter]:
        """The parameters that are not in layers."""
        return [parameter for name, parameter in model.named_parameters() if not name.startswith("layers.")]


ALONE: Final = Parallel(World(), Layout())


def join_layout(world: World, recipe: Recipe, device: torch.device) -> Parallel:
    """This process's part in a run; ``UsageError`` if the recipe and the number of processes do not fit."""
    layout = plan_layout(recipe, world.size)
    return Parallel(world, layout) if world.size == 1 else Sharded(world, layout, recipe, device)
