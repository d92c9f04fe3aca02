"""The processes of one training run, and what they tell each other.

A ``World`` of one process, which every run without ``torchrun`` has, does nothing: no process group, no communication.
``Ranks`` is a world of many. Numbers and small objects go through main memory (Gloo), tensors through their device.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar
from uuid import uuid4

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from protea.errors import TrainingError, UsageError
from protea.journal import differences
from protea.train.failures import Watch

Value = TypeVar("Value")
Gather = Callable[[Any], list[Any]]
"""Tells all processes a value of each; returns the values by rank."""

_SIZE: Final = "WORLD_SIZE"
_NEEDED: Final = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_PAUSE: Final = 0.2
_START_SECONDS: Final = 600.0
_LONGER: Final = 60.0
"""Seconds that PyTorch waits longer than the watch, whose message says more."""
_DAY: Final = timedelta(days=1)


class World:
    """One process.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    rank = 0
    size = 1
    neighbours = 1
    """The number of processes on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whatever raises inside ends all processes, with one message and one exit code."""
        yield

    def connect(self, device: torch.device, seconds: float) -> torch.device:
        """Prepare to compute; returns the device of this process, as in ``cuda:3`` for ``cuda``.

        From now on, a process may take so many seconds for a pack, and for what the others wait for.
        """
        return device

    def at(self, place: str) -> None:
        """Tell what this process does now, as in ``step 12``; messages name it if the process stops.

        It makes progress, even if it does the same as before (an empty string).
        """

    def arrive(self, group: str) -> None:
        """Tell that this process comes to where those of a group wait for one another; a message may name who lacks."""

    def follow(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """The same of groups whose processes do all operations together; PyTorch counts these."""

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

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Allow any time for what happens inside."""
        yield

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise ``TrainingError`` if the values of this process are not those of the first."""


class Ranks(World):
    """Many processes, each of which is one rank of PyTorch's default process group."""

    def __init__(self, store: Store, rank: int, size: int, seconds: float) -> None:
        self.rank, self.size = rank, size
        self.neighbours = _number("LOCAL_WORLD_SIZE", 1, default=1)
        self._works = 0
        store = PrefixStore(_meet(store, rank, size, seconds), store)
        self._store, self._groups = PrefixStore("protea", store), PrefixStore("groups", store)
        self._watch = Watch(self._store, rank, size, seconds)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whatever raises inside ends all processes, with one message and one exit code."""
        try:
            yield
            self.barrier()
        except BaseException as error:
            self._watch.end(error)
        self._watch.stop()
        dist.destroy_process_group()

    def connect(self, device: torch.device, seconds: float) -> torch.device:
        """Prepare to compute; returns the device of this process, as in ``cuda:3`` for ``cuda``.

        From now on, a process may take so many seconds for a pack, and for what the others wait for.
        """
        self._watch.seconds = seconds
        on_gpu = device.type == "cuda"
        if on_gpu:
            if device.index is not None:
                raise UsageError(f"run.device={device} is one GPU for {self.size} processes; set run.device=cuda")
            device = torch.device("cuda", _number("LOCAL_RANK", default=self.rank % torch.cuda.device_count()))
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=self._groups,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=seconds + _LONGER),
            device_id=device if on_gpu else None,
        )
        return device

    def at(self, place: str) -> None:
        """Tell what this process does now, as in ``step 12``; messages name it if the process stops."""
        self._watch.visit(place)

    def arrive(self, group: str) -> None:
        """Tell that this process comes to where those of a group wait for one another; a message may name who lacks."""
        self._watch.arrive(group)

    def follow(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """The same of groups whose processes do all operations together; PyTorch counts these."""
        self._watch.follow(groups)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.total(0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor, on any device, by its sum over all processes; returns it. The bits are equal on all."""
        self._watch.arrive()
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
        self._watch.arrive()
        values: list[Value | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast(self, value: Value) -> Value:
        """The value of the first process, on every process."""
        self._watch.arrive()
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def first(self, work: Callable[[], Value]) -> Value:
        """Do something on the first process alone, however long it takes; all return its result."""
        self._works += 1
        key, result = f"work {self._works}", None
        with self.patience():
            if self.is_first:
                result = work()
                self._store.set(key, "done")
            while not self._store.check([key]):
                time.sleep(_PAUSE)
        return self.broadcast(result)  # type: ignore[return-value]

    def gather_apart(self) -> Gather:
        """A ``gather`` for a thread, which waits as long as all processes live, whatever they do meanwhile."""
        group = dist.new_group(backend="gloo", timeout=_DAY)

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value, group=group)
            return values

        return gather

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Allow any time for what happens inside."""
        with self._watch.patience():
            yield

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise ``TrainingError`` if the values of this process are not those of the first."""
        ours, *others = self.gather(dict(values))
        for rank, theirs in enumerate(others, 1):
            if theirs != ours:
                raise TrainingError(
                    f"rank {rank} has {what} that rank 0 does not have: {differences(ours, theirs)}; give all "
                    "processes the same command, data and versions"
                )


def _meet(store: Store, rank: int, size: int, seconds: float) -> str:
    """Wait until all processes are there; returns a name of this start, the same for all.

    ``torchrun`` keeps its store when it starts processes again: what it holds may be of processes that ended. A process
    takes the name that the first one gives, as soon as the first one knows of this process and not of an earlier one.
    """
    mine = uuid4().hex
    store.set(f"hello {rank}", mine)
    end, missing = time.monotonic() + seconds, [0]
    while time.monotonic() < end:
        if rank == 0:
            there = {str(each): store.get(key) for each in range(size) if store.check([key := f"hello {each}"])}
            store.set("start", json.dumps([mine, {each: name.decode() for each, name in there.items()}]))
            missing = [each for each in range(1, size) if not store.check([f"{mine} {each}"])]
            if not missing:
                return mine
        elif store.check(["start"]):
            name, known = json.loads(store.get("start"))
            if known.get(str(rank)) == mine:
                store.set(f"{name} {rank}", "there")
                return str(name)
        time.sleep(_PAUSE / 4)
    raise TrainingError(
        f"rank {', '.join(map(str, missing))} of {size} did not start within {seconds:g} seconds; start all processes"
    )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless the tensor is divided among processes."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def _number(name: str, least: int = 0, most: int | None = None, default: int | None = None) -> int:
    """A number in the environment."""
    value = os.environ.get(name) or str(default)
    if value.isdecimal() and least <= int(value) and (most is None or int(value) <= most):
        return int(value)
    limits = f"from {least}" + ("" if most is None else f" to {most}")
    raise TrainingError(
        f"{name} is {value!r} in the environment, and must be {limits}: start the processes with torchrun"
    )


def join(seconds: float = _START_SECONDS) -> World:
    """The world that ``torchrun`` or a scheduler describes in the environment; without that, one process.

    All processes must start within so many seconds.
    """
    size = _number(_SIZE, 1, default=1)
    if size == 1:
        return World()
    if missing := [name for name in _NEEDED if not os.environ.get(name)]:
        raise TrainingError(f"{_SIZE} is set, but {', '.join(missing)} is not: start the processes with torchrun")
    _number("RANK", most=size - 1)
    _number("MASTER_PORT", 1, 65535)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except (dist.DistError, RuntimeError) as error:
        raise TrainingError(
            f"the {os.environ[_SIZE]} processes of this run did not find each other at {os.environ['MASTER_ADDR']} "
            f"within {seconds:g} seconds: {' '.join(str(error).split())}"
        ) from error
    return Ranks(store, rank, size, seconds)
