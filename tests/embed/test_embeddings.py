"""What files of embeddings do not show: working ahead, running out of memory, groups of records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import LoadModel
from protea.embed.embeddings import Asked, Embedding, embed
from protea.embed.prefetch import prefetch
from protea.embed.prepare import EncodedRecord, RecordPolicies, SeenIds, prepare
from protea.embed.survey import groups
from protea.errors import DeviceError
from protea.fasta import Record
from protea.infer.runner import Runner
from protea.packing import PackedBatch


def encoded(sequences: list[str], model: torch.nn.Module, **policies: str) -> list[EncodedRecord]:
    records = [Record(str(n), "", sequence, f"record {n}") for n, sequence in enumerate(sequences)]
    items = prepare(records, model, RecordPolicies(**policies), SeenIds())  # type: ignore[arg-type]
    return [item.encoded for item in items if item.encoded is not None]


def test_prefetch_keeps_order_and_works_ahead() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = prefetch(numbers(), 2, threading.Event())
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 5, "one handed out, two waiting, one in hand, and the next begun"
    assert list(ahead) == list(range(1, 100))


def test_prefetch_passes_exceptions_on_in_their_place() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    ahead = prefetch(numbers(), 3, threading.Event())
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="two"):
        next(ahead)


def test_closing_prefetch_ends_its_thread_and_its_source() -> None:
    closed = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    ahead = prefetch(numbers(), 2, threading.Event())
    next(ahead)
    ahead.close()
    assert closed.is_set()
    assert threading.active_count() == before


@pytest.mark.parametrize("long", ["truncate", "window"])
def test_out_of_memory_halves_the_pack(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch, long: str) -> None:
    model = load_small("esm1nv").module
    sequences = ["ACDEF" * 20, "MKT" * 30, "G", "ACDEFGHIKLMNPQRSTVWY" * 60, "WYV" * 10]
    records = encoded(sequences, model, long=long)
    asked = Asked(layers=(0, 3), poolings=("mean", "bos"), residues=True)

    def results() -> list[Embedding]:
        return list(embed(Runner(model, 100_000), records, asked))

    expected = results()
    forward = type(model).forward
    sizes: list[int] = []

    def limited(
        self: torch.nn.Module,
        batch: PackedBatch,
        on_hidden: Callable[[int, Tensor], None],
        on_attention: None,
        rows: None,
    ) -> Tensor:
        sizes.append(batch.input_ids.numel())
        if batch.input_ids.numel() > 600:
            on_hidden(0, torch.zeros(batch.input_ids.numel(), 40))  # some layers were there already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, on_hidden)

    monkeypatch.setattr(type(model), "forward", limited)
    for ours, theirs in zip(results(), expected, strict=True):
        assert ours.encoded is theirs.encoded
        assert ours.residues is not None
        assert theirs.residues is not None
        np.testing.assert_allclose(ours.residues, theirs.residues, rtol=0, atol=1e-5)
        for name in ("mean", "bos"):
            np.testing.assert_allclose(ours.pooled[name], theirs.pooled[name], rtol=0, atol=1e-5)
    assert max(sizes) > 600
    records = encoded(["M" * 700], load_small("esm2").module, long="full")
    rotary = load_small("esm2").module
    monkeypatch.setattr(type(rotary), "forward", limited)
    with pytest.raises(DeviceError, match=r"record 0: 702 tokens at once do not fit .* \(window\)"):
        next(embed(Runner(rotary, 100_000), records, asked))


def test_groups_begin_anew_at_any_of_their_beginnings(load_small: LoadModel) -> None:
    model = load_small("esm1nv").module
    rng = np.random.default_rng(0)
    sequences = ["M" * int(n) for n in rng.integers(1, 700, 80)] + [""] * 3
    records = [Record(str(n), "", sequence, "") for n, sequence in enumerate(sequences)]
    items = list(prepare(records, model, RecordPolicies(long="window"), SeenIds()))
    whole = list(groups(items, 1000))
    assert [item for group in whole for item in group.items] == items
    for group in whole:
        rest = groups(items[group.records :], 1000, number=group.number + 1, records=group.records)
        assert list(rest) == whole[group.number + 1 :]
