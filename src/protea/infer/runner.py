"""The one runner for all that computes with a finished model: jobs in, results out, in order.

A job is the tokens of one input and what to compute: hidden states, logits at some tokens, maps of attention. The
runner packs jobs by a token budget and halves a pack that exceeds an accelerator's memory. An error in one job is in
its result; other jobs continue. An accelerator computes the next pack while the last results are copied to main
memory. The runner knows nothing of files, records or what results are for.

Shapes: T tokens of a job, P places, D model width, V tokens of the alphabet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.device import return_freed_memory
from protea.errors import DeviceError, NonFiniteError, ProteaError, UsageError
from protea.limits import available_memory
from protea.models.attention import AttentionCall, HeadMaps
from protea.models.encoder import AttentionObserver, Encoder, HiddenObserver
from protea.packing import PackedBatch, PackedRows, pack, pack_by_budget
from protea.transforms.cpu import PackedHead

FloatArray = NDArray[np.float32]
Item = TypeVar("Item")
Tag = TypeVar("Tag")
Movable = TypeVar("Movable", Tensor, PackedBatch, PackedRows)

MapWatcher = Callable[[int, HeadMaps], None]  # receives a layer's number, from 1, and a job's maps in that layer


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to compute for a job.

    Attributes:
        layers: hidden states to keep: 0 is the embedding, the last comes after the final norm.
        reduce: turns such a state, ``[T, D]`` float32 on the model's device, into named tensors to keep.
        places: ``[P]`` tokens to compute logits for.
        watch: makes the watcher of the job's attention. A pack that exceeds the memory starts again in halves, with new
            watchers.
    """

    layers: tuple[int, ...] = ()
    reduce: Callable[[Tensor], dict[str, Tensor]] = lambda x: {"tokens": x}
    places: NDArray[np.int64] | None = None
    watch: Callable[[], MapWatcher] | None = None


@dataclass(frozen=True)
class Job(Generic[Tag]):
    """One input: its tokens ``[T]``, with BOS and EOS if the model expects them, and its name for messages.

    The tag is any value of the caller; it comes back with the result.
    """

    tokens: NDArray[np.uint8]
    wanted: Wanted
    tag: Tag
    name: str


@dataclass
class Result(Generic[Tag]):
    """The result of a job, in main memory, or the error that prevented it.

    Attributes:
        states: by layer and by the name that ``reduce`` gave.
        logits: ``[P, V]`` float32, if the job has places; V in the alphabet's order.
        watcher: has received the maps of all layers, if the job has a watcher.
    """

    job: Job[Tag]
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    watcher: Any = None
    error: ProteaError | None = None

    def checked(self) -> Self:
        """The result; raises the job's error if there is one."""
        if self.error is not None:
            raise self.error
        return self

    @property
    def values(self) -> list[Tensor]:
        """States, and logits if there are any."""
        return [*self.states.values(), *([] if self.logits is None else [self.logits])]

    @property
    def log_probabilities(self) -> FloatArray:
        """``[P, V]`` float32, natural logarithms over the tokens of the alphabet."""
        logits = self.checked().logits
        assert logits is not None
        values: FloatArray = logits.log_softmax(-1).numpy()
        return values


Launched = tuple[list[Result[Tag]], Callable[[], None]]
"""The results of a pack, and a function that waits until they are in main memory."""


class Runner:
    """Runs jobs on a model, in packs of at most ``budget`` tokens, at least 1; a larger job is a pack by itself.

    Each forward pass runs in the context that ``around`` makes.
    """

    def __init__(
        self, model: Encoder, budget: int, around: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    ) -> None:
        self.model, self.budget = model, budget
        self._around = around
        self._on_gpu = model.device.type == "cuda"

    def run(self, jobs: Iterable[Job[Tag]]) -> Iterator[Result[Tag]]:
        """Results in the order of the jobs, which are taken only when needed."""
        for _, results in self.each((None, [job]) for job in jobs):
            yield from results

    def each(
        self,
        items: Iterable[tuple[Item, Iterable[Job[Tag]]]],
        *,
        apart: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Generator[tuple[Item, list[Result[Tag]]]]:
        """Each item with the results of all its jobs, in order; with ``apart``, items share no packs.

        Items and jobs are taken only when needed. If that raises an error, the error comes after the results of all
        jobs before it. ``advance`` receives the number of jobs in each finished pack.
        """
        complete: deque[tuple[Item, int]] = deque()
        results: deque[Result[Tag]] = deque()
        failures: list[Exception] = []

        def jobs_of_items() -> Iterator[Job[Tag] | None]:
            try:
                for item, jobs in items:
                    count = 0
                    for job in jobs:
                        count += 1
                        yield job
                    complete.append((item, count))
                    if apart:
                        yield None
            except Exception as error:
                failures.append(error)

        def finished() -> Iterator[tuple[Item, list[Result[Tag]]]]:
            while complete and len(results) >= complete[0][1]:
                item, count = complete.popleft()
                yield item, [results.popleft() for _ in range(count)]

        for computed in self._computed(pack_by_budget(jobs_of_items(), lambda job: len(job.tokens), self.budget)):
            results.extend(computed)
            advance(len(computed))
            yield from finished()
        yield from finished()
        for failure in failures:
            raise failure

    def _computed(self, packs: Iterable[list[Job[Tag]]]) -> Iterator[list[Result[Tag]]]:
        """The results of each pack, none for an empty one; an accelerator computes one pack ahead."""
        launched: deque[list[Launched[Tag]]] = deque()
        for jobs in packs:
            if not jobs:
                yield []  # items without jobs must not wait for the next pack
                continue
            launched.append(self._launch(jobs))
            return_freed_memory(between_packs=True)
            if len(launched) > int(self._on_gpu):
                yield self._collected(launched.popleft())
        yield from map(self._collected, launched)

    def _launch(self, jobs: list[Job[Tag]]) -> list[Launched[Tag]]:
        """Begin to compute jobs as one pack, or as halves of it if the memory is too small."""
        try:
            return [self._forward(jobs)]
        except torch.OutOfMemoryError:
            if len(jobs) == 1:
                return [([Result(jobs[0], error=_too_large(jobs[0]))], lambda: None)]
        # After the handler, since the exception keeps the tensors of the failed pass in memory.
        torch.cuda.empty_cache()
        half = len(jobs) // 2
        return self._launch(jobs[:half]) + self._launch(jobs[half:])

    def _forward(self, jobs: list[Job[Tag]]) -> Launched[Tag]:
        model = self.model
        results = [Result(job, error=self._unfit(job)) for job in jobs]
        able = [result for result in results if result.error is None]
        if not able:
            return results, lambda: None
        packed = pack([result.job.tokens for result in able])
        spans = packed.cu_seqlens.spans()
        batch = self._moved(packed)
        on_hidden, on_attention = _observers(able, spans)
        asking = [
            (result, places + start)
            for result, (start, _) in zip(able, spans, strict=True)
            if (places := result.job.wanted.places) is not None
        ]
        # PyTorch multiplies another number of rows in another order on a CPU, so there each job has a product of its
        # own: its logits are the same to the bit whatever shares the pack. The native library's always are.
        together = self._on_gpu or isinstance(model.lm_head, PackedHead)
        groups = [asking] if together and asking else [[pair] for pair in asking]
        # Copied before the model computes: later, on an accelerator, the copy would wait for it.
        rows = [
            self._moved(PackedRows.of(np.concatenate([places for _, places in group]), packed.cu_seqlens))
            for group in groups
        ]
        # Whoever wants the last hidden states wants those of all tokens.
        last = any(len(model.layers) in result.job.wanted.layers for result in able)
        only = rows[0] if together and asking and not last else None
        with self._around():
            hidden = model(batch, on_hidden=on_hidden, on_attention=on_attention, rows=only)
            for group, of_group in zip(groups, rows, strict=True):
                states = hidden if only is not None else hidden.index_select(0, of_group.index)
                logits = model.head(states)[:, : len(model.alphabet)].float()
                parts = torch.split(logits, [len(places) for _, places in group])
                for (result, _), part in zip(group, parts, strict=True):
                    result.logits = part
            return results, _copied_to_host(results)

    def _unfit(self, job: Job[Tag]) -> ProteaError | None:
        """The reason why a job cannot be computed; ``None`` if it can."""
        try:
            self.model.check_length(len(job.tokens))
            if job.wanted.places is not None:
                self.model.require("logits")
        except ProteaError as error:
            return type(error)(f"{job.name}: {error}")
        if not len(job.tokens):
            return UsageError(f"{job.name}: no tokens; the model needs at least one")
        return None

    def _moved(self, values: Movable) -> Movable:
        """The values on the model's device."""
        values = values.pin_memory() if self._on_gpu else values
        return values.to(self.model.device, non_blocking=self._on_gpu)

    def _collected(self, parts: list[Launched[Tag]]) -> list[Result[Tag]]:
        """Wait for results and look for infinities and NaN."""
        collected: list[Result[Tag]] = []
        for results, wait in parts:
            wait()
            for result in results:
                if result.error is None and not all(bool(value.isfinite().all()) for value in result.values):
                    result.error = not_finite(result.job.name, self.model.precision)
                collected.append(result if result.error is None else Result(result.job, error=result.error))
        return collected


def _observers(
    results: Sequence[Result[Tag]], spans: Sequence[tuple[int, int]]
) -> tuple[HiddenObserver | None, AttentionObserver | None]:
    """Observers that give each job of a pack its states and maps."""
    layers = {layer for result in results for layer in result.job.wanted.layers}
    watched: list[tuple[int, Result[Tag]]] = []
    for sequence, result in enumerate(results):
        if result.job.wanted.watch is not None:
            result.watcher = result.job.wanted.watch()
            watched.append((sequence, result))

    def keep(number: int, x: Tensor) -> None:
        if number not in layers:
            return
        x = x.float()
        for result, (start, end) in zip(results, spans, strict=True):
            if number in result.job.wanted.layers:
                with _errors_of(result):
                    reduced = result.job.wanted.reduce(x[start:end])
                    result.states.update({(number, name): value for name, value in reduced.items()})

    def look(number: int, call: AttentionCall) -> None:
        for sequence, result in watched:
            with _errors_of(result):
                result.watcher(number, call.maps(sequence))

    return keep if layers else None, look if watched else None


@contextmanager
def _errors_of(result: Result[Any]) -> Iterator[None]:
    """Keep the first error that is raised inside as the job's error."""
    try:
        yield
    except ProteaError as error:
        result.error = result.error or error


def _copied_to_host(results: list[Result[Tag]]) -> Callable[[], None]:
    """Begin to copy states and logits from an accelerator to main memory; the returned function waits for the end."""
    values = [value for result in results for value in result.values]
    if not values or values[0].device.type != "cuda":
        return lambda: None
    device, flat = values[0].device, torch.cat([value.reshape(-1) for value in values])
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        host.copy_(flat, non_blocking=True)
        flat.record_stream(stream)
        wait: Callable[[], None] = stream.record_event().synchronize
    parts = torch.split(host, [value.numel() for value in values])
    copies = iter([part.view(value.shape) for part, value in zip(parts, values, strict=True)])
    for result in results:
        result.states = {key: next(copies) for key in result.states}
        result.logits = None if result.logits is None else next(copies)
    return wait


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def not_finite(name: str, precision: str) -> NonFiniteError:
    """The error for an input for which a model gives infinities or NaN in its ``precision``."""
    remedy = "use float32 or bfloat16" if precision == "float16" else "the weights are damaged or diverged"
    return NonFiniteError(f"{name}: the model gives infinities or NaN in {precision}; {remedy}")


def check_finite(array: FloatArray, name: str, precision: str) -> None:
    """Raise ``NonFiniteError`` if a model's output for some input has infinities or NaN."""
    if not np.isfinite(array).all():
        raise not_finite(name, precision)


def _too_large(job: Job[Any]) -> DeviceError:
    return DeviceError(
        f"{job.name}: {len(job.tokens)} tokens at once do not fit in the accelerator's memory; cut (truncate) or split "
        "(window) long sequences, compute in bfloat16, or use a smaller model"
    )


# Most tokens of a pack. On CPUs, larger packs take more memory and save no time.
_CPU_BUDGET: Final = 4096
_GPU_BUDGET: Final = 65536
_SHARED_GPU_BUDGET: Final = 16384

_MEMORY_SHARE: Final = 4  # a pack takes at most a quarter of the free memory


def default_budget(model: Encoder, *, whatever_is_free: bool = False) -> int:
    """Tokens that a pack should hold, from the free memory of the model's device.

    With ``whatever_is_free`` it does not depend on the free memory, so that several machines make the same packs.
    """
    device = model.device
    on_gpu = device.type == "cuda"
    if whatever_is_free:
        return _SHARED_GPU_BUDGET if on_gpu else _CPU_BUDGET
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    fits = free // (_MEMORY_SHARE * model.config.inference_values * model.compute_dtype.itemsize)
    return max(1024, min(_GPU_BUDGET if on_gpu else _CPU_BUDGET, fits // 1024 * 1024))
