"""A file that goes back to its last commit, whatever happened after."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protea.embed.stores.rollback import RollbackFile

Operation = tuple[str, int, bytes]

operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 60), st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("truncate"), st.integers(0, 60), st.just(b"")),
        st.tuples(st.just("commit"), st.just(0), st.just(b"")),
    ),
    max_size=20,
)


def perform(file: RollbackFile, operation: Operation) -> None:
    kind, place, data = operation
    if kind == "write":
        file.seek(place)
        file.write(data)
    elif kind == "truncate":
        file.truncate(place)


@given(operations, st.booleans())
def test_goes_back_to_the_last_commit(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Operation], noted: bool
) -> None:
    """The process stops without a word after the last step; the last commit may not have been noted."""
    folder = tmp_path_factory.mktemp("rollback")
    path = folder / "data"
    file = RollbackFile(path, None)
    commits: list[tuple[tuple[int, int] | None, bytes]] = [(None, b"")]
    for number, step in enumerate(steps):
        if step[0] == "commit":
            file.forget_older()
            commits.append((file.commit(), path.read_bytes()))
            if number == len(steps) - 1 and not noted:
                commits.pop()
        else:
            perform(file, step)
    commit, expected = commits[-1]
    shutil.copytree(folder, folder / "copy")  # what a killed process leaves
    file.close()
    again = RollbackFile(folder / "copy" / "data", commit)
    assert (folder / "copy" / "data").read_bytes() == expected
    again.seek(0)
    again.write(b"goes on")
    again.close()
    shutil.rmtree(folder)


def test_a_torn_undo_record_is_ignored(tmp_path: Path) -> None:
    file = RollbackFile(tmp_path / "data", None)
    file.write(b"0123456789")
    commit = file.commit()
    file.seek(2)
    file.write(b"ab")
    file.close()
    undo = tmp_path / f"undo-{commit[0]}"
    whole = undo.read_bytes()
    undo.write_bytes(whole + whole[:-1])
    RollbackFile(tmp_path / "data", commit).close()
    assert (tmp_path / "data").read_bytes() == b"0123456789"


def test_a_failure_is_kept_for_check(tmp_path: Path) -> None:
    """A disk that is full, as a limit on file sizes; in a process of its own."""
    code = f"""
import errno, resource
from pathlib import Path
from protea.embed.stores.rollback import RollbackFile
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
file = RollbackFile(Path({str(tmp_path / "data")!r}), None)
file.write(b"x" * 60); file.check()
assert file.write(b"y" * 60) == 60
try:
    file.check()
except OSError as error:
    assert error.errno == errno.EFBIG, error
else:
    raise SystemExit("no error")
assert file.write(b"z") == 1 and file.deaf
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "data").stat().st_size <= 100
