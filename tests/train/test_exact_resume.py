"""Runs that end at any moment and continue to the same bits as an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protea.errors import FinishedError
from protea.train.loop import Outcome, pretrain
from protea.train.recipe import Recipe
from protea.train.run_checkpoints import choose
from trials import Killed, Witness, assert_same, finish, finished, make_store, metrics, recipe, start, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        ({"optimizer": {"name": "muon"}}, 7),
        pytest.param({}, 1, marks=pytest.mark.long),
        pytest.param({"run": {"precision": "bf16-mixed"}, "optimizer": {"name": "muon"}}, 6, marks=pytest.mark.long),
        pytest.param(
            {"run": {"precision": "fp16-mixed", "recompute": True}, "log": {"every": 3}}, 6, marks=pytest.mark.long
        ),
    ],
)
def test_stopped_wherever_it_asks(tmp_path: Path, store: Path, changes: dict[str, Any], every: int) -> None:
    """Between packs of a step, between steps, and between packs of a validation."""
    told = recipe(store, batch={"tokens": 192}, **changes)
    whole = Witness()
    assert pretrain(told, tmp_path / "whole", whole) == Outcome(4, finished=True)
    for number in range(1, whole.asked + 1, every):
        folder = tmp_path / f"stopped-{number}"
        outcome = pretrain(told, folder, Witness(number))
        assert not outcome.finished
        again = Witness()
        assert pretrain(told, folder, again) == Outcome(4, finished=True)
        assert (f"continues after step {outcome.step}" in again.notes) == (outcome.step > 0)
        assert_same(folder, tmp_path / "whole")


Ends = list[tuple[int, bool, bool]]


@pytest.mark.long
@settings(max_examples=8)
@given(ends=st.lists(st.tuples(st.integers(1, 14), st.booleans(), st.booleans()), min_size=1, max_size=4))
def test_any_number_of_ends(whole: tuple[Recipe, Path], ends: Ends) -> None:
    assert_ends_do_not_matter(whole, ends)


def test_two_kills(whole: tuple[Recipe, Path]) -> None:
    assert_ends_do_not_matter(whole, [(9, True, True), (4, True, False)])


def assert_ends_do_not_matter(whole: tuple[Recipe, Path], ends: Ends) -> None:
    """Each end: the number of packs before it, whether it is a kill, and whether the kill leaves torn files."""
    told, expected = whole
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        for asked, kill, torn in ends:
            try:
                pretrain(told, folder, Witness(asked, kill=kill))
            except Killed:
                if torn:
                    tear(folder)
            except FinishedError:
                break  # the run before reached its end
        else:
            with suppress(FinishedError):
                assert train(told, folder) == Outcome(4, finished=True)
        assert_same(folder, expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, store: Path) -> tuple[Recipe, Path]:
    return finished(store, tmp_path_factory.mktemp("whole") / "run")


def tear(folder: Path) -> None:
    """Half a line of metrics, half a checkpoint, and one that was being removed."""
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "loss": 3.')
    for name in (".step-000000002", ".removed-step-000000002"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "__0_0.distcp").write_bytes(bytes(100))


def test_an_interrupted_validation_is_repeated(tmp_path: Path, whole: tuple[Recipe, Path]) -> None:
    """Its checkpoint was written without the result, and is written again; its line comes once, whatever happens."""
    told, expected = whole

    class InValidation(Witness):
        """Stops between the packs of the validation after step 2."""

        def stop(self) -> bool:
            return len(metrics(folder)) == 2 and super().stop()

    class Validated(Witness):
        """Killed when the result is told."""

        def log(self, step: int, values: Mapping[str, float]) -> None:
            raise Killed

    folder = tmp_path / "run"
    assert pretrain(told, folder, InValidation(2)) == Outcome(2, finished=False)
    assert choose(folder, "2").loss is None
    with pytest.raises(Killed):
        pretrain(told, folder, Validated())
    assert [line["step"] for line in metrics(folder)] == [1, 2, 2]
    train(told, folder)
    assert_same(folder, expected)
    assert choose(folder, "2").loss == choose(expected, "2").loss is not None


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_processes(tmp_path: Path, store: Path, seed: int) -> None:
    """SIGKILL at random moments of training, and while a checkpoint is written."""
    told = recipe(store, run={"steps": 40}, save={"every": 5}, validation={"every": 10})
    train(told, tmp_path / "whole")
    folder = tmp_path / "run"
    rng = random.Random(seed)
    killed = 0
    for number, step in enumerate(sorted(rng.sample(range(5, 35), 2))):
        process = start(told, folder)
        saving = number % 2 == 0
        wait(process, lambda step=step: told_steps(folder) > step)  # type: ignore[misc]
        if saving:
            wait(process, lambda: any(folder.glob("checkpoints/.step-*")), 0.0)
        else:
            time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed
    code, err = finish(start(told, folder))
    assert code == 0, err
    assert "continues after step" in err
    assert_same(folder, tmp_path / "whole")
    assert not list(folder.glob("checkpoints/.*"))


def wait(process: subprocess.Popen[str], there: Callable[[], bool], pause: float = 0.002) -> None:
    """Until it is, or the process has ended."""
    while process.poll() is None and not there():
        time.sleep(pause)


def told_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of PyTorch
def test_compiled(tmp_path: Path, store: Path) -> None:
    told = recipe(store, run={"compile": True, "steps": 3}, model={"num_hidden_layers": 1}, validation={"every": None})
    whole = Witness()
    pretrain(told, tmp_path / "whole", whole)
    assert not pretrain(told, tmp_path / "run", Witness(whole.asked // 2)).finished
    train(told, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")
