"""The cache of vectors: exact, checked, and shared by processes that may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import protea
from messages import check_message
from protea.embed.vector_cache import VectorCache
from protea.errors import OutputError, ProteaWarning

SHAPE = (2, 3, 5)
VECTORS = np.arange(30, dtype=np.float32).reshape(SHAPE)


def vectors_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.vectors"))


@given(hnp.arrays(np.float32, SHAPE), st.text(min_size=1))
def test_every_number_comes_back(vectors: np.ndarray, sequence: str) -> None:
    with TemporaryDirectory() as folder:
        cache = VectorCache(Path(folder), {"a": 1}, SHAPE)
        assert cache.get(sequence, 0, 0) is None
        cache.put(sequence, vectors)
        for place in np.ndindex(SHAPE[:2]):
            np.testing.assert_array_equal(cache.get(sequence, *place), vectors[place])
        assert cache.get(sequence + "A", 0, 0) is None
        assert VectorCache(Path(folder), {"a": 2}, SHAPE).get(sequence, 0, 0) is None


@given(st.integers(0, 2 * 3 * (16 + 20) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(place: int, change: int) -> None:
    with TemporaryDirectory() as folder:
        cache = VectorCache(Path(folder), {}, SHAPE)
        cache.put("MKT", VECTORS)
        (path,) = vectors_files(Path(folder))
        data = bytearray(path.read_bytes())
        data[place] ^= change
        path.write_bytes(data)
        row = place // 36
        with pytest.warns(ProteaWarning, match="damaged"):
            assert cache.get("MKT", row // 3, row % 3) is None


@pytest.mark.parametrize("size", [0, 35, 36, 215, 217])
def test_another_size_is_noticed(tmp_path: Path, size: int) -> None:
    cache = VectorCache(tmp_path, {}, SHAPE)
    cache.put("MKT", VECTORS)
    (path,) = vectors_files(tmp_path)
    path.write_bytes((path.read_bytes() + b"x")[:size])
    with pytest.warns(ProteaWarning) as caught:
        assert cache.get("MKT", 0, 0) is None
    check_message("vector_cache.damaged", str(caught[0].message), path=path)
    cache.put("MKT", VECTORS)
    np.testing.assert_array_equal(cache.get("MKT", 1, 2), VECTORS[1, 2])


def test_entries_in_each_others_place_are_noticed(tmp_path: Path) -> None:
    """Of another sequence, of other settings, and of another layer."""
    cache, other = VectorCache(tmp_path, {"x": 1}, SHAPE), VectorCache(tmp_path, {"x": 2}, SHAPE)
    cache.put("MKT", VECTORS)
    (path,) = vectors_files(tmp_path)
    data = path.read_bytes()
    other.put("MKT", VECTORS)
    cache.put("MKA", VECTORS)
    for wrong in vectors_files(tmp_path):
        if wrong != path:
            wrong.write_bytes(data)
    path.write_bytes(data[36:72] + data[:36] + data[72:])
    for one, sequence in [(other, "MKT"), (cache, "MKA"), (cache, "MKT")]:
        with pytest.warns(ProteaWarning, match="damaged"):
            assert one.get(sequence, 0, 0) is None


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        VectorCache(tmp_path / "file", {}, SHAPE)
    check_message("vector_cache.file", caught.value, path=tmp_path)


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    VectorCache(tmp_path, {}, SHAPE)
    (aside,) = tmp_path.glob("*/unfinished")
    for name, age in [("old", 2 * 24 * 60 * 60), ("new", 60)]:
        (aside / name).touch()
        os.utime(aside / name, (time.time() - age,) * 2)
    with pytest.warns(ProteaWarning, match="old: removed"):
        VectorCache(tmp_path, {}, SHAPE)
    assert [path.name for path in aside.iterdir()] == ["new"]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from protea.embed.vector_cache import VectorCache
shape = (4, 34, 1280)
cache = VectorCache(Path(sys.argv[1]), {}, shape)
print("ready", flush=True)
for number in range(int(sys.argv[2])):
    cache.put(f"M{number % 20}", np.full(shape, number % 20, np.float32))
"""


def check_processes(folder: Path, kills: int, writes: int) -> None:
    """Kill writers one after another, while another writes the same entries; every entry is whole."""
    environment = os.environ | {"PYTHONPATH": str(Path(protea.__file__).parents[1])}

    def start(count: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(folder), str(count)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    steady = start(writes)
    for number in range(kills):
        process = start(10**9)
        time.sleep(0.02 * number)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    steady.communicate()
    assert steady.returncode == 0
    cache = VectorCache(folder, {}, (4, 34, 1280))
    for number in range(20):
        for row in range(4):
            vector = cache.get(f"M{number}", row, 33)  # a warning would be an error
            assert vector is not None
            assert (vector == number).all()


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    check_processes(tmp_path, 1, 60)


@pytest.mark.long
def test_many_processes_killed_while_they_write(tmp_path: Path) -> None:
    check_processes(tmp_path, 12, 500)
