from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protea.data import token_table
from protea.data.token_table import Table, TableWriter, digests_of, flat_of, lengths_of, take, token_batch

here = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
texts = st.lists(st.text("ébc|/ ", min_size=0, max_size=2), max_size=30)


def write(folder: Path, ids: list[str], sequences: list[bytes], size: int = 7) -> Table:
    folder.mkdir(exist_ok=True)
    with TableWriter(folder) as writer:
        for start in range(0, len(ids), size):
            part = sequences[start : start + size]
            lengths = np.array([len(sequence) for sequence in part], np.int64)
            writer.write(token_batch([name.encode() for name in ids[start : start + size]], lengths, b"".join(part)))
        writer.leave_out([b"c", b"skipped"])
    return Table(folder)


def digests(ids: list[str]) -> np.ndarray:
    return digests_of(name.encode() for name in ids)


def test_digests_are_the_same_on_every_machine() -> None:
    """BLAKE2b of "abc" with 16 bytes, from another program: b2sum -l 128."""
    assert digests_of([b"abc"]).tobytes().hex() == "cf4ab791c62b8d2b2109c90275287816"


@here
@given(texts, st.integers(1, 7))
def test_an_index_is_a_dictionary(tmp_path: Path, ids: list[str], size: int) -> None:
    """Ids may be repeated; an id is found at its first row."""
    table = write(tmp_path / "t", ids, [b""] * len(ids), size)
    first = {name: row for row, name in reversed(list(enumerate(ids)))}
    wanted = [*ids, "absent", "skipped"]
    assert table.find(digests(wanted)).tolist() == [first.get(name, -1) for name in wanted]
    assert table.was_left_out(digests(wanted)).tolist() == [name in ("c", "skipped") for name in wanted]
    pairs = table.repeated()
    assert pairs[:, 1].tolist() == [row for row, name in enumerate(ids) if first[name] != row]
    assert all(ids[earlier] == ids[later] and earlier < later for earlier, later in pairs.tolist())


def test_digests_that_end_in_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's byte strings ignore zeros at their end, which must not make different ids equal."""
    known = {b"a": bytes(16), b"b": b"\1" + bytes(15), b"c": b"\1" + bytes(14) + b"\1", b"d": bytes(15) + b"\1"}
    known[b"skipped"] = bytes(14) + b"\1\0"
    monkeypatch.setattr(token_table, "digests_of", lambda ids: np.array([known[name] for name in ids], "S16"))
    table = write(tmp_path / "t", [*"dcbab"], [b""] * 5)
    assert table.find(np.array([known[name] for name in (b"a", b"b", b"c", b"d")], "S16")).tolist() == [3, 2, 1, 0]
    assert table.repeated().tolist() == [[2, 4]]


@here
@given(texts, st.integers(1, 7))
def test_tables_give_back_what_they_got(tmp_path: Path, ids: list[str], size: int) -> None:
    sequences = [bytes([n % 30]) * (n % 5) for n in range(len(ids))]
    table = write(tmp_path / "t", ids, sequences, size)
    assert len(table) == len(ids)
    batches = list(table.batches())
    assert [first for first, _ in batches] == list(range(0, len(ids), size))
    assert [name for _, batch in batches for name in batch.column("id").to_pylist()] == ids
    assert [tokens for _, batch in batches for tokens in batch.column("tokens").to_pylist()] == sequences
    assert [first for first, _ in table.batches(1)] == [first for first, _ in batches[1:]]
    assert table.names(np.arange(len(ids))[::-1]) == ids[::-1]
    for first, batch in batches[:1]:
        order = np.arange(len(batch))[::-1]
        turned = take(batch, order)
        expected = sequences[first : first + len(batch)][::-1]
        assert turned.column("tokens").to_pylist() == expected
        assert lengths_of(turned).tolist() == [len(tokens) for tokens in expected]
        assert flat_of(turned.column("tokens")).tobytes() == b"".join(expected)
