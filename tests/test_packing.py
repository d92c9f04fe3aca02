"""Packs hold every item once, in order, within the budget."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protea.alphabet import Frame
from protea.packing import CuSeqlens, PackedRows, pack, pack_by_budget

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=20)


@given(lengths)
def test_boundaries(sizes: list[int]) -> None:
    cu = CuSeqlens.from_lengths(sizes)
    assert [end - start for start, end in cu.spans()] == sizes
    assert cu.spans()[0][0] == 0
    assert cu.spans()[-1][1] == sum(sizes)
    assert cu.max_length == max(sizes)
    assert cu.lengths.tolist() == sizes
    assert cu.offsets.dtype == cu.host_offsets.dtype == torch.int32


@pytest.mark.parametrize("sizes", [[], [0], [3, 0, 2]])
def test_a_sequence_without_tokens_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"\[.*\]"):
        CuSeqlens.from_lengths(sizes)


@given(lengths, st.data())
def test_rows_know_their_sequences(sizes: list[int], data: st.DataObject) -> None:
    cu = CuSeqlens.from_lengths(sizes)
    chosen = [data.draw(st.lists(st.integers(*(start, end - 1)), max_size=9)) for start, end in cu.spans()]
    rows = PackedRows.of(np.array([row for part in chosen for row in part], dtype=np.int64), cu)
    assert len(rows) == sum(map(len, chosen))
    assert [rows.index[start:end].tolist() for start, end in rows.cu_seqlens.spans()] == chosen
    assert rows.cu_seqlens.max_length == max(map(len, chosen))
    assert (rows.index.dtype, rows.cu_seqlens.host_offsets.dtype) == (torch.int64, torch.int32)
    moved = rows.to("meta")
    assert moved.index.is_meta
    assert moved.cu_seqlens.offsets.is_meta
    assert moved.cu_seqlens.host_offsets is rows.cu_seqlens.host_offsets


@pytest.mark.parametrize("chosen", [[5, 4], [-1, 2], [3, 9], [9]])
def test_rows_in_no_order_of_sequences_are_refused(chosen: list[int]) -> None:
    with pytest.raises(ValueError, match="sequence by sequence"):
        PackedRows.of(np.array(chosen), CuSeqlens.from_lengths([5, 4]))


@given(lengths)
def test_pack_concatenates_framed_sequences(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(4, 24, size).astype(np.uint8) for size in sizes]
    batch = pack([Frame(0, 2).around(sequence) for sequence in sequences])
    assert len(batch) == len(sizes)
    assert batch.input_ids.dtype == torch.int64
    for sequence, (start, end) in zip(sequences, batch.cu_seqlens.spans(), strict=True):
        assert batch.input_ids[start:end].tolist() == [0, *sequence.tolist(), 2]
    positions = [i for size in sizes for i in range(size + 2)]
    assert batch.positions().tolist() == positions
    assert batch.sequence_index().tolist() == [b for b, size in enumerate(sizes) for _ in range(size + 2)]
    bare = pack(sequences)
    assert bare.input_ids.tolist() == np.concatenate(sequences).tolist()


@given(st.lists(st.integers(1, 100)), st.integers(1, 150))
def test_groups_keep_order_and_budget(sizes: list[int], budget: int) -> None:
    groups = list(pack_by_budget(sizes, lambda size: size, budget))
    assert [size for group in groups for size in group] == sizes
    for group in groups:
        assert group
        assert sum(group) <= budget or len(group) == 1
    for group, following in pairwise(groups):
        assert sum(group) + following[0] > budget


def test_grouping_is_lazy() -> None:
    endless = iter(int, 1)
    assert next(pack_by_budget(endless, lambda _: 1, 3)) == [0, 0, 0]


def test_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="0"):
        list(pack_by_budget([1], lambda size: size, 0))
