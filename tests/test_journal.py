"""Work folders: locked against other processes, with a journal that is read back or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from messages import check_message
from protea.errors import OutputError, ResumeError
from protea.journal import JOURNAL, WorkFolder, differences

HOLD = """
import sys
from pathlib import Path
from protea.journal import WorkFolder
with WorkFolder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_journal_comes_back_after_a_kill(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with WorkFolder(output) as work:
        assert work.is_new
        assert work.read() is None
        work.commit({"done": 3})
    with WorkFolder(output) as work:
        assert not work.is_new
        assert work.read() == {"done": 3}
        (work.path / "part").mkdir()
        work.clear()
        assert [path.name for path in work.path.iterdir()] == ["lock"]
        work.remove()
    assert not list(tmp_path.iterdir())


def test_one_process_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match="out") as caught:
            WorkFolder(output)
        check_message("journal.locked", caught.value, tmp=tmp_path)
        holder.kill()
    with WorkFolder(output):
        pass  # a killed process holds no lock


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_journal_is_refused(tmp_path: Path, content: str) -> None:
    with WorkFolder(tmp_path / "out") as work:
        (work.path / JOURNAL).write_text(content)
        with pytest.raises(ResumeError, match=rf"out: .*{JOURNAL}.*--overwrite"):
            work.read()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="out"):
        WorkFolder(tmp_path / "absent" / "out")


def test_differences_of_weights() -> None:
    """Sums of files are long and say nothing; only that they differ counts."""

    def plan(models: dict[str, str]) -> dict[str, object]:
        values = {f"models {name} files model.safetensors": text * 64 for name, text in models.items()}
        return {**values, **{f"models {name} computed_in": "float32" for name in models}, "offset": 1}

    other_weights = differences(plan({"m": "a"}), plan({"m": "b"}))
    check_message("journal.other-weights", other_weights)
    assert differences(plan({"m": "a"}), plan({"m": "a", "n/x": "b"}) | {"offset": 2}) == (
        "models m -> m,n/x; offset 1 -> 2"
    )
    assert differences({"input": "a" * 64}, {"input": "b" * 64}) == "the input has changed"
    assert differences({"input": "a" * 64}, {}) == "the input has changed"


def test_differences_of_plans() -> None:
    assert differences({"a": 1, "b": [1, 2], "c": 0}, {"a": 1, "b": [1], "d": 0}) == (
        "b 1,2 -> 1; c 0 -> nothing; d nothing -> 0"
    )
