from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import FRAMES, build, make_sources

from protea.data.loader import Loader, Packing, Position, TrainingBatch, first_fit
from protea.data.sampler import CROPS, Sampler
from protea.data.training_store import StoreSplit
from protea.errors import UsageError

PACKING = Packing(tokens=128, window=3, block=17)


@pytest.fixture
def split(tmp_path: Path) -> StoreSplit:
    return build(make_sources(tmp_path, 50, most=4), tmp_path / "store").split("train")


def loader(split: StoreSplit, **options: object) -> Loader:
    sampler = Sampler(split, seed=5, max_tokens=60)
    return Loader(sampler, **{"packing": PACKING, "workers": 0, **options})  # type: ignore[arg-type]


def same(batch: TrainingBatch, expected: TrainingBatch) -> bool:
    return (
        torch.equal(batch.inputs.input_ids, expected.inputs.input_ids)
        and torch.equal(batch.inputs.cu_seqlens.offsets, expected.inputs.cu_seqlens.offsets)
        and torch.equal(batch.targets, expected.targets)
        and torch.equal(batch.rows, expected.rows)
        and batch.index.tolist() == expected.index.tolist()
        and batch.position == expected.position
    )


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 90), st.integers(1, 6))
def test_first_fit(sizes: list[int], tokens: int, window: int) -> None:
    packs = first_fit(sizes, Packing(tokens=tokens, window=window))
    assert sorted(number for pack in packs for number in pack) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in pack) <= tokens for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)


def test_batches_hold_what_was_drawn(split: StoreSplit) -> None:
    alphabet = split.alphabet
    work = loader(split)
    seen = []
    tokens = 0
    for batch in work.batches(epochs=1):
        draws = work.sampler.draw(0, batch.index)
        spans = batch.inputs.cu_seqlens.spans()
        assert batch.inputs.input_ids.numel() <= PACKING.tokens
        tokens += batch.inputs.input_ids.numel()
        for number, (start, end) in enumerate(spans):
            target = batch.targets[start:end].numpy()
            assert target[0] == alphabet.bos
            assert target[-1] == alphabet.eos
            residues = split.residues(int(draws.sequence[number]))
            first = int(draws.offset[number])
            assert (target[1:-1] == residues[first : first + len(target) - 2]).all()
        differs = batch.inputs.input_ids != batch.targets
        assert set(differs.nonzero().flatten().tolist()) <= set(batch.rows.tolist())
        assert (batch.rows.diff() > 0).all()
        assert batch.inputs.cu_seqlens.max_length == max(end - start for start, end in spans)
        assert (batch.inputs.input_ids.dtype, batch.rows.dtype) == (torch.int64, torch.int64)
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(split.clusters))
    assert work.padding == pytest.approx(1 - tokens / (work.packs * PACKING.tokens))


@pytest.mark.parametrize("crop", ["random-tokens", "head-tokens"])
def test_windows_without_bos_or_eos(split: StoreSplit, crop: str) -> None:
    sampler = Sampler(split, max_tokens=20, crop=crop)  # type: ignore[arg-type]
    work = Loader(sampler, packing=PACKING, workers=0)
    kinds = set()
    for batch in work.batches(epochs=3):
        draws = sampler.draw(batch.epoch, batch.index)
        for number, (start, end) in enumerate(batch.inputs.cu_seqlens.spans()):
            target = batch.targets[start:end].numpy()
            bos, eos = bool(draws.bos[number]), bool(draws.eos[number])
            assert (target[0] == split.alphabet.bos) == bos
            assert (target[-1] == split.alphabet.eos) == eos
            residues = split.residues(int(draws.sequence[number]))[int(draws.offset[number]) :]
            inner = target[bos : len(target) - eos]
            assert (inner == residues[: len(inner)]).all()
            kinds.add((bos, eos))
    assert kinds >= ({(True, False), (False, False), (False, True)} if crop == "random-tokens" else {(True, False)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.sampled_from(sorted(FRAMES)),
    st.sampled_from(CROPS),
    st.integers(3, 90),
    st.integers(0, 100),
    st.integers(0, 2**63),
)
def test_targets_are_cut_out_of_framed_sequences(
    split: StoreSplit, frame: str, crop: str, most: int, epoch: int, seed: int
) -> None:
    """Of a sequence in its frame, or its residues' window in the frame; masks spare the frame, whatever it is."""
    split.alphabet = FRAMES[frame]
    around = split.alphabet.frame
    sampler = Sampler(split, seed=seed, max_tokens=most, crop=crop)  # type: ignore[arg-type]
    work = Loader(sampler, packing=PACKING, workers=0)
    seen: list[int] = []
    for pack in work.plan(epoch, 0):
        batch = work.batch(epoch, pack, Position())
        for number, (start, end) in enumerate(batch.inputs.cu_seqlens.spans()):
            target = batch.targets[start:end].tolist()
            residues = split.residues(int(pack.sequence[number]))
            framed = around.around(residues).tolist()
            assert len(target) == min(most, len(framed))
            if crop in {"random", "head"}:
                first = int(pack.offset[number])
                room = most - len(framed) + len(residues)
                assert target == around.around(residues[first : first + room]).tolist()
            else:
                first = int(pack.offset[number]) + (around.bos is not None and not pack.bos[number])
                assert target == framed[first : first + most]
            assert crop.startswith("random") or first == 0
        predicted = batch.targets[batch.rows]
        places = zip(batch.inputs.cu_seqlens.spans(), batch.wanted.cu_seqlens.spans(), strict=True)
        for (start, end), (first, last) in places:
            assert all(start <= row < end for row in batch.rows[first:last].tolist())
        assert not any((predicted == special).any() for special in around.specials)
        seen += pack.index.tolist()
    assert sorted(seen) == list(range(PACKING.block))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 0), (3, 2), (4, 1)])
def test_the_same_packs_for_any_number_of_ranks_and_workers(split: StoreSplit, world: int, workers: int) -> None:
    plain = list(islice(loader(split).batches(), 24))
    ranks = [islice(loader(split, rank=n, world=world, workers=workers).batches(), 24 // world) for n in range(world)]
    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
    for expected, batch in zip(plain, dealt, strict=True):
        assert expected.index.tolist() == batch.index.tolist()
        assert torch.equal(expected.inputs.input_ids, batch.inputs.input_ids)
        assert torch.equal(expected.rows, batch.rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
@given(st.integers(0, 20), st.sampled_from([1, 2, 3]))
def test_a_run_continues_from_any_position(split: StoreSplit, done: int, world: int) -> None:
    uninterrupted = list(islice(loader(split).batches(), done * world + 12))
    position = Position()
    if done:
        *_, last = islice(loader(split, rank=world - 1, world=world).batches(), done)
        position = Position(*list(last.position))
    continued = islice(loader(split, workers=1).batches(start=position), 12)
    for expected, batch in zip(uninterrupted[done * world :], continued, strict=True):
        assert same(expected, batch)


def test_epochs_end(split: StoreSplit) -> None:
    work = loader(split)
    epochs = [batch.epoch for batch in work.batches(epochs=2)]
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1}
    *_, last = loader(split, workers=2).batches(epochs=2)
    assert last.position == Position(2, 0, 0)
    assert list(loader(split).batches(last.position, epochs=2)) == []


def test_closing_early_stops_the_threads(split: StoreSplit) -> None:
    import threading

    before = threading.active_count()
    batches = loader(split, workers=2).batches()
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_errors_of_workers_arrive(split: StoreSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    work = loader(split, workers=2)

    def fails(*_: object) -> None:
        raise OSError("the disk went")

    monkeypatch.setattr(work, "batch", fails)
    with pytest.raises(OSError, match="the disk went"):
        list(work.batches(epochs=1))


def test_moved_batches(split: StoreSplit) -> None:
    batch = next(loader(split).batches())
    assert same(batch, batch.to("cpu"))
    assert same(batch, batch.to("meta").__class__(**vars(batch)))


def test_invalid_values(split: StoreSplit) -> None:
    with pytest.raises(UsageError, match="rank must be from 0 to world-1, got rank 2 of 2"):
        loader(split, rank=2, world=2)
    with pytest.raises(UsageError, match="cannot hold a sequence of 60"):
        loader(split, packing=Packing(tokens=59))
    with pytest.raises(UsageError, match="window must be at least 1, got 0"):
        Packing(window=0)
    with pytest.raises(UsageError, match="workers must be at least 0"):
        loader(split, workers=-1)
    with pytest.raises(IndexError, match="3 blocks, not 4"):
        loader(split).plan(0, 3)


def test_masks_and_draws_are_the_same_on_every_machine(split: StoreSplit) -> None:
    batch = next(loader(split).batches())
    assert batch.rows.tolist()[:6] == HIDDEN
    assert batch.index.tolist() == INDEX


HIDDEN = [1, 4, 8, 10, 18, 21]
INDEX = [4, 5, 6]
