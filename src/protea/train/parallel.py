"""How the processes of a run share its model and its packs.

A ``Division``, or layout, says how many processes there are of each kind: replicas of the model, shards of its weights,
parts of its matrices (tensor) and stages of its layers (pipeline). ``replicate x shard`` processes, the data ranks,
compute different packs: data rank r of d takes packs r, r + d, ... of a step.

Everything is a sum over processes, never a mean of means. The gradient of a step is the sum of those of all packs, each
already divided by the number of tokens predicted in the whole step. Dropout depends on the number of the pack in the
step. So all layouts compute what one process does, except for the order of sums.

FSDP2 shards the layers, or what stages and divided matrices leave of them. What is outside them, such as the word
embeddings, which the head uses too, is small: every process has it whole, and its gradients are summed after the last
pack. So it is with the norms and biases of the layers, if their matrices are gathered in the narrow type of the
products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from protea.data.loader import TrainingBatch
from protea.models.encoder import Encoder
from protea.train.division import Division, plan_layout
from protea.train.recipe import Recipe
from protea.train.world import Ranks, World, local

if TYPE_CHECKING:
    from protea.train.pipeline import Pipeline

Loss = Callable[[Tensor, TrainingBatch], Tensor]
"""A pack's share of a loss, from the last hidden states of its masked tokens, ``[M, D]``."""

STAGES: Final = {"1f1b": 1, "interleaved": 2}
"""Stages of each process of a pipeline, by its schedule."""


class Parallel:
    """The part of one process that trains alone: the whole model and all packs.

    Attributes:
        share: the number of this process among those that compute different packs.
        fixed: whether all packs have the same number of tokens, the last of them padding in no count.
        pipeline: the schedule of the stages, if the layers are divided into stages.
    """

    share = 0
    fixed = False
    pipeline: Pipeline | None = None

    def __init__(self, world: World, layout: Division) -> None:
        self.world, self.layout = world, layout

    def check(self, model: Encoder) -> None:
        """Raise ``UsageError`` if a model cannot be divided."""

    def cut(self, model: Encoder) -> None:
        """Drop the layers of other stages from a model, which may be on the meta device, in place."""

    def divide(self, model: Encoder) -> None:
        """Divide the matrices of the layers of a finished model, in place, before any other transform."""

    def apply(self, model: Encoder, dtype: torch.dtype) -> None:
        """Shard a finished model, in place, after all other transforms; its parameters keep their names.

        ``dtype`` is the type that matrix products are computed in.
        """

    def number(self, place: int) -> int:
        """The number in its step of a pack that is at a place among those of this process."""
        return self.share + place * self.layout.data

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number that data ranks have, over them."""
        return list(numbers)

    def sum(self, tensor: Tensor) -> Tensor:
        """The same of a tensor, which is replaced."""
        return tensor

    def compute(
        self,
        model: Encoder,
        packs: Sequence[TrainingBatch],
        loss: Loss,
        *,
        seeds: Sequence[int],
        autocast: Callable[[], AbstractContextManager[Any]],
        scale: Callable[[Tensor], Tensor],
        stop: Callable[[], bool],
    ) -> Tensor | None:
        """Compute the gradients of this process's packs; returns the sum of their losses.

        ``seeds`` are those of the packs' random numbers, and ``scale`` is applied to losses before backward passes.
        ``stop`` may be asked between packs; if it returns true, the result is ``None``.
        """
        total = torch.zeros((), device=model.device)
        for place, pack in enumerate(packs):
            if place and stop():
                return None
            batch = pack.to(model.device, non_blocking=True)
            self.begin(model, last=place + 1 == len(packs))
            torch.manual_seed(seeds[place])
            with autocast():
                share = loss(model(batch.inputs, rows=batch.wanted), batch)
            scale(share).backward()  # type: ignore[no-untyped-call]
            total += share.detach()
        return total

    def begin(self, model: Encoder, *, last: bool) -> None:
        """Before a pack's passes; after the ``last`` pack of a step, gradients are summed over processes."""

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

    def __init__(self, world: World, layout: Division, recipe: Recipe, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(world, layout)
        sizes = (layout.pipeline, layout.replicate, layout.shard, layout.tensor)
        names = ("pipeline", "replicate", "shard", "tensor")
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        place = dict(zip(names, self.mesh.get_coordinate() or (), strict=True))
        self.share = place["replicate"] * layout.shard + place["shard"]
        self.fixed = recipe.run.compile or layout.tensor > 1
        self._stages, self._stage = STAGES[recipe.parallel.schedule], place["pipeline"]
        self._reshards = True
        # In a pipeline, processes do different operations; it counts its ticks itself.
        apart = self.mesh["pipeline"].get_group().group_name
        groups = [self.mesh[name].get_group() for name in names[1:]]
        world.follow(group for group in groups if group.size() > 1 and group.group_name != apart)

    def check(self, model: Encoder) -> None:
        """Raise ``UsageError`` if a model cannot be divided."""
        if self.layout.pipeline > 1:
            from protea.train.pipeline import stages_of

            stages_of(model, self.layout.pipeline, self._stages)
        if self.layout.tensor > 1:
            from protea.train.tensor_parallel import check_tensor_parallel

            check_tensor_parallel(model, self.layout.tensor)

    def cut(self, model: Encoder) -> None:
        """Drop the layers of other stages from a model, which may be on the meta device, in place."""
        if self.layout.pipeline > 1:
            from protea.train.pipeline import cut

            cut(model, self._stage, self.layout.pipeline, self._stages)

    def divide(self, model: Encoder) -> None:
        """Divide the matrices of the layers of a finished model, in place, before any other transform."""
        if self.layout.tensor > 1:
            from protea.train.tensor_parallel import apply_tensor_parallel

            apply_tensor_parallel(model, self.mesh["tensor"])

    def apply(self, model: Encoder, dtype: torch.dtype) -> None:
        """Shard a finished model, in place, after all other transforms; its parameters keep their names."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        layers = sum(local(parameter).numel() for parameter in model.layers.parameters())
        self._reshards = not self.layout.keeps_layers(4 * layers)
        narrow = self.layout.gathers_narrow(model, dtype)
        # Norms and biases stay in float32, and all parameters that FSDP2 gathers together have one type.
        whole = {
            parameter
            for name, parameter in model.named_parameters()
            if not name.startswith("layers.") or (narrow and parameter.ndim == 1)
        }
        types: dict[str, Any] = {"param_dtype": dtype, "reduce_dtype": torch.float32} if narrow else {}
        options: dict[str, Any] = {
            "mesh": self.mesh["shard"] if self.layout.replicate == 1 else self.mesh["replicate", "shard"],
            "reshard_after_forward": self._reshards,
            # The default would round the rotary angles, too.
            "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False, **types),
            "ignored_params": whole,
        }
        for layer in model.layers:
            fully_shard(layer, **options)
        # The root has no parameters of its own: it lets the layers share streams and fetch ahead.
        root: Any = fully_shard(model, **options)
        for part in (root, *model.layers):
            part.set_gradient_divide_factor(1.0)
            # Without this, the factor becomes an operation that Gloo lacks.
            part.set_force_sum_reduction_for_comms(True)
        if self.layout.pipeline > 1:
            from protea.train.pipeline import Pipeline

            mesh, tensor = self.mesh["pipeline"], self.layout.tensor
            self.pipeline = Pipeline(model, mesh, per_rank=self._stages, tensor=tensor, arrive=self.world.arrive)

    def compute(self, model: Encoder, packs: Sequence[TrainingBatch], loss: Loss, **options: Any) -> Tensor | None:
        """Compute the gradients of this process's packs; returns the sum of their losses."""
        if self.pipeline is None:
            return super().compute(model, packs, loss, **options)

        def begin(last: bool) -> None:
            self.begin(model, last=last)

        told = {name: options[name] for name in ("seeds", "autocast")}
        return self.pipeline.run(packs, loss, **told, before_backward=begin)

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number that data ranks have, over them."""
        return [number // (self.layout.tensor * self.layout.pipeline) for number in self.world.total(*numbers)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The same of a tensor, which is replaced; of a pipeline, the last stage has it, and the others have 0."""
        return self.world.sum(tensor).div_(self.layout.tensor)

    def begin(self, model: Encoder, *, last: bool) -> None:
        """Before a pack's forward pass; after the ``last`` pack of a step, gradients are summed over processes."""
        self.world.at("")
        root: Any = model
        # Between two backward passes of one pack after the other, FSDP2 would fetch a layer ahead that nobody needs.
        root.set_is_last_backward(last or self.pipeline is None)
        if self._reshards:
            # Whole gradients of all layers would not fit.
            root.set_requires_all_reduce(last)
        else:
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)

    def reduce(self, model: Encoder, loss: Tensor) -> Tensor:
        """After the last pack: complete the gradients; returns the sum of the losses of all processes."""
        outside = [each for each in model.parameters() if each.requires_grad and local(each) is each]
        # Stages have gradients of what they use.
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in outside]
        flat = self.sum(torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)]))
        parts = torch.split(flat[1:], [gradient.numel() for gradient in gradients])
        for parameter, part in zip(outside, parts, strict=True):
            parameter.grad = part.view_as(parameter)
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
        outside = self.world.size // self.layout.pipeline // tensor.device_mesh.size()
        for placement, size in sizes:
            outside *= size if placement.is_replicate() else 1
        return int(outside)


ALONE: Final = Parallel(World(), Division())


def join_layout(world: World, recipe: Recipe, device: torch.device) -> Parallel:
    """This process's part in a run; ``UsageError`` if the recipe and the number of processes do not fit."""
    layout = plan_layout(recipe, world.size)
    return Sharded(world, layout, recipe, device) if isinstance(world, Ranks) else Parallel(world, layout)
