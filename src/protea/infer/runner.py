"""One runner for whatever computes with a finished model: jobs in, results out, in order.

A job is one input, token by token, and what is wanted of it: hidden states, logits at some tokens, a look at attention.
Jobs are packed by a token budget and a pack is halved where an accelerator's memory does not suffice. What is wrong
with a job is in its result, and the jobs beside it go on. On an accelerator the next pack computes while the results
of the one before travel to main memory. Knows nothing of files, records or what results are for.

Shapes: T tokens of a job, P places asked for, D model width, V tokens of the alphabet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.errors import DeviceError, NonFiniteError, ProteaError, SequenceTooLongError
from protea.infer.transfer import copied
from protea.memory import return_freed_memory_at_times
from protea.models.attention_maps import HeadMaps
from protea.models.encoder import Encoder
from protea.packing import PackedBatch, pack, pack_by_budget

FloatArray = NDArray[np.float32]
Item = TypeVar("Item")
Tag = TypeVar("Tag")


def _as_it_is(x: Tensor) -> dict[str, Tensor]:
    return {"tokens": x}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a job wants to know.

    Attributes:
        layers: hidden states to keep: 0 is the embedding, the last comes after the final norm.
        reduce: makes of such a state, ``[T, D]`` float32 on the model's device, what is kept of it, by name; by default
            the state itself, as ``tokens``.
        places: ``[P]`` tokens whose logits are wanted.
        on_attention: receives a layer's number, from 1, and the job's maps in it, computed as it looks at them.
    """

    layers: tuple[int, ...] = ()
    reduce: Callable[[Tensor], dict[str, Tensor]] = _as_it_is
    places: NDArray[np.int64] | None = None
    on_attention: Callable[[int, HeadMaps], None] | None = None


@dataclass(frozen=True)
class Job(Generic[Tag]):
    """One input.

    Attributes:
        tokens: ``[T]`` ids as the model is to see them, special ones included where they are to be.
        wanted: what to compute.
        tag: anything of the caller's, which comes back with the result.
        name: what messages call it.
    """

    tokens: NDArray[np.uint8]
    wanted: Wanted
    tag: Tag
    name: str


@dataclass(frozen=True)
class Result(Generic[Tag]):
    """What became of a job.

    Attributes:
        job: which.
        states: in main memory, by layer and by the name that ``reduce`` gave.
        logits: ``[P, V]`` float32 in main memory, if places were asked for; V in the alphabet's order.
        error: why there is nothing, if so.
    """

    job: Job[Tag]
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    error: ProteaError | None = None

    def checked(self) -> Self:
        """The result, if there is one.

        Raises:
            SequenceTooLongError: the input has more tokens than the model has positions.
            DeviceError: it does not fit in the accelerator's memory, even by itself.
            NonFiniteError: the model gives infinities or NaN.
        """
        if self.error is not None:
            raise self.error
        return self

    @property
    def log_probabilities(self) -> FloatArray:
        """``[P, V]`` float32, natural logarithms; rows that pad a vocabulary take no part in the softmax."""
        logits = self.checked().logits
        assert logits is not None
        values: FloatArray = logits.log_softmax(-1).numpy()
        return values


class Runner:
    """Runs jobs on a model.

    Args:
        model: on the device to compute on.
        budget: tokens computed at a time; a single job of more is computed nonetheless.
        around: entered around every forward pass.
    """

    def __init__(
        self,
        model: Encoder,
        budget: int,
        around: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
    ) -> None:
        self.model, self.budget = model, budget
        self._around = around
        self._ahead = int(model.device.type == "cuda")

    def run(self, jobs: Iterable[Job[Tag]]) -> Iterator[Result[Tag]]:
        """Results in the order of the jobs, which are taken as they are needed."""
        for _, results in self.each((None, [job]) for job in jobs):
            yield from results

    def each(
        self,
        items: Iterable[tuple[Item, Iterable[Job[Tag]]]],
        *,
        apart: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Iterator[tuple[Item, list[Result[Tag]]]]:
        """The results of each item's jobs together, in order; items may have any number of jobs, or none.

        Args:
            items: each with its jobs, both taken as they are needed.
            apart: items share no packs.
            advance: told how many jobs more are done.
        """
        open_items: deque[_Open[Item, Tag]] = deque()

        def asked() -> Iterator[Iterator[_Owned[Item, Tag]]]:
            for item, jobs in items:
                open_items.append(_Open(item))
                yield open_items[-1].asked(jobs)

        def packs() -> Iterator[list[_Owned[Item, Tag]]]:
            for owned in asked() if apart else [chain.from_iterable(asked())]:
                yield from pack_by_budget(owned, lambda one: len(one.job.tokens), self.budget)

        for owned, results in self._computed(packs()):
            for one, result in zip(owned, results, strict=True):
                one.item.results.append(result)
            advance(len(results))
            while open_items and open_items[0].done:
                yield open_items[0].item, open_items.popleft().results
        for left in open_items:
            yield left.item, left.results

    def _computed(
        self, packs: Iterable[list[_Owned[Item, Tag]]]
    ) -> Iterator[tuple[list[_Owned[Item, Tag]], list[Result[Tag]]]]:
        """Packs with their results; an accelerator is kept a pack ahead."""
        launched: deque[tuple[list[_Owned[Item, Tag]], list[_Launched[Tag]]]] = deque()
        for owned in packs:
            launched.append((owned, self._launch([one.job for one in owned])))
            return_freed_memory_at_times()
            if len(launched) > self._ahead:
                first, parts = launched.popleft()
                yield first, [result for part in parts for result in part.collected()]
        for owned, parts in launched:
            yield owned, [result for part in parts for result in part.collected()]

    def _launch(self, jobs: list[Job[Tag]]) -> list[_Launched[Tag]]:
        """Begin some jobs as one pack, or as halves of it where memory does not suffice."""
        try:
            return [self._forward(jobs)]
        except torch.OutOfMemoryError:
            if len(jobs) == 1:
                return [_Launched(self.model.compute_dtype, [Result(jobs[0], error=_too_large(jobs[0]))])]
        # Outside the handler: the exception's frames would hold on to the tensors that did not fit.
        torch.cuda.empty_cache()
        half = len(jobs) // 2
        return self._launch(jobs[:half]) + self._launch(jobs[half:])

    def _forward(self, jobs: list[Job[Tag]]) -> _Launched[Tag]:
        model = self.model
        errors = [self._too_long(job) for job in jobs]
        able = [job for job, error in zip(jobs, errors, strict=True) if error is None]
        results = [Result(job, error=error) for job, error in zip(jobs, errors, strict=True)]
        if not able:
            return _Launched(model.compute_dtype, results)
        batch = self._batch(able)
        spans = batch.cu_seqlens.spans()
        layers = {layer for job in able for layer in job.wanted.layers}

        def keep(number: int, x: Tensor) -> None:
            if number not in layers:
                return
            x = x.float()
            for result, (start, end) in zip((one for one in results if one.error is None), spans, strict=True):
                if number in result.job.wanted.layers:
                    reduced = result.job.wanted.reduce(x[start:end])
                    result.states.update({(number, name): value for name, value in reduced.items()})

        def look(number: int, maps: Any) -> None:
            for sequence, job in enumerate(able):
                if job.wanted.on_attention is not None:
                    job.wanted.on_attention(number, maps[sequence])

        looked_at = any(job.wanted.on_attention is not None for job in able)
        with self._around():
            hidden = model(batch, on_hidden=keep if layers else None, on_attention=look if looked_at else None)
            logits = self._logits(hidden, able, spans)
            return _Launched(model.compute_dtype, results, logits).to_host()

    def _too_long(self, job: Job[Tag]) -> SequenceTooLongError | None:
        try:
            self.model.check_length(len(job.tokens))
        except SequenceTooLongError as error:
            return SequenceTooLongError(f"{job.name}: {error}")
        return None

    def _batch(self, jobs: Sequence[Job[Tag]]) -> PackedBatch:
        batch = pack([job.tokens for job in jobs])
        on_gpu = self.model.device.type == "cuda"
        return (batch.pin_memory() if on_gpu else batch).to(self.model.device, non_blocking=on_gpu)

    def _logits(self, hidden: Tensor, jobs: Sequence[Job[Tag]], spans: Sequence[tuple[int, int]]) -> Tensor | None:
        """``[P, V]`` at the places that all jobs of a pack ask for, one after another."""
        places = [
            job.wanted.places + start
            for job, (start, _) in zip(jobs, spans, strict=True)
            if job.wanted.places is not None
        ]
        if not places:
            return None
        rows = torch.from_numpy(np.concatenate(places)).to(hidden.device)
        return self.model.head(hidden.index_select(0, rows))[:, : len(self.model.alphabet)].float()


@dataclass
class _Open(Generic[Item, Tag]):
    """An item whose jobs are under way."""

    item: Item
    results: list[Result[Tag]] = field(default_factory=list)
    count: int = 0
    complete: bool = False

    def asked(self, jobs: Iterable[Job[Tag]]) -> Iterator[_Owned[Item, Tag]]:
        """The jobs with their owner, counted as they are taken."""
        for job in jobs:
            self.count += 1
            yield _Owned(self, job)
        self.complete = True

    @property
    def done(self) -> bool:
        """Whether all of its jobs have results."""
        return self.complete and len(self.results) == self.count


class _Owned(NamedTuple, Generic[Item, Tag]):
    item: _Open[Item, Tag]
    job: Job[Tag]


class _Launched(NamedTuple, Generic[Tag]):
    """A pack that computes, or is computed.

    Attributes:
        dtype: that the model computes in.
        results: their states on the way to main memory.
        logits: of all jobs that asked for some, one after another; on the way, too.
        arrived: waits until all is there.
    """

    dtype: torch.dtype
    results: list[Result[Tag]]
    logits: Tensor | None = None
    arrived: Callable[[], None] = lambda: None

    def to_host(self) -> _Launched[Tag]:
        """Begin the copy to main memory; on an accelerator it runs beside the next pack's computation."""
        places = [(result, key) for result in self.results for key in result.states]
        values = [result.states[key] for result, key in places]
        values += [] if self.logits is None else [self.logits]
        if not values:
            return self
        on_gpu = values[0].device.type == "cuda"
        hosts, arrived = copied(values) if on_gpu else ([value.cpu() for value in values], self.arrived)
        for (result, key), host in zip(places, hosts, strict=False):
            result.states[key] = host
        return self._replace(logits=None if self.logits is None else hosts[-1], arrived=arrived)

    def collected(self) -> Iterator[Result[Tag]]:
        self.arrived()
        first = 0
        for result in self.results:
            places = result.job.wanted.places
            logits = None
            if result.error is None and places is not None:
                assert self.logits is not None
                logits = self.logits[first : first + len(places)]
                first += len(places)
            yield self._finite(result, logits)

    def _finite(self, result: Result[Tag], logits: Tensor | None) -> Result[Tag]:
        for value in (*result.states.values(), *(() if logits is None else (logits,))):
            if not bool(value.isfinite().all()):
                return Result(result.job, error=not_finite(result.job.name, self.dtype))
        return Result(result.job, result.states, logits, result.error)


def not_finite(name: str, dtype: torch.dtype) -> NonFiniteError:
    """What to say of a model that gives infinities or NaN for some input."""
    way_out = "use float32 or bfloat16" if dtype == torch.float16 else "the weights are damaged or diverged"
    kind = str(dtype).removeprefix("torch.")
    return NonFiniteError(f"{name}: the model gives infinities or NaN in {kind}; {way_out}")


def check_finite(array: FloatArray, name: str, dtype: torch.dtype) -> None:
    """See that a model gave numbers for some input.

    Raises:
        NonFiniteError: it gave infinities or NaN.
    """
    if not np.isfinite(array).all():
        raise not_finite(name, dtype)


def _too_large(job: Job[Any]) -> DeviceError:
    return DeviceError(
        f"{job.name}: {len(job.tokens)} tokens at once do not fit in the accelerator's memory; cut (truncate) or split "
        "(window) long sequences, compute in bfloat16, or take a smaller model"
    )
