"""Records in, embeddings out: the jobs of a record for the runner, and the embedding from their results.

Knows nothing of files.

Shapes: N requested layers, L residues, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from protea.alphabet import Frame
from protea.embed.prepare import EncodedRecord
from protea.errors import UsageError
from protea.infer.runner import FloatArray, Job, Result, Runner, Wanted
from protea.infer.windows import join
from protea.models.encoder import Encoder
from protea.text import shown

POOLINGS: Final[dict[str, Callable[[Tensor, Frame], Tensor]]] = {
    "mean": lambda tokens, frame: tokens[frame.rows].mean(0),
    "max": lambda tokens, frame: tokens[frame.rows].amax(0),
    "std": lambda tokens, frame: tokens[frame.rows].std(0, correction=0),
    "bos": lambda tokens, frame: tokens[0],
}
"""From hidden states ``[T, D]`` to one vector ``[D]``; only ``bos`` uses BOS, as in all published systems.

``std`` divides by L, not L - 1, so that a single residue gives 0 and not NaN.
"""


def check_poolings(names: Sequence[str], frame: Frame | None = None) -> tuple[str, ...]:
    """Check that names are known and given once, and that ``bos`` has a BOS token to read; returns the names."""
    for name in names:
        if name not in POOLINGS:
            raise UsageError(f"unknown pooling {name!r}; use {', '.join(POOLINGS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"pooling {','.join(names)}: a name is repeated")
    if "bos" in names and frame is not None and frame.bos is None:
        raise UsageError("pooling bos needs a BOS token, and this model has none; use mean, max or std")
    return tuple(names)


_RESIDUES = "residues"
_TOKENS = "tokens"


@dataclass(frozen=True)
class Embedding:
    """The embedding of one record: for each pooling ``[N, D]`` float32, and ``[N, L, D]`` float32 if requested.

    ``log_probabilities`` are natural logarithms ``[L, P]`` float32 of the P predicted tokens that were asked for.
    """

    encoded: EncodedRecord
    pooled: dict[str, FloatArray]
    residues: FloatArray | None
    log_probabilities: FloatArray | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an embedding consists of.

    ``layers`` come from ``resolve_layers``; ``residues`` asks for one vector a residue. ``predicted`` are the tokens
    whose log-probabilities, among those of all tokens, are asked for.
    """

    layers: tuple[int, ...]
    poolings: tuple[str, ...] = ()
    residues: bool = False
    predicted: tuple[int, ...] = ()


def resolve_layers(layers: Sequence[int], model: Encoder) -> tuple[int, ...]:
    """Layer numbers from 0, the embedding, to the last layer; negative numbers count from the end."""
    last = model.config.num_hidden_layers
    resolved = tuple(layer + last + 1 if layer < 0 else layer for layer in layers)
    for given, layer in zip(layers, resolved, strict=True):
        if not 0 <= layer <= last:
            raise UsageError(f"layer {shown(given)} does not exist; this model has 0 to {last}, or -{last + 1} to -1")
    if not resolved or len(set(resolved)) < len(resolved):
        raise UsageError(f"layers {shown(list(layers))}: name at least one layer, and no layer twice")
    return resolved


def embed(runner: Runner, records: Iterable[EncodedRecord], asked: Asked) -> Iterator[Embedding]:
    """Embeddings of encoded records, in order."""
    frame = runner.model.alphabet.frame
    for record, results in runner.each((record, jobs_of(record, asked, frame)) for record in records):
        yield assemble(record, results, asked, frame)


def jobs_of(record: EncodedRecord, asked: Asked, frame: Frame) -> Iterator[Job[EncodedRecord]]:
    """The passes of a record: one, or one for each window; windows are joined before pooling."""
    reduce: Callable[[Tensor], dict[str, Tensor]] = partial(_reduce, asked=asked, frame=frame)
    wanted = Wanted(layers=asked.layers, reduce=reduce) if len(record.windows) == 1 else Wanted(layers=asked.layers)
    for start, end in record.windows:
        if asked.predicted:
            wanted = replace(wanted, places=frame.before + np.arange(end - start))
        yield Job(frame.around(record.ids[start:end]), wanted, record, record.record.place)


def assembled(results: Iterable[Result[EncodedRecord]], asked: Asked, frame: Frame) -> Iterator[Embedding]:
    """Embeddings from the results of the passes of several records, in order."""
    for _, passes in groupby(results, key=lambda result: id(result.job.tag)):
        of_record = list(passes)
        yield assemble(of_record[0].job.tag, of_record, asked, frame)


def assemble(record: EncodedRecord, results: Sequence[Result[EncodedRecord]], asked: Asked, frame: Frame) -> Embedding:
    """The embedding of a record from the results of its passes."""
    states = [result.checked().states for result in results]
    log_probabilities = None
    if asked.predicted:
        log_probabilities = _joined_logits(record, results).log_softmax(-1)[:, list(asked.predicted)].numpy()
    if len(states) == 1:
        (parts,) = states
    else:
        tokens = {
            layer: _joined(record, [window[layer, _TOKENS] for window in states], frame) for layer in asked.layers
        }
        parts = {
            (layer, name): value for layer, x in tokens.items() for name, value in _reduce(x, asked, frame).items()
        }
    residues = _stack([parts[layer, _RESIDUES] for layer in asked.layers]) if asked.residues else None
    vectors = {name: _stack([parts[layer, name] for layer in asked.layers]) for name in asked.poolings}
    return Embedding(record, vectors, residues, log_probabilities)


def _reduce(tokens: Tensor, asked: Asked, frame: Frame) -> dict[str, Tensor]:
    """The parts of an embedding from one layer's hidden states ``[T, D]``."""
    kept = {name: POOLINGS[name](tokens, frame) for name in asked.poolings}
    return kept | ({_RESIDUES: tokens[frame.rows]} if asked.residues else {})


def _joined(record: EncodedRecord, windows: list[Tensor], frame: Frame) -> Tensor:
    """Hidden states ``[T, D]``: the residues of the windows joined; BOS and EOS are means over the windows."""
    rows = join([window[frame.rows] for window in windows], record.windows)
    bos, eos = ([torch.stack([window[row] for window in windows]).mean(0)[None]] for row in (0, -1))
    return torch.cat((*(bos if frame.bos is not None else ()), rows, *(eos if frame.eos is not None else ())))


def _stack(tensors: list[Tensor]) -> FloatArray:
    array: FloatArray = torch.stack(tensors).numpy()
    return array


def _joined_logits(record: EncodedRecord, results: Sequence[Result[Any]]) -> Tensor:
    windows = [logits for result in results if (logits := result.checked().logits) is not None]
    return join(windows, record.windows)


def entropy(log_probabilities: FloatArray) -> FloatArray:
    """Entropy ``[L]`` in bits of log-probabilities ``[L, P]``, whose probabilities are scaled to sum to 1.

    It is 0 where the model is certain and log2 P where it knows nothing.
    """
    logs = log_probabilities.astype(np.float64)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    bits: FloatArray = (-(np.exp(logs) * logs).sum(1) / np.log(2)).astype(np.float32)
    return bits


def logits(runner: Runner, records: Iterable[EncodedRecord]) -> Iterator[FloatArray]:
    """Language-model logits ``[L, V]`` float32 of each record's residues, V in the alphabet's order.

    Where windows overlap, logits are averaged as embeddings are.
    """
    runner.model.require("logits")
    frame = runner.model.alphabet.frame

    def jobs(record: EncodedRecord) -> Iterator[Job[None]]:
        for start, end in record.windows:
            places = frame.before + np.arange(end - start)
            yield Job(frame.around(record.ids[start:end]), Wanted(places=places), None, record.record.place)

    for record, results in runner.each((record, jobs(record)) for record in records):
        yield _joined_logits(record, results).numpy().copy()
