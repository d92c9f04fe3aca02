from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protea.data import token_table as tables
from protea.data.token_table import IdIndex, Table, TableWriter, TokenRows, keys_of

here = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def index(keys: list[tuple[int, int]], folder: Path) -> IdIndex:
    return IdIndex.build(np.array(keys, np.uint64).reshape(-1, 2), folder)


@here
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40), st.integers(1, 50))
def test_an_index_is_a_dictionary(tmp_path: Path, keys: list[tuple[int, int]], part: int) -> None:
    """Of keys that share half their bits, and in parts."""
    keys = [(high << 62, low) for high, low in keys]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_PART", part)
        found = index(keys, tmp_path / "index")
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        wanted = [(high << 62, low) for high in range(4) for low in range(4)]
        assert found.find(np.array(wanted, np.uint64)).tolist() == [first.get(key, -1) for key in wanted]
        again = [row for row, key in enumerate(keys) if first[key] != row]
        pairs = found.repeated()
        assert sorted(pairs[:, 1].tolist()) == again
        assert all(keys[one] == keys[other] and one < other for one, other in pairs.tolist())


def test_keys_are_the_same_on_every_machine() -> None:
    """BLAKE2b of "abc" with 16 bytes, from another program: b2sum -l 128."""
    assert [hex(word) for word in keys_of([b"abc"])[0].tolist()] == ["0xcf4ab791c62b8d2b", "0x2109c90275287816"]


texts = st.lists(st.text("ébc|/ ", min_size=0, max_size=5), max_size=30)


@here
@given(texts, st.integers(1, 7), st.randoms())
def test_tables_give_back_what_they_got(tmp_path: Path, ids: list[str], size: int, rng: object) -> None:
    sequences = [bytes([n % 30]) * (n % 5) for n in range(len(ids))]
    with TableWriter(tmp_path / "t") as writer:
        for start in range(0, len(ids), size):
            part = sequences[start : start + size]
            lengths = np.array([len(each) for each in part], np.int64)
            names = [name.encode() for name in ids[start : start + size]]
            writer.write(TokenRows.of(names, lengths, b"".join(part)), keys_of(names))
    table = Table(tmp_path / "t")
    assert len(table) == len(ids)
    found = list(table.batches())
    assert [name for batch in found for name in batch.ids.to_pylist()] == ids
    assert [each for batch in found for each in batch.tokens.to_pylist()] == sequences
    assert [batch.first for batch in found] == list(range(0, len(ids), size))
    assert [batch.flat().tobytes() for batch in table.batches(1)] == [b.flat().tobytes() for b in found[1:]]
    assert [length for _, lengths in table.lengths() for length in lengths] == [len(each) for each in sequences]
    assert table.keys().tolist() == keys_of(name.encode() for name in ids).tolist()
    rows = np.arange(len(ids))[::-1]
    assert table.names(rows) == ids[::-1]
    if found:
        order = np.arange(len(found[0]))[::-1]
        assert found[0].take(order).tokens.to_pylist() == sequences[: len(order)][::-1]
        assert found[0].take(order).lengths().tolist() == [len(each) for each in sequences[: len(order)][::-1]]
