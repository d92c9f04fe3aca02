"""The processes of one training run, and what they tell each other.

A ``World`` of one process, which every run without ``torchrun`` has, does nothing: no process group, no communication.
``Ranks`` is a world of many. Numbers and small objects go through main memory (Gloo), tensors through their device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from protea.errors import TrainingError

Value = TypeVar("Value")
Gather = Callable[[Any], list[Any]]
"""Tells all processes a value of each; returns the values by rank."""

SECONDS: Final = 1800.0
"""How long a process waits for the others."""

_PAUSE: Final = 0.2
_DAY: Final = timedelta(days=1)


class World:
    """One process.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def at(self, place: str) -> None:
        """Tell what this process does now, as in ``step 12``; messages name it if the process stops."""

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor, on any device, by its sum over all processes; returns it. The bits are equal on all."""
        return tensor

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number over all processes."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return flag

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes by rank, on every process."""
        return [value]

    def broadcast(self, value: Value) -> Value:
        """The value of the first process, on every process."""
        return value

    def first(self, work: Callable[[], Value]) -> Value:
        """Do something on the first process alone, however long it takes; all return its result."""
        return work()

    def gather_apart(self) -> Gather:
        """A ``gather`` for a thread, which waits as long as all processes live, whatever they do meanwhile."""
        return self.gather

    def close(self) -> None:
        """Leave, when all processes are done."""


class Ranks(World):
    """Many processes, each of which is one rank of PyTorch's default process group."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, seconds: float) -> None:
        self.rank, self.size, self.seconds = rank, size, seconds
        self._store = PrefixStore("protea", store)
        self._works = 0
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("groups", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=seconds),
            device_id=device if device.type == "cuda" else None,
        )

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.total(0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor, on any device, by its sum over all processes; returns it. The bits are equal on all."""
        dist.all_reduce(tensor)
        return tensor

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number over all processes."""
        return [int(number) for number in self.sum(torch.tensor(numbers, dtype=torch.int64)).tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return self.total(flag)[0] > 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes by rank, on every process."""
        values: list[Value | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast(self, value: Value) -> Value:
        """The value of the first process, on every process."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def first(self, work: Callable[[], Value]) -> Value:
        """Do something on the first process alone, however long it takes; all return its result."""
        self._works += 1
        key = f"work {self._works}"
        if not self.is_first:
            while not self._store.check([key]):
                time.sleep(_PAUSE)
            return self.broadcast(None)  # type: ignore[return-value]
        result = work()
        self._store.set(key, "done")
        return self.broadcast(result)

    def gather_apart(self) -> Gather:
        """A ``gather`` for a thread, which waits as long as all processes live, whatever they do meanwhile."""
        group = dist.new_group(backend="gloo", timeout=_DAY)

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value, group=group)
            return values

        return gather

    def close(self) -> None:
        """Leave, when all processes are done."""
        self.barrier()
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless the tensor is divided among processes."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def join(device: torch.device, seconds: float = SECONDS) -> World:
    """The world that ``torchrun`` or a scheduler describes in the environment; without that, one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise TrainingError(f"WORLD_SIZE is set, but {', '.join(missing)} is not: start the processes with torchrun")
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    return Ranks(store, rank, size, device, seconds)
