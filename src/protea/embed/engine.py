"""The engine: records in, encoded, packed, run, pooled, embeddings out, one pack in memory at a time.

Order in is order out. Knows nothing of files: readers are upstream, stores downstream.

Shapes: N layers asked for, L residues, D model width, T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protea.alphabet import Alphabet
from protea.embed.pooling import POOLINGS
from protea.errors import SequenceTooLongError, UnknownResidueError, UsageError
from protea.fasta import Record
from protea.models.encoder import Encoder
from protea.packing import PackedBatch, pack, pack_by_budget

FloatArray = NDArray[np.float32]

Long = Literal["full", "truncate", "error"]
"""What happens to a sequence longer than the model's published limit.

``full`` runs it whole, which only rotary models can; ``truncate`` keeps its beginning; ``error`` refuses it.
"""

LONG_POLICIES: Final[tuple[str, ...]] = get_args(Long)


def parse_long(name: str) -> Long:
    """The policy of a name.

    Raises:
        UsageError: there is no such policy.
    """
    if name not in LONG_POLICIES:
        raise UsageError(f"unknown policy for long sequences {name!r}; use {', '.join(LONG_POLICIES)}")
    return cast("Long", name)


TOKEN_BUDGET: Final = {"cpu": 4096, "cuda": 16384, "mps": 4096}
"""Tokens a pack holds unless the caller says otherwise."""


@dataclass(frozen=True)
class Encoded:
    """A record turned into token ids, BOS and EOS not yet added."""

    record: Record
    ids: NDArray[np.uint8]
    truncated_from: int | None

    @property
    def tokens(self) -> int:
        """Tokens with BOS and EOS."""
        return len(self.ids) + 2


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


def encode(records: Iterable[Record], model: Encoder, long: Long) -> Iterator[Encoded]:
    """Encode records one by one.

    Raises:
        UnknownResidueError: a letter outside the alphabet, with file, line, record and position.
        SequenceTooLongError: a sequence over the limit that the policy does not allow.
    """
    limit = model.trained_tokens - 2
    for record in records:
        ids = _encode(record, model.alphabet)
        truncated_from = None
        if len(ids) > limit and (long != "full" or model.max_tokens is not None):
            if long != "truncate":
                raise _too_long(record, len(ids), model)
            truncated_from = len(ids)
            ids = ids[:limit]
        yield Encoded(record, ids, truncated_from)


def _encode(record: Record, alphabet: Alphabet) -> NDArray[np.uint8]:
    try:
        return alphabet.encode(record.sequence)
    except UnknownResidueError as error:
        raise UnknownResidueError(f"{record.place}: {error}") from error


def _too_long(record: Record, length: int, model: Encoder) -> SequenceTooLongError:
    limit = model.trained_tokens - 2
    if model.max_tokens is None:
        what = f"over the {limit} that {model.config.family} was trained on; run it whole with long=full"
    else:
        what = (
            f"but this {model.config.family} model takes {limit}; take one without a limit (ESM-2), split the sequence"
        )
    return SequenceTooLongError(f"{record.place}: {length} residues, {what}, or keep its beginning with long=truncate")


def embed(
    model: Encoder,
    items: Iterable[Encoded],
    *,
    layers: Sequence[int] = (-1,),
    poolings: Sequence[str] = (),
    residues: bool = False,
    token_budget: int | None = None,
) -> Iterator[Embedding]:
    """Embed encoded records, in order.

    Args:
        model: on the device to compute on.
        items: from ``encode``.
        layers: which hidden states.
        poolings: names from ``POOLINGS``.
        residues: whether to give one vector a residue.
        token_budget: tokens a pack holds; a longer sequence is a pack of its own.
    """
    wanted = resolve_layers(layers, model)
    for group, batch in _batches(model, items, token_budget):
        keeper = _Keeper(wanted, tuple(poolings), residues, batch.cu_seqlens.spans())
        with torch.inference_mode():
            model(batch, on_hidden=keeper)
        yield from map(keeper.embedding, group, range(len(group)))


class _Keeper:
    """Takes the hidden states of one pack as they arise and keeps what was asked for."""

    def __init__(
        self, layers: tuple[int, ...], poolings: tuple[str, ...], residues: bool, spans: list[tuple[int, int]]
    ) -> None:
        self.layers = layers
        self.poolings = poolings
        self.residues = residues
        self.spans = spans
        self.pooled: dict[tuple[int, str], FloatArray] = {}
        self.states: dict[int, FloatArray] = {}

    def __call__(self, number: int, x: Tensor) -> None:
        if number not in self.layers:
            return
        x = x.float()
        for name in self.poolings:
            vectors = torch.stack([POOLINGS[name](x[start:end]) for start, end in self.spans])
            self.pooled[number, name] = vectors.cpu().numpy()
        if self.residues:
            self.states[number] = x.cpu().numpy()

    def embedding(self, encoded: Encoded, b: int) -> Embedding:
        """What was kept of sequence ``b``."""
        start, end = self.spans[b]
        pooled = {name: np.stack([self.pooled[layer, name][b] for layer in self.layers]) for name in self.poolings}
        states = [self.states[layer][start + 1 : end - 1] for layer in self.layers] if self.residues else None
        return Embedding(encoded, pooled, None if states is None else np.stack(states))


def logits(model: Encoder, items: Iterable[Encoded], *, token_budget: int | None = None) -> Iterator[FloatArray]:
    """Language-model logits ``[L, V]`` float32 of each record's residues, V in the alphabet's order.

    Raises:
        CapabilityError: the model has no language-model head.
    """
    model.require("logits")
    for _, batch in _batches(model, items, token_budget):
        with torch.inference_mode():
            values = model.head(model(batch))[:, : len(model.alphabet)].float().cpu().numpy()
        for start, end in batch.cu_seqlens.spans():
            yield values[start + 1 : end - 1].copy()


def _batches(
    model: Encoder, items: Iterable[Encoded], token_budget: int | None
) -> Iterator[tuple[list[Encoded], PackedBatch]]:
    device = model.word_embeddings.weight.device
    budget = TOKEN_BUDGET[device.type] if token_budget is None else token_budget
    if budget < 1:
        raise UsageError(f"a token budget must be at least 1, got {budget}")
    alphabet = model.alphabet
    for group in pack_by_budget(items, lambda item: item.tokens, budget):
        batch = pack([item.ids for item in group], bos=alphabet.bos, eos=alphabet.eos)
        yield group, batch.to(device)
