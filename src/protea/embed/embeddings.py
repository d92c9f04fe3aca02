"""Records in, embeddings out: what is asked of the runner for a record, and what is made of its answers.

Knows nothing of files: readers are upstream, stores downstream.

Shapes: N layers asked for, L residues, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from protea.alphabet import Frame
from protea.embed.pooling import pooled
from protea.embed.prepare import EncodedRecord
from protea.errors import UsageError
from protea.infer.runner import FloatArray, Job, Result, Runner, Wanted
from protea.infer.windows import join
from protea.models.encoder import Encoder

_RESIDUES = "residues"
_TOKENS = "tokens"


@dataclass(frozen=True)
class Embedding:
    """What one record became.

    Attributes:
        encoded: the record.
        pooled: by pooling, ``[N, D]`` float32.
        residues: ``[N, L, D]`` float32, if asked for.
    """

    encoded: EncodedRecord
    pooled: dict[str, FloatArray]
    residues: FloatArray | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to keep of each record.

    Attributes:
        layers: which hidden states, resolved.
        poolings: names from ``POOLINGS``.
        residues: whether to give one vector a residue.
    """

    layers: tuple[int, ...]
    poolings: tuple[str, ...] = ()
    residues: bool = False


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


def embed(runner: Runner, records: Iterable[EncodedRecord], asked: Asked) -> Iterator[Embedding]:
    """Embeddings of encoded records, in order.

    Raises:
        SequenceTooLongError: a record has more tokens than the model has positions.
        DeviceError: a single pass does not fit in the accelerator's memory.
        NonFiniteError: the model gives infinities or NaN.
    """
    frame = runner.model.alphabet.frame
    for record, results in runner.each((record, jobs_of(record, asked, frame)) for record in records):
        yield assemble(record, results, asked, frame)


def jobs_of(record: EncodedRecord, asked: Asked, frame: Frame) -> Iterator[Job[EncodedRecord]]:
    """The passes of a record: itself, or its windows, which are joined before anything is pooled."""
    reduce: Callable[[Tensor], dict[str, Tensor]] = partial(_reduce, asked=asked, frame=frame)
    wanted = Wanted(layers=asked.layers, reduce=reduce) if len(record.windows) == 1 else Wanted(layers=asked.layers)
    for start, end in record.windows:
        yield Job(frame.around(record.ids[start:end]), wanted, record, record.record.place)


def assembled(results: Iterable[Result[EncodedRecord]], asked: Asked, frame: Frame) -> Iterator[Embedding]:
    """Embeddings from the results of several records' passes, in order."""
    for _, own in groupby(results, key=lambda result: id(result.job.tag)):
        results_of_one = list(own)
        yield assemble(results_of_one[0].job.tag, results_of_one, asked, frame)


def assemble(record: EncodedRecord, results: Sequence[Result[EncodedRecord]], asked: Asked, frame: Frame) -> Embedding:
    """The embedding of a record from the results of its passes."""
    states = [result.checked().states for result in results]
    if len(states) == 1:
        (whole,) = states
    else:
        tokens = {layer: _joined(record, [one[layer, _TOKENS] for one in states], frame) for layer in asked.layers}
        whole = {
            (layer, name): value for layer, x in tokens.items() for name, value in _reduce(x, asked, frame).items()
        }
    residues = _stack([whole[layer, _RESIDUES] for layer in asked.layers]) if asked.residues else None
    vectors = {name: _stack([whole[layer, name] for layer in asked.layers]) for name in asked.poolings}
    return Embedding(record, vectors, residues)


def _reduce(tokens: Tensor, asked: Asked, frame: Frame) -> dict[str, Tensor]:
    """What is kept of one hidden state ``[T, D]``."""
    kept = {name: pooled(name, tokens, frame) for name in asked.poolings}
    return kept | ({_RESIDUES: tokens[frame.rows]} if asked.residues else {})


def _joined(record: EncodedRecord, windows: list[Tensor], frame: Frame) -> Tensor:
    """``[T, D]``: the windows' residues joined, between the means of their BOS and EOS vectors."""
    rows = join([window[frame.rows] for window in windows], record.windows)
    bos, eos = ([torch.stack([window[row] for window in windows]).mean(0)[None]] for row in (0, -1))
    return torch.cat((*(bos if frame.bos is not None else ()), rows, *(eos if frame.eos is not None else ())))


def _stack(tensors: list[Tensor]) -> FloatArray:
    array: FloatArray = torch.stack(tensors).numpy()
    return array


def logits(runner: Runner, records: Iterable[EncodedRecord]) -> Iterator[FloatArray]:
    """Language-model logits ``[L, V]`` float32 of each record's residues, V in the alphabet's order.

    Where windows overlap, logits are averaged as embeddings are.

    Raises:
        CapabilityError: the model has no language-model head.
        NonFiniteError: the model gives infinities or NaN.
    """
    runner.model.require("logits")
    frame = runner.model.alphabet.frame

    def jobs(record: EncodedRecord) -> Iterator[Job[None]]:
        for start, end in record.windows:
            places = frame.before + np.arange(end - start)
            yield Job(frame.around(record.ids[start:end]), Wanted(places=places), None, record.record.place)

    for record, results in runner.each((record, jobs(record)) for record in records):
        windows = [logits for result in results if (logits := result.checked().logits) is not None]
        yield join(windows, record.windows).numpy().copy()
