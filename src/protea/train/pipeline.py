"""Pipeline parallelism: ranks with some layers each, and the order in which they compute the packs of a step.

The layers are cut into stages of equal size. Rank r of p holds stages r, r + p, ...; it computes the packs in the order
of 1F1B (Narayanan et al. 2019), or of its interleaved form (Narayanan et al. 2021) with several stages on a rank. Time
is counted in ticks, in each of which a rank computes at most one stage of one pack, forward or backward; after a tick,
the ranks exchange what was computed in it. Every rank knows the plan of all, so that each message has its receiver.

Every rank also holds what is not in a layer, such as the embeddings, and uses what its stages need of it. The gradients
of these parameters, of which a rank may have none, are to be added up over all ranks: then tied embeddings are no
special case, and all copies stay equal to the bit.

Random numbers are those of one process: the state of the generator goes with each pack from stage to stage.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from protea.data.loader import TrainingBatch
from protea.errors import UsageError
from protea.models.encoder import Encoder


def stages_of(model: Encoder, ranks: int, per_rank: int = 1) -> list[range]:
    """The layers of each stage, from 0; ``UsageError`` if they cannot be cut into stages of equal size."""
    layers, stages = model.config.num_hidden_layers, ranks * per_rank
    if layers % stages:
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % (n * per_rank) == 0)
        several = f" with {per_rank} stages a rank" if per_rank > 1 else ""
        simpler = " or set parallel.schedule=1f1b" if per_rank > 1 and layers % ranks == 0 else ""
        raise UsageError(
            f"parallel.pipeline={ranks}{several} does not divide the {layers} layers of this {model.config.family} "
            f"model; {f'it may be {fitting}' if fitting else 'set it to 1'}{simpler and f',{simpler}'}"
        )
    size = layers // stages
    return [range(first, first + size) for first in range(0, layers, size)]


def cut(model: Encoder, rank: int, ranks: int, per_rank: int = 1) -> None:
    """Drop the layers of other ranks, in place; those that stay keep their numbers and names."""
    stages = stages_of(model, ranks, per_rank)
    mine = {number for stage in stages[rank::ranks] for number in stage}
    for number in set(range(model.config.num_hidden_layers)) - mine:
        delattr(model.layers, str(number))


class StageTask(NamedTuple):
    """One stage's part of one pack."""

    forward: bool
    pack: int
    stage: int


Tick = tuple[StageTask | None, ...]
"""What each rank computes at one time."""


@cache
def schedule(ranks: int, per_rank: int, packs: int, *, backward: bool = True) -> tuple[Tick, ...]:
    """The ticks of a step."""
    queues = [deque(_order(rank, ranks, per_rank, packs, backward=backward)) for rank in range(ranks)]
    done: set[StageTask | None] = {None}
    ticks = []
    while any(queues):
        ready = [bool(queue) and _needs(queue[0], ranks * per_rank) in done for queue in queues]
        tick = tuple(queue.popleft() if able else None for queue, able in zip(queues, ready, strict=True))
        assert any(tick), "the ranks wait for each other"
        done.update(tick)
        ticks.append(tick)
    return tuple(ticks)


def _needs(task: StageTask, stages: int) -> StageTask | None:
    """The task of another stage, or of the same, whose result a task needs."""
    if task.forward:
        return task._replace(stage=task.stage - 1) if task.stage else None
    last = task.stage == stages - 1
    return task._replace(forward=True) if last else task._replace(stage=task.stage + 1)


def _order(rank: int, ranks: int, per_rank: int, packs: int, *, backward: bool) -> list[StageTask]:
    """The tasks of one rank: some forward, then one forward and one backward in turn, then the rest backward."""
    # In a turn, a rank computes some packs with each of its stages: as many as there are ranks, or a few more.
    turns = max(1, packs // ranks)
    ends = [packs * (turn + 1) // turns for turn in range(turns)]
    groups = [range(first, end) for first, end in pairwise([0, *ends])]
    mine = range(rank, ranks * per_rank, ranks)
    forward = [StageTask(True, pack, stage) for group in groups for stage in mine for pack in group]
    if not backward:
        return forward
    back = [StageTask(False, pack, stage) for group in groups for stage in reversed(mine) for pack in group]
    distance = ranks - 1 - rank
    ahead = distance if per_rank == 1 else 2 * distance + (per_rank - 1) * max(map(len, groups))
    order = forward[:ahead]
    for number, task in enumerate(back):
        order += [*forward[ahead + number : ahead + number + 1], task]
    return order


class Pipeline:
    """The stages of this process, and their part of a step.

    Args:
        model: what ``cut`` left, with all later transforms applied; it may get its weights later.
        mesh: the ranks of the pipeline, of one dimension.
        per_rank: stages of each rank.
        tensor: ranks that divide the rows of hidden states.
        dtype: the type of hidden states between layers.
        arrive: told, by the group's name, when this rank comes to exchange what a tick computed.
    """

    def __init__(
        self,
        model: Encoder,
        mesh: DeviceMesh,
        *,
        per_rank: int = 1,
        tensor: int = 1,
        dtype: torch.dtype = torch.float32,
        arrive: Callable[[str], None] = lambda group: None,
    ) -> None:
        self.model, self.group, self.rank, self.ranks = model, mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.per_rank, self.tensor, self.dtype, self.arrive = per_rank, tensor, dtype, arrive
        self.stages = stages_of(model, self.ranks, per_rank)
        # NCCL wants all ranks of a group in its first operation.
        dist.all_reduce(torch.zeros(1, device=mesh.device_type), group=self.group)

    def run(
        self,
        packs: Sequence[TrainingBatch],
        loss: Callable[[Tensor, TrainingBatch], Tensor],
        *,
        seeds: Sequence[int] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        before_backward: Callable[[bool], None] = lambda last: None,
    ) -> Tensor:
        """Compute the packs, and their gradients if gradients are on. Returns the sum of their losses, else 0.

        All ranks give the same packs. The rank of the last stage computes the losses, from the last hidden states of
        the masked tokens and the pack on its device, and knows their sum.

        Args:
            packs: all packs of a step of this data rank.
            loss: the share of the step's loss; called within ``autocast``.
            seeds: of the random numbers of each pack.
            autocast: a context for forward passes.
            before_backward: told, before each backward pass, whether it is the last of its layers in this step.
        """
        step = _Step(self, packs, loss, seeds, autocast, before_backward)
        for tick in schedule(self.ranks, self.per_rank, len(packs), backward=torch.is_grad_enabled()):
            task = tick[self.rank]
            result = None if task is None else step.compute(task)
            self.arrive(self.group.group_name)
            step.exchange(tick, result)
        return step.total


class _Step:
    """The tensors of a step that are in use."""

    def __init__(
        self,
        pipeline: Pipeline,
        packs: Sequence[TrainingBatch],
        loss: Callable[[Tensor, TrainingBatch], Tensor],
        seeds: Sequence[int] | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        before_backward: Callable[[bool], None],
    ) -> None:
        self._pipeline, self._packs, self._loss, self._seeds = pipeline, packs, loss, seeds
        self._autocast, self._before_backward = autocast, before_backward
        self._last, self._device = len(pipeline.stages) - 1, pipeline.model.device
        self._received: dict[StageTask, Tensor] = {}  # inputs of tasks to come
        self._states: dict[StageTask, Tensor] = {}  # of the generator, before forward tasks to come
        self._kept: dict[StageTask, tuple[Tensor | None, Tensor]] = {}  # input and output, until the backward task
        self.total = torch.zeros((), device=self._device)

    def compute(self, task: StageTask) -> Tensor | None:
        """What the next task needs: hidden states, or their gradient; ``None`` after the last."""
        return self._forward(task) if task.forward else self._backward(task)

    def _forward(self, task: StageTask) -> Tensor | None:
        model, backward = self._pipeline.model, torch.is_grad_enabled()
        x = self._received.pop(task, None)
        if x is not None:
            x.requires_grad_(backward)
        if self._seeds is not None:
            if task.stage == 0:
                torch.manual_seed(self._seeds[task.pack])
            else:
                _set_random_state(self._states.pop(task), self._device)
        pack = self._packs[task.pack].to(self._device, non_blocking=True)
        with self._autocast():
            y: Tensor = model(pack.inputs, layers=self._pipeline.stages[task.stage], x=x, rows=pack.wanted)
            if task.stage == self._last:
                y = self._loss(y, pack)
        if backward:
            self._kept[task._replace(forward=False)] = x, y
        if task.stage < self._last:
            return y.detach()
        self.total += y.detach()
        return None

    def _backward(self, task: StageTask) -> Tensor | None:
        x, y = self._kept.pop(task)
        self._before_backward(task.pack == len(self._packs) - 1)
        torch.autograd.backward(y, self._received.pop(task, None))
        return None if x is None else x.grad

    def exchange(self, tick: Tick, result: Tensor | None) -> None:
        """Send the result of this rank's task, and receive what others computed for this rank in the same tick."""
        group, ranks = self._pipeline.group, self._pipeline.ranks
        rows: list[dist.P2POp] = []
        states: list[dist.P2POp] = []
        for rank, task in enumerate(tick):
            if task is None:
                continue
            follower = task._replace(stage=task.stage + (1 if task.forward else -1))
            receiver = follower.stage % ranks
            if not 0 <= follower.stage <= self._last or self._pipeline.rank not in (rank, receiver):
                continue
            sends = rank == self._pipeline.rank
            peer = dist.get_global_rank(group, receiver if sends else rank)
            operation = dist.isend if sends else dist.irecv
            if sends:
                assert result is not None
                tensor = result.contiguous()
            else:
                tensor = self._received[follower] = self._blank(task.pack)
            rows.append(dist.P2POp(operation, tensor, peer, group))
            if task.forward and self._seeds is not None:
                state = _random_state(self._device)
                if not sends:
                    self._states[follower] = state
                states.append(dist.P2POp(operation, state, peer, group))
        for batch in (states, rows):
            for work in dist.batch_isend_irecv(batch) if batch else ():
                work.wait()

    def _blank(self, pack: int) -> Tensor:
        """``[T, D]``, or the rows of one of the ranks that divide a layer."""
        pipeline = self._pipeline
        rows = len(self._packs[pack].inputs.input_ids) // pipeline.tensor
        return torch.empty(rows, pipeline.model.config.hidden_size, dtype=pipeline.dtype, device=self._device)


def _random_state(device: torch.device) -> Tensor:
    """The state of a device's random numbers, in main memory."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
