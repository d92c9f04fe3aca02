"""Batches for training: drawn, cropped, packed, masked, and made before they are asked for.

An epoch is cut into blocks of places. Within a block, sequences go in order into packs of at most a fixed number of
tokens, each into the first of a few open packs that has room; a sequence is never split. A block's packs depend on the
seed, the epoch and these numbers only. All packs of all blocks form one endless row, of which each rank takes one pack
in every ``world``. A position in that row is three numbers, from which a run with any number of ranks can continue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.data.draws import MASK, fold
from protea.data.masking import Masker, Masking, masking_named
from protea.data.sampler import Draws, Sampler
from protea.errors import UsageError
from protea.packing import CuSeqlens, PackedBatch, PackedRows

BLOCK: Final = 1 << 15
"""Places of an epoch that are packed together: about ten million tokens."""


class Position(NamedTuple):
    """A place in the row of packs: an epoch, a block in it and a pack in the block, all from 0. JSON can hold it."""

    epoch: int = 0
    block: int = 0
    pack: int = 0


@dataclass(frozen=True)
class TrainingBatch:
    """A masked pack.

    Attributes:
        inputs: the tokens after masking.
        targets: ``[T]`` int64, the tokens before masking.
        wanted: the tokens that the model is to predict.
        index: ``[B]`` int64, the places of these sequences in the epoch; in host memory.
        position: where to continue after this batch.
        epoch: the epoch of these places.
        filling: tokens of padding at the end, which belong to no sequence of the data.
    """

    inputs: PackedBatch
    targets: Tensor
    wanted: PackedRows
    index: NDArray[np.int64]
    position: Position
    epoch: int
    filling: int = 0

    @property
    def rows(self) -> Tensor:
        """``[M]`` int64, ascending: the tokens that the model is to predict."""
        return self.wanted.index

    @property
    def tokens(self) -> int:
        """Tokens of sequences."""
        return self.inputs.input_ids.numel() - self.filling

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int64 in host memory: tokens of each sequence."""
        return self.inputs.cu_seqlens.host_offsets.diff().long()[: len(self.index)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TrainingBatch:
        """The same batch on another device."""
        inputs = self.inputs.to(device, non_blocking=non_blocking)
        targets = self.targets.to(device, non_blocking=non_blocking)
        return replace(self, inputs=inputs, targets=targets, wanted=self.wanted.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TrainingBatch:
        """The same batch in page-locked memory, which an accelerator can copy from while it computes."""
        return replace(
            self, inputs=self.inputs.pin_memory(), targets=self.targets.pin_memory(), wanted=self.wanted.pin_memory()
        )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How packs are filled: most tokens of a pack, number of open packs, number of places in a block."""

    tokens: int = 16384
    window: int = 8
    block: int = BLOCK

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "block"):
            if getattr(self, name) < 1:
                raise UsageError(f"packing: {name} must be at least 1, got {getattr(self, name)}")


def first_fit(sizes: list[int], packing: Packing) -> list[list[int]]:
    """Put numbered items, in order, into packs, of which at most ``window`` are open. The fullest is closed first."""
    done: list[list[int]] = []
    packs: list[list[int]] = []
    room: list[int] = []
    for number, size in enumerate(sizes):
        place = next((place for place, free in enumerate(room) if size <= free), None)
        if place is None:
            if len(packs) == packing.window:
                fullest = room.index(min(room))
                done.append(packs.pop(fullest))
                room.pop(fullest)
            place = len(packs)
            packs.append([])
            room.append(packing.tokens)
        packs[place].append(number)
        room[place] -= size
    return done + packs


def _cut(start: int, end: int, most: int) -> NDArray[np.int64]:
    """The ends of pieces of at most so many tokens."""
    return np.minimum(np.arange(start, end, most) + most, end)


class Loader:
    """Masked packs of a split.

    Args:
        sampler: draws what each place of an epoch shows.
        masking: the name of a variant, or a ``Masking``.
        packing: how packs are filled.
        rank: the number of this process.
        world: the number of processes that share the packs.
        workers: threads that make batches; with 0, they are made when they are asked for.
        ahead: the most batches made in advance.
        pin: whether batches are in page-locked memory; by default if there is CUDA.
        fill: whether packs are filled to the most tokens with padding, in sequences of their own.

    Attributes:
        packs: packs planned so far, of all ranks.
        packed: tokens in them.
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
        fill: bool = False,
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
        self._fill = fill
        alphabet = sampler.split.alphabet
        self._masker = Masker(masking_named(masking) if isinstance(masking, str) else masking, alphabet)
        self.packs = self.packed = 0

    @property
    def padding(self) -> float:
        """The share of the packs planned so far that is empty."""
        return 1 - self.packed / (self.packs * self.packing.tokens) if self.packs else 0.0

    @property
    def blocks(self) -> int:
        """The number of blocks in an epoch."""
        return -(-len(self.sampler) // self.packing.block)

    def plan(self, epoch: int, block: int) -> list[Draws]:
        """The draws in each pack of a block."""
        if not 0 <= block < self.blocks:
            raise IndexError(f"an epoch has {self.blocks} blocks, not {block + 1}")
        start = block * self.packing.block
        places = np.arange(start, min(start + self.packing.block, len(self.sampler)))
        draws = self.sampler.draw(epoch, places)
        return [draws[np.array(numbers)] for numbers in first_fit(draws.tokens.tolist(), self.packing)]

    def batches(self, start: Position | None = None, *, epochs: int | None = None) -> Generator[TrainingBatch]:
        """This rank's batches from a position on.

        Args:
            start: the ``position`` of the last batch done; by default the first position.
            epochs: number of epochs; without it, there is no end. If ``world`` does not divide the number of packs, the
                last ranks get one batch less.
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
            # The next block is planned while the batches of this one are made.
            planned: Future[tuple[Draws, int, Position] | None] = planner.submit(next, plans, None)
            while plan := planned.result():
                pack, epoch, position = plan
                waiting.append(pool.submit(self.batch, epoch, pack, position))
                planned = planner.submit(next, plans, None)
                if len(waiting) == self._ahead:
                    yield waiting.popleft().result()
            for batch in waiting:
                yield batch.result()
        finally:
            for executor in (planner, pool):
                executor.shutdown(wait=True, cancel_futures=True)

    def batch(self, epoch: int, draws: Draws, position: Position) -> TrainingBatch:
        """Gather and mask one pack."""
        lengths = draws.tokens
        starts = np.concatenate([[0], np.cumsum(lengths)])
        # Where each token is in the store. BOS and EOS get a neighbouring token, which is then overwritten.
        places = np.arange(starts[-1]) + np.repeat(draws.start - starts[:-1] - draws.bos, lengths)
        tokens = self.sampler.split.tokens.take(places, mode="clip")
        frame = self.sampler.split.alphabet.frame
        for special, ends in ((frame.bos, starts[:-1][draws.bos]), (frame.eos, starts[1:][draws.eos] - 1)):
            if special is not None:
                tokens[ends] = special
        keys = fold(self.sampler.seed, epoch, MASK, draws.index.astype(np.uint64))
        masked, hidden = self._masker(tokens, keys, starts)
        filling = self.packing.tokens - len(tokens) if self._fill else 0
        if filling:
            pad = self.sampler.split.alphabet.pad
            masked, tokens = (np.pad(each, (0, filling), constant_values=pad) for each in (masked, tokens))
            starts = np.append(starts, _cut(starts[-1], len(tokens), self.sampler.max_tokens))
        boundaries = CuSeqlens.from_offsets(starts)
        # Converted with NumPy: PyTorch would use its threads, which then spin while they wait for each other.
        result = TrainingBatch(
            PackedBatch(torch.from_numpy(masked.astype(np.int64)), boundaries),
            torch.from_numpy(tokens.astype(np.int64)),
            PackedRows.of(np.flatnonzero(hidden), boundaries),
            draws.index,
            position,
            epoch,
            filling,
        )
        return result.pin_memory() if self._pin else result

    def _plans(self, start: Position, epochs: int | None) -> Iterator[tuple[Draws, int, Position]]:
        """This rank's packs, each with its epoch and the position after the packs of all ranks."""
        row = self._row(start, epochs)
        while group := list(islice(row, self._world)):
            if len(group) <= self._rank:
                return
            pack, epoch, _ = group[self._rank]
            yield pack, epoch, group[-1][2]

    def _row(self, start: Position, epochs: int | None) -> Iterator[tuple[Draws, int, Position]]:
        """All packs from a position on, each with its epoch and the position after it."""
        epoch, block, first = start
        while epochs is None or epoch < epochs:
            packs = self.plan(epoch, block)
            following = Position(epoch, block + 1) if block + 1 < self.blocks else Position(epoch + 1)
            for number, pack in enumerate(packs[first:], first + 1):
                self.packs += 1
                self.packed += int(pack.tokens.sum())
                yield pack, epoch, Position(epoch, block, number) if number < len(packs) else following
            epoch, block, first = following
