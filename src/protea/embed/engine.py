"""The engine: packs in, embeddings out, in order, one pack on the device at a time.

Knows nothing of files: readers are upstream, stores downstream, each in a thread of its own where files are embedded.

Shapes: N layers asked for, L residues, D model width, T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.device import available_memory
from protea.embed.pooling import POOLINGS
from protea.embed.prepare import Encoded
from protea.embed.windows import join
from protea.errors import DeviceError, NonFiniteError, UsageError
from protea.models.encoder import Encoder
from protea.packing import PackedBatch, pack, pack_by_budget

FloatArray = NDArray[np.float32]
Item = TypeVar("Item")
Result = TypeVar("Result")

_CPU_BUDGET: Final = 4096
"""Tokens a pack holds on a CPU: more gain nothing, and memory grows with them."""

_ACCELERATOR_BUDGET: Final = 65536
"""Tokens a pack holds at most on an accelerator."""

_SHARED_BUDGET: Final = (_CPU_BUDGET, 16384)
"""Tokens a pack holds where machines of different memory, on CPUs or GPUs, must make the same packs."""

_MEMORY_SHARE: Final = 4
"""A pack takes at most one part in four of the memory that is free."""


@dataclass(frozen=True)
class Embedding:
    """What one record became.

    Attributes:
        encoded: the record.
        pooled: by pooling, ``[N, D]`` float32.
        residues: ``[N, L, D]`` float32, if asked for.
    """

    encoded: Encoded
    pooled: dict[str, FloatArray]
    residues: FloatArray | None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to keep of each record.

    Attributes:
        layers: which hidden states, resolved.
        poolings: names from ``POOLINGS``.
        residues: whether to give one vector a residue.
    """

    layers: tuple[int, ...]
    poolings: tuple[str, ...] = ()
    residues: bool = False


class _Pass(NamedTuple):
    """One sequence of a pack: a record's residues, or a window of them."""

    encoded: Encoded
    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start + 2


def resolve_layers(layers: Sequence[int], model: Encoder) -> tuple[int, ...]:
    """Layer numbers from 0, the embedding, to the last; negative ones count from the end.

    Raises:
        UsageError: a number is out of range or repeated.
    """
    last = model.config.num_hidden_layers
    resolved = tuple(layer + last + 1 if layer < 0 else layer for layer in layers)
    for given, layer in zip(layers, resolved, strict=True):
        if not 0 <= layer <= last:
            raise UsageError(f"layer {given} does not exist; this model has 0 to {last}, or -{last + 1} to -1")
    if not resolved or len(set(resolved)) < len(resolved):
        raise UsageError(f"layers {list(layers)} must name at least one layer, and none twice")
    return resolved


def default_budget(model: Encoder, *, whatever_is_free: bool = False) -> int:
    """Tokens a pack should hold, from the memory that is free on the model's device.

    On a CPU larger packs gain nothing beyond a few thousand tokens; an accelerator wants as many as fit.

    Args:
        model: on its device.
        whatever_is_free: the same number on every machine, as processes need that share their work by packs.
    """
    device = model.word_embeddings.weight.device
    if whatever_is_free:
        return _SHARED_BUDGET[device.type == "cuda"]
    config = model.config
    # Hidden state, its norm, q, k, v, their rotated copies, the output; the feed-forward layer before and after GELU.
    values = 10 * config.hidden_size + 2 * config.intermediate_size
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], _ACCELERATOR_BUDGET
    else:
        free, most = available_memory(), _CPU_BUDGET
    fits = free // (_MEMORY_SHARE * values * model.word_embeddings.weight.element_size())
    return max(1024, min(most, fits // 1024 * 1024))


def embed(
    model: Encoder, packs: Iterable[Sequence[Encoded]], wanted: Wanted, token_budget: int
) -> Iterator[Callable[[], list[Embedding]]]:
    """Embed packs of encoded records, in order.

    Args:
        model: on the device to compute on.
        packs: each either fits the budget or is one record.
        wanted: what to keep.
        token_budget: tokens computed at a time; a single pass over more is computed nonetheless.

    Yields:
        For each pack a function that gives its embeddings. On an accelerator the pack may still be computing, and
        calling the function waits for it. On a CPU all is done: threads beside the computing one would steal from it.

    Raises:
        DeviceError: a single sequence does not fit in the accelerator's memory.
    """
    for records in packs:
        passes = [_Pass(record, *window) for record in records for window in record.windows]
        kept: list[_Kept] = []
        for some in pack_by_budget(passes, lambda one: one.tokens, token_budget):
            kept += in_halves(some, lambda part: _forward(model, part, wanted), _too_large)
        finish = _Finish(list(records), wanted, kept, model.word_embeddings.weight.dtype)
        yield finish if model.word_embeddings.weight.device.type == "cuda" else _Done(finish()).get


def logits(model: Encoder, records: Iterable[Encoded], token_budget: int) -> Iterator[FloatArray]:
    """Language-model logits ``[L, V]`` float32 of each record's residues, V in the alphabet's order.

    Where windows overlap, logits are averaged as embeddings are.

    Raises:
        CapabilityError: the model has no language-model head.
    """
    model.require("logits")
    size = len(model.alphabet)
    for group in pack_by_budget(records, lambda record: record.tokens, token_budget):
        passes = [_Pass(record, *window) for record in group for window in record.windows]
        values: list[Tensor] = []
        for some in pack_by_budget(passes, lambda one: one.tokens, token_budget):
            batch = _batch(model, some)
            with torch.inference_mode():
                rows = model.head(model(batch))[:, :size].float().cpu()
            values += [rows[start + 1 : end - 1] for start, end in batch.cu_seqlens.spans()]
        for record in group:
            windows = [values.pop(0) for _ in record.windows]
            joined = join(windows, record.windows).numpy().copy()
            check_finite(joined, record.record.place, model.word_embeddings.weight.dtype)
            yield joined


class _Kept(NamedTuple):
    """What is kept of some passes, on the device or on its way from there.

    Attributes:
        passes: which.
        pooled: by layer and pooling, ``[B, D]``.
        states: by layer, ``[T, D]``.
        spans: first row and row after the last of each pass.
        arrived: called before the values are read.
    """

    passes: list[_Pass]
    pooled: dict[tuple[int, str], Tensor]
    states: dict[int, Tensor]
    spans: list[tuple[int, int]]
    arrived: Callable[[], None]


def in_halves(items: list[Item], run: Callable[[list[Item]], Result], too_large: Callable[[Item], str]) -> list[Result]:
    """Run items as one pack, or as halves of it where an accelerator's memory does not suffice.

    Args:
        items: of the pack.
        run: computes some of them.
        too_large: what to say of one that does not fit by itself.

    Raises:
        DeviceError: a single item does not fit.
    """
    try:
        return [run(items)]
    except torch.OutOfMemoryError as error:
        if len(items) == 1:
            raise DeviceError(too_large(items[0])) from error
    # Outside the handler: the exception's frames would hold on to the tensors that did not fit.
    torch.cuda.empty_cache()
    half = len(items) // 2
    return in_halves(items[:half], run, too_large) + in_halves(items[half:], run, too_large)


def _too_large(one: _Pass) -> str:
    return (
        f"{one.encoded.record.place}: {one.tokens - 2} residues at once do not fit in the accelerator's memory; cut "
        "(truncate) or split (window) long sequences, compute in bfloat16, or take a smaller model"
    )


def _forward(model: Encoder, passes: list[_Pass], wanted: Wanted) -> _Kept:
    batch = _batch(model, passes)
    spans = batch.cu_seqlens.spans()
    # Windows are joined first and pooled then.
    whole = wanted.residues or any(len(one.encoded.windows) > 1 for one in passes)
    pooled: dict[tuple[int, str], Tensor] = {}
    states: dict[int, Tensor] = {}

    def keep(number: int, x: Tensor) -> None:
        if number not in wanted.layers:
            return
        x = x.float()
        for name in wanted.poolings:
            pooled[number, name] = torch.stack([POOLINGS[name](x[start:end]) for start, end in spans])
        if whole:
            states[number] = x

    with torch.inference_mode():
        model(batch, on_hidden=keep)
        return _to_host(_Kept(passes, pooled, states, spans, lambda: None))


def _to_host(kept: _Kept) -> _Kept:
    """Start the copy to main memory; on an accelerator it runs beside the next pack's computation."""
    values = [*kept.pooled.values(), *kept.states.values()]
    if not values or values[0].device.type != "cuda":
        return kept._replace(
            pooled={key: value.cpu() for key, value in kept.pooled.items()},
            states={key: value.cpu() for key, value in kept.states.items()},
        )
    device = values[0].device
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        pooled = {key: _pinned(value, stream) for key, value in kept.pooled.items()}
        states = {key: _pinned(value, stream) for key, value in kept.states.items()}
        event = stream.record_event()
    return kept._replace(pooled=pooled, states=states, arrived=event.synchronize)


def _pinned(value: Tensor, stream: torch.cuda.Stream) -> Tensor:
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    host.copy_(value, non_blocking=True)
    value.record_stream(stream)
    return host


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _copy_streams[device]


class _Done(NamedTuple):
    embeddings: list[Embedding]

    def get(self) -> list[Embedding]:
        return self.embeddings


@dataclass(frozen=True)
class _Finish:
    """Turns what was kept of a pack into embeddings, once it has arrived."""

    records: list[Encoded]
    wanted: Wanted
    kept: list[_Kept]
    dtype: torch.dtype

    def __call__(self) -> list[Embedding]:
        places: dict[int, list[tuple[_Kept, int]]] = {}
        for kept in self.kept:
            kept.arrived()
            for number, one in enumerate(kept.passes):
                places.setdefault(id(one.encoded), []).append((kept, number))
        return [self._embedding(record, places[id(record)]) for record in self.records]

    def _embedding(self, record: Encoded, places: list[tuple[_Kept, int]]) -> Embedding:
        layers, poolings = self.wanted.layers, self.wanted.poolings
        if len(places) == 1:
            kept, number = places[0]
            start, end = kept.spans[number]
            pooled = {name: _stack([kept.pooled[layer, name][number] for layer in layers]) for name in poolings}
            states = [kept.states[layer][start + 1 : end - 1] for layer in layers] if self.wanted.residues else []
        else:
            tokens = [self._joined(record, layer, places) for layer in layers]
            pooled = {name: _stack([POOLINGS[name](x) for x in tokens]) for name in poolings}
            states = [x[1:-1] for x in tokens] if self.wanted.residues else []
        residues = _stack(states) if states else None
        for array in (*pooled.values(), *(() if residues is None else (residues,))):
            check_finite(array, record.record.place, self.dtype)
        return Embedding(record, pooled, residues)

    def _joined(self, record: Encoded, layer: int, places: list[tuple[_Kept, int]]) -> Tensor:
        """``[L+2, D]``: the windows' residues joined, between the means of their BOS and EOS vectors."""
        windows = [kept.states[layer][slice(*kept.spans[number])] for kept, number in places]
        bos, eos = (torch.stack([window[row] for window in windows]).mean(0)[None] for row in (0, -1))
        return torch.cat((bos, join([window[1:-1] for window in windows], record.windows), eos))


def _stack(tensors: list[Tensor]) -> FloatArray:
    array: FloatArray = torch.stack(tensors).numpy()
    return array


def check_finite(array: FloatArray, place: str, dtype: torch.dtype) -> None:
    """See that a model gave numbers.

    Raises:
        NonFiniteError: it gave infinities or NaN.
    """
    if not np.isfinite(array).all():
        name = str(dtype).removeprefix("torch.")
        way_out = "use float32 or bfloat16" if dtype == torch.float16 else "the weights are damaged or diverged"
        raise NonFiniteError(f"{place}: the model gives infinities or NaN in {name}; {way_out}")


def _batch(model: Encoder, passes: Sequence[_Pass]) -> PackedBatch:
    alphabet = model.alphabet
    device = model.word_embeddings.weight.device
    batch = pack([one.encoded.ids[one.start : one.end] for one in passes], bos=alphabet.bos, eos=alphabet.eos)
    if device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=device.type == "cuda")
