"""Batches for training: drawn, cropped, packed, masked, ready before they are asked for.

The places of an epoch are cut into blocks. Within a block, sequences are dealt in order into packs of at most a fixed
number of tokens, each into the first of a few open packs that has room, and never split; when none has, the fullest is
closed. What a block's packs hold depends on the seed, the epoch and these numbers alone. All packs of all blocks are
one endless row; of every ``world`` neighbours each rank takes its own. A position in that row is three numbers, from
which any run, of any number of ranks, goes on exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.data.draws import MASK, fold
from protea.data.masking import Masker, Masking, masking_named
from protea.data.sampler import Draws, Sampler
from protea.errors import UsageError
from protea.packing import CuSeqlens, PackedBatch

BLOCK: Final = 1 << 15
"""Places of an epoch packed together: some ten million tokens."""


class Position(NamedTuple):
    """A place in the row of packs; JSON can hold it, and ``Position(*found)`` has it back.

    Attributes:
        epoch: from 0.
        block: of the epoch.
        pack: of the block.
    """

    epoch: int = 0
    block: int = 0
    pack: int = 0


@dataclass(frozen=True)
class TrainingBatch:
    """A masked pack.

    Attributes:
        inputs: what the model sees.
        targets: ``[T]`` int64, the tokens as they were before masking.
        rows: ``[M]`` int64, ascending: the tokens that the model is to predict.
        index: ``[B]`` int64, the places of the epoch that these sequences are, in host memory.
        position: where to go on after this batch.
        epoch: whose places they are.
    """

    inputs: PackedBatch
    targets: Tensor
    rows: Tensor
    index: NDArray[np.int64]
    position: Position
    epoch: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TrainingBatch:
        """The same batch on another device."""
        return TrainingBatch(
            self.inputs.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.rows.to(device, non_blocking=non_blocking),
            self.index,
            self.position,
            self.epoch,
        )

    def pin_memory(self) -> TrainingBatch:
        """The same batch in page-locked memory, from which copies to an accelerator run beside its work."""
        return TrainingBatch(
            self.inputs.pin_memory(),
            self.targets.pin_memory(),
            self.rows.pin_memory(),
            self.index,
            self.position,
            self.epoch,
        )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How packs are filled.

    Attributes:
        tokens: a pack holds at most.
        window: packs open at a time.
        block: places packed together.
    """

    tokens: int = 16384
    window: int = 8
    block: int = BLOCK

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "block"):
            if getattr(self, name) < 1:
                raise UsageError(f"packing: {name} must be at least 1, got {getattr(self, name)}")


def first_fit(sizes: list[int], packing: Packing) -> list[list[int]]:
    """Numbers of items, dealt in order into packs; at most ``window`` of them are open at a time.

    Raises:
        ValueError: an item is larger than a pack.
    """
    done: list[list[int]] = []
    packs: list[list[int]] = []
    room: list[int] = []
    for number, size in enumerate(sizes):
        for place, free in enumerate(room):
            if size <= free:
                packs[place].append(number)
                room[place] = free - size
                break
        else:
            if size > packing.tokens:
                raise ValueError(f"item {number} has {size} tokens, a pack {packing.tokens}")
            if len(packs) == packing.window:
                fullest = room.index(min(room))
                done.append(packs.pop(fullest))
                room.pop(fullest)
            packs.append([number])
            room.append(packing.tokens - size)
    return done + packs


class Loader:
    """Masked packs of a split, in an order that can be entered anywhere.

    Args:
        sampler: says what each place of an epoch shows.
        masking: a variant's name, or a ``Masking``.
        packing: how packs are filled.
        rank: of this process.
        world: how many processes share the packs.
        workers: threads that make batches; 0 makes them when they are asked for.
        ahead: batches made in advance, at most.
        pin: put batches in page-locked memory; by default where there is CUDA.

    Raises:
        UsageError: a value cannot be meant.

    Attributes:
        packs: how many packs were planned so far, of all ranks.
        packed: how many tokens they hold; see ``padding``.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        masking: str | Masking = "standard",
        packing: Packing | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        ahead: int = 4,
        pin: bool | None = None,
    ) -> None:
        self.sampler, self.packing = sampler, packing or Packing()
        if not 0 <= rank < world:
            raise UsageError(f"rank must be from 0 to world-1, got rank {rank} of {world}")
        if workers < 0 or ahead < 1:
            raise UsageError(f"workers must be at least 0 and ahead at least 1, got {workers} and {ahead}")
        if sampler.max_tokens > self.packing.tokens:
            raise UsageError(
                f"a pack of {self.packing.tokens} tokens cannot hold a sequence of {sampler.max_tokens}; raise tokens "
                "or lower max_tokens"
            )
        self._rank, self._world, self._workers, self._ahead = rank, world, workers, ahead
        self._pin = torch.cuda.is_available() if pin is None else pin
        alphabet = sampler.split.alphabet
        self._frame = alphabet.frame
        self._masker = Masker(masking_named(masking) if isinstance(masking, str) else masking, alphabet)
        self.packs = self.packed = 0

    @property
    def padding(self) -> float:
        """The share of the packs' room that stayed empty so far."""
        return 1 - self.packed / (self.packs * self.packing.tokens) if self.packs else 0.0

    @property
    def blocks(self) -> int:
        """Blocks of an epoch."""
        return -(-len(self.sampler) // self.packing.block)

    def plan(self, epoch: int, block: int) -> list[Draws]:
        """The packs of a block: what each holds.

        Raises:
            IndexError: the epoch has no such block.
        """
        if not 0 <= block < self.blocks:
            raise IndexError(f"an epoch has {self.blocks} blocks, not {block + 1}")
        start = block * self.packing.block
        places = np.arange(start, min(start + self.packing.block, len(self.sampler)))
        draws = self.sampler.draw(epoch, places)
        return [draws[np.array(numbers)] for numbers in first_fit(draws.tokens.tolist(), self.packing)]

    def batches(self, start: Position | None = None, *, epochs: int | None = None) -> Generator[TrainingBatch]:
        """This rank's batches from a position on.

        Args:
            start: the ``position`` of the batch after which to go on; the beginning by default.
            epochs: stop before this epoch; without, there is no end. If the packs before it are no multiple of
                ``world``, the last ranks get one batch less.
        """
        plans = self._plans(start or Position(), epochs)
        if not self._workers:
            for pack, epoch, position in plans:
                yield self.batch(epoch, pack, position)
            return
        waiting: deque[Future[TrainingBatch]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="batches")
        planner = ThreadPoolExecutor(1, thread_name_prefix="plans")
        try:
            # One block is planned beside the work on the one before.
            following: Future[tuple[Draws, int, Position] | None] = planner.submit(next, plans, None)
            while True:
                while len(waiting) < self._ahead:
                    planned = following.result()
                    if planned is None:
                        break
                    pack, epoch, position = planned
                    waiting.append(pool.submit(self.batch, epoch, pack, position))
                    following = planner.submit(next, plans, None)
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for each in (planner, pool):
                each.shutdown(wait=True, cancel_futures=True)

    def batch(self, epoch: int, draws: Draws, position: Position) -> TrainingBatch:
        """One pack, gathered and masked."""
        lengths = draws.tokens
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        total = int(starts[-1])
        # The place in the store of every token; those of the frame are some other token's, and overwritten.
        shift = draws.start - starts[:-1] - draws.bos
        places = np.arange(total) + np.repeat(shift, lengths)
        split = self.sampler.split
        tokens = split.tokens.take(places, mode="clip")
        for special, ends in ((self._frame.bos, starts[:-1][draws.bos]), (self._frame.eos, starts[1:][draws.eos] - 1)):
            if special is not None:
                tokens[ends] = special
        keys = fold(self.sampler.seed, epoch, MASK, draws.index.astype(np.uint64))
        masked, hidden = self._masker(tokens, keys, starts)
        host = torch.from_numpy(starts.astype(np.int32))
        boundaries = CuSeqlens(host, host, int(lengths.max()))
        # NumPy converts: PyTorch would wake its threads for it, which then spin while they wait for one another.
        result = TrainingBatch(
            PackedBatch(torch.from_numpy(masked.astype(np.int64)), boundaries),
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(np.flatnonzero(hidden)),
            draws.index,
            position,
            epoch,
        )
        return result.pin_memory() if self._pin else result

    def _plans(self, start: Position, epochs: int | None) -> Iterator[tuple[Draws, int, Position]]:
        """This rank's packs, with their epoch and the position after the group of all ranks."""
        row = self._row(start, epochs)
        while True:
            mine: tuple[Draws, int] | None = None
            after = start
            for number in range(self._world):
                found = next(row, None)
                if found is None:
                    break
                pack, epoch, after = found
                if number == self._rank:
                    mine = pack, epoch
            if mine is None:
                return
            yield *mine, after

    def _row(self, start: Position, epochs: int | None) -> Iterator[tuple[Draws, int, Position]]:
        """All packs from a position on, each with its epoch and the position after it."""
        epoch, block, first = start
        while epochs is None or epoch < epochs:
            packs = self.plan(epoch, block)
            for number in range(first, len(packs)):
                self.packs += 1
                self.packed += int(packs[number].tokens.sum())
                last = number + 1 == len(packs)
                after = Position(epoch, block, number + 1) if not last else self._next(epoch, block)
                yield packs[number], epoch, after
            epoch, block, first = self._next(epoch, block)

    def _next(self, epoch: int, block: int) -> Position:
        return Position(epoch, block + 1) if block + 1 < self.blocks else Position(epoch + 1)
