"""One runner for whatever computes with a finished model: jobs in, results out, in order.

A job is one input, token by token, and what is wanted of it: hidden states, logits at some tokens, a look at attention.
Jobs are packed by a token budget and a pack is halved where an accelerator's memory does not suffice. What is wrong
with a job is in its result, and the jobs beside it go on. On an accelerator the next pack computes while the results
of the one before travel to main memory. Knows nothing of files, records or what results are for.

Shapes: T tokens of a job, P places asked for, D model width, V tokens of the alphabet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.allocator import return_freed_memory_at_times
from protea.errors import DeviceError, NonFiniteError, ProteaError, UsageError
from protea.infer.transfer import copied
from protea.models.attention_maps import AttentionMaps, HeadMaps
from protea.models.encoder import Encoder
from protea.packing import PackedBatch, pack, pack_by_budget

FloatArray = NDArray[np.float32]
Item = TypeVar("Item")
Tag = TypeVar("Tag")

Watcher = Callable[[int, HeadMaps], None]
"""Receives a layer's number, from 1, and a job's maps in it, which are computed as it looks at them."""


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
        watch: makes what looks at the job's attention. A pack that does not fit in memory is begun again in halves,
            each time with a new watcher.
    """

    layers: tuple[int, ...] = ()
    reduce: Callable[[Tensor], dict[str, Tensor]] = _as_it_is
    places: NDArray[np.int64] | None = None
    watch: Callable[[], Watcher] | None = None


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


@dataclass
class Result(Generic[Tag]):
    """What became of a job.

    Attributes:
        job: which.
        states: in main memory, by layer and by the name that ``reduce`` gave.
        logits: ``[P, V]`` float32 in main memory, if places were asked for; V in the alphabet's order.
        watcher: what has seen the attention of all layers, if somebody was to look.
        error: why there is nothing, if so.
    """

    job: Job[Tag]
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    watcher: Any = None
    error: ProteaError | None = None

    def checked(self) -> Self:
        """The result, if there is one.

        Raises:
            UsageError: the input is empty, or the job asks for what does not exist.
            CapabilityError: it asks for logits of a model without a language-model head.
            SequenceTooLongError: the input has more tokens than the model has positions.
            DeviceError: it does not fit in the accelerator's memory, even by itself.
            NonFiniteError: the model gives infinities or NaN.
        """
        if self.error is not None:
            raise self.error
        return self

    @property
    def values(self) -> list[Tensor]:
        """States, and logits if there are."""
        return [*self.states.values(), *([] if self.logits is None else [self.logits])]

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

    Raises:
        ValueError: the budget is below 1.
    """

    def __init__(
        self,
        model: Encoder,
        budget: int,
        around: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
    ) -> None:
        if budget < 1:
            raise ValueError(f"a token budget must be at least 1, got {budget}")
        self.model, self.budget = model, budget
        self._around = around
        self._ahead = int(model.device.type == "cuda")

    def run(self, jobs: Iterable[Job[Tag]]) -> Iterator[Result[Tag]]:
        """Results in the order of the jobs, which are taken as they are needed."""
        for _, results in self.each((None, [job]) for job in jobs):
            yield from results

    def each(
        self,
        items: Iterable[tuple[Item, Iterable[Job[Tag]]] | None],
        *,
        apart: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Generator[tuple[Item, list[Result[Tag]]]]:
        """The results of each item's jobs together, in order; items may have any number of jobs, or none.

        Args:
            items: each with its jobs, both taken as they are needed. ``None`` among them says that no more come for
                now: all before it is computed and given before the next is taken. If taking one fails, so it is before
                the error is raised.
            apart: items share no packs.
            advance: told how many jobs more are done.
        """
        opened: deque[_Open[Item, Tag]] = deque()
        failures: list[Exception] = []

        def asked() -> Iterator[_Owned[Item, Tag] | None]:
            try:
                for entry in items:
                    if entry is None:
                        # The first ends the pack that is being filled; the second is an empty one.
                        yield from (None, None)
                        continue
                    opened.append(_Open(entry[0]))
                    yield from opened[-1].asked(entry[1])
                    if apart:
                        yield None
            except Exception as error:
                failures.append(error)

        for owned, results in self._computed(pack_by_budget(asked(), lambda one: len(one.job.tokens), self.budget)):
            for one, result in zip(owned, results, strict=True):
                one.item.results.append(result)
            advance(len(results))
            while opened and opened[0].done:
                yield opened[0].item, opened.popleft().results
        while opened and opened[0].done:
            yield opened[0].item, opened.popleft().results
        for failure in failures:
            raise failure

    def _computed(
        self, packs: Iterable[list[_Owned[Item, Tag]]]
    ) -> Iterator[tuple[list[_Owned[Item, Tag]], list[Result[Tag]]]]:
        """Packs with their results; an accelerator is kept a pack ahead, until an empty one comes."""
        launched: deque[tuple[list[_Owned[Item, Tag]], list[_Launched[Tag]]]] = deque()

        def collected() -> tuple[list[_Owned[Item, Tag]], list[Result[Tag]]]:
            owned, parts = launched.popleft()
            return owned, [result for part in parts for result in part.collected()]

        for owned in packs:
            if owned:
                launched.append((owned, self._launch([one.job for one in owned])))
                return_freed_memory_at_times()
            while len(launched) > (self._ahead if owned else 0):
                yield collected()
            if not owned:
                yield [], []
        while launched:
            yield collected()

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
        results = [Result(job, error=self._unfit(job)) for job in jobs]
        able = [result for result in results if result.error is None]
        if not able:
            return _Launched(model.compute_dtype, results)
        batch = self._batch([result.job for result in able])
        spans = batch.cu_seqlens.spans()
        layers = {layer for result in able for layer in result.job.wanted.layers}
        watched = [(i, result) for i, result in enumerate(able) if result.job.wanted.watch is not None]
        for _, result in watched:
            assert result.job.wanted.watch is not None
            result.watcher = result.job.wanted.watch()

        def keep(number: int, x: Tensor) -> None:
            if number not in layers:
                return
            x = x.float()
            for result, (start, end) in zip(able, spans, strict=True):
                if number in result.job.wanted.layers:
                    with _errors_of(result):
                        reduced = result.job.wanted.reduce(x[start:end])
                        result.states.update({(number, name): value for name, value in reduced.items()})

        def look(number: int, maps: AttentionMaps) -> None:
            for sequence, result in watched:
                with _errors_of(result):
                    result.watcher(number, maps[sequence])

        asking = [
            (result, places, start)
            for result, (start, _) in zip(able, spans, strict=True)
            if (places := result.job.wanted.places) is not None
        ]
        # Before the model computes: on an accelerator a copy would wait for it.
        rows = self._moved([places + start for _, places, start in asking])
        with self._around():
            hidden = model(batch, on_hidden=keep if layers else None, on_attention=look if watched else None)
            if rows is not None:
                logits = model.head(hidden.index_select(0, rows))[:, : len(model.alphabet)].float()
                parts = torch.split(logits, [len(places) for _, places, _ in asking])
                for (result, _, _), part in zip(asking, parts, strict=True):
                    result.logits = part
            return _Launched(model.compute_dtype, results).to_host()

    def _unfit(self, job: Job[Tag]) -> ProteaError | None:
        """Why a job cannot be computed, if so."""
        model, wanted, size = self.model, job.wanted, len(job.tokens)
        places, last = wanted.places, len(model.layers)
        try:
            model.check_length(size)
            if places is not None:
                model.require("logits")
        except ProteaError as error:
            return type(error)(f"{job.name}: {error}")
        if not size:
            return UsageError(f"{job.name}: no tokens; the model needs one at least")
        if (largest := int(job.tokens.max())) >= len(model.alphabet):
            return UsageError(f"{job.name}: token {largest} does not exist; this model has {len(model.alphabet)}")
        if places is not None and len(places) and not 0 <= int(places.min()) <= int(places.max()) < size:
            return UsageError(f"{job.name}: places must be 0 to {size - 1}; got {places.tolist()}")
        if any(not 0 <= layer <= last for layer in wanted.layers):
            return UsageError(f"{job.name}: layers must be 0 to {last}; got {list(wanted.layers)}")
        return None

    def _batch(self, jobs: Sequence[Job[Tag]]) -> PackedBatch:
        batch = pack([job.tokens for job in jobs])
        on_gpu = self.model.device.type == "cuda"
        return (batch.pin_memory() if on_gpu else batch).to(self.model.device, non_blocking=on_gpu)

    def _moved(self, places: Sequence[NDArray[np.int64]]) -> Tensor | None:
        """Places, one list after another, on the model's device; nothing for no list."""
        if not places:
            return None
        rows = torch.from_numpy(np.concatenate(places))
        on_gpu = self.model.device.type == "cuda"
        return (rows.pin_memory() if on_gpu else rows).to(self.model.device, non_blocking=on_gpu)


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
        results: their states and logits on the way to main memory.
        arrived: waits until all is there.
    """

    dtype: torch.dtype
    results: list[Result[Tag]]
    arrived: Callable[[], None] = lambda: None

    def to_host(self) -> _Launched[Tag]:
        """Begin the copy to main memory; on an accelerator it runs beside the next pack's computation."""
        values = [value for result in self.results for value in result.values]
        if not values or values[0].device.type != "cuda":
            return self
        copies, arrived = copied(values)
        hosts = iter(copies)
        for result in self.results:
            result.states = {key: next(hosts) for key in result.states}
            result.logits = None if result.logits is None else next(hosts)
        return self._replace(arrived=arrived)

    def collected(self) -> Iterator[Result[Tag]]:
        self.arrived()
        for result in self.results:
            if result.error is None and not all(bool(value.isfinite().all()) for value in result.values):
                result.error = not_finite(result.job.name, self.dtype)
            yield result if result.error is None else Result(result.job, error=result.error)


@contextmanager
def _errors_of(result: Result[Any]) -> Iterator[None]:
    """What goes wrong inside belongs to a job; the first counts."""
    try:
        yield
    except ProteaError as error:
        result.error = result.error or error


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
