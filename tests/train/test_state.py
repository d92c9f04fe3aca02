"""RunCheckpoints of runs: whole or not there, kept by rule, and checked before anything in them is believed."""

from __future__ import annotations

import json
import pickle
import random
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from hostile import live, torch_zip
from protea.errors import CheckpointError, FinishedError, OutputError, ResumeError
from protea.train.loop import Outcome, pretrain
from protea.train.recipe import Recipe, SaveSettings
from protea.train.run_checkpoints import (
    STATE,
    RunCheckpoints,
    choose,
    read_saved,
    read_verified,
    step_folders,
)
from protea.train.run_export import average, export
from trials import Witness, assert_same, finished, make_store, metrics, mostly_long, recipe, reseal, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, store: Path) -> tuple[Recipe, Path]:
    return finished(store, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(tmp_path: Path, whole: tuple[Recipe, Path]) -> tuple[Recipe, Path]:
    """A copy of it, to be damaged."""
    shutil.copytree(whole[1], tmp_path / "run")
    return whole[0], tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-000000004"


# --- writing -----------------------------------------------------------------------------------------------------


def save(checkpoints: RunCheckpoints, step: int, loss: float | None = None) -> None:
    """A checkpoint of a tensor that tells its step."""
    values = {"validation_loss": loss}
    checkpoints.save(step, {"x": torch.full((500, 100), float(step))}, values)


def test_a_reader_sees_only_complete_checkpoints(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", SaveSettings(newest=100))
    done = threading.Event()
    seen: list[int] = []
    wrong: list[str] = []

    def read() -> None:
        while not done.is_set():
            for folder in step_folders(tmp_path / "checkpoints"):
                saved = read_verified(folder)
                if torch.all(saved.tensors()["x"] == saved.step):
                    seen.append(saved.step)
                else:
                    wrong.append(str(saved))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 16):
        save(checkpoints, step)
    checkpoints.wait()
    done.set()
    reader.join()
    assert not wrong
    assert len(set(seen)) > 5


def test_a_checkpoint_is_of_the_moment_it_was_taken(tmp_path: Path) -> None:
    """Training continues while it is written."""
    checkpoints = RunCheckpoints(tmp_path, SaveSettings())
    weights = torch.ones(1000, 1000)
    checkpoints.save(1, {"x": weights}, {"validation_loss": None})
    weights.zero_()
    checkpoints.wait()
    assert torch.all(read_saved(tmp_path / "step-000000001").tensors()["x"] == 1)


@pytest.mark.parametrize(
    "keep",
    [
        SaveSettings(newest=2, best=2, keep_every=5),
        SaveSettings(newest=1, best=0),
        SaveSettings(newest=1, best=1),
        SaveSettings(newest=3),
    ],
)
def test_which_are_kept(tmp_path: Path, keep: SaveSettings) -> None:
    checkpoints = RunCheckpoints(tmp_path, keep)
    rng = random.Random(3)
    losses: dict[int, float | None] = {}
    for step in range(1, 13):
        losses[step] = rng.random() if step % 2 else None
        save(checkpoints, step, losses[step])
        checkpoints.wait()
        assert checkpoints.failure(step) is None
        validated = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        expected = set(list(losses)[-keep.newest :]) | {step for _, step in validated[: keep.best]}
        if keep.keep_every:
            expected |= {step for step in losses if step % keep.keep_every == 0}
        assert {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()} == expected


def test_damaged_checkpoints_do_not_displace_intact_ones(tmp_path: Path) -> None:
    """The run went back to step 10: what is of a later one is of no use."""
    for step in (10, 20):
        save(checkpoints := RunCheckpoints(tmp_path, SaveSettings(newest=2)), step)
        checkpoints.wait()
    (tmp_path / "step-000000020" / ".metadata").unlink()
    save(checkpoints := RunCheckpoints(tmp_path, SaveSettings(newest=1, best=0)), 15)
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000015"]


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "step-000000001.bak").mkdir()
    (tmp_path / "step-two").mkdir()
    (tmp_path / "step-000000003").write_text("a file")
    save(checkpoints := RunCheckpoints(tmp_path, SaveSettings(newest=1)), 5)
    checkpoints.wait()
    assert [path.name for path in step_folders(tmp_path)] == ["step-000000005"]
    assert len(list(tmp_path.iterdir())) == 4


# --- damage ------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    rng = random.Random(1)
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    print(f"flips bit {bit} of byte {place} in {path}")
    content[place] ^= 1 << bit
    path.write_bytes(content)


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: Final[list[tuple[str, Callable[[Path], Any]]]] = [
    ("__0_0.distcp", flip),
    ("__0_0.distcp", cut),
    ("__0_0.distcp", Path.unlink),
    (".metadata", flip),
    (".metadata", Path.unlink),
    (STATE, flip),
    (STATE, cut),
    (STATE, Path.unlink),
    (STATE, write("")),
    (STATE, write("[" * 100_000)),
    (STATE, write("[]")),
    (STATE, write("{}")),
]


@pytest.mark.parametrize(("name", "damage"), mostly_long(DAMAGES, quick={0, 2, 5, 8}))
def test_a_damaged_one_is_skipped(
    run: tuple[Recipe, Path], whole: tuple[Recipe, Path], name: str, damage: Callable[[Path], Any]
) -> None:
    told, folder = run
    damage(newest(folder) / name)
    witness = Witness()
    assert pretrain(told, folder, witness) == Outcome(4, finished=True)
    assert len(witness.notes) == 2
    assert witness.notes[0].startswith(str(newest(folder)))
    assert witness.notes[0].endswith("; skipped")
    assert witness.notes[1] == "continues after step 2"
    assert_same(folder, whole[1])


def test_state_is_read_back_bit_by_bit(run: tuple[Recipe, Path]) -> None:
    """Every flipped bit of ``state.json`` is found, numbers in it included."""
    path = newest(run[1]) / STATE
    content = path.read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(content)), 200):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with suppress(CheckpointError):
            # Blanks between values carry nothing.
            assert read_saved(path.parent).values == json.loads(content)
    path.write_bytes(content)
    assert read_saved(path.parent).step == 4


def test_all_checkpoints_damaged(run: tuple[Recipe, Path]) -> None:
    told, folder = run
    for path in folder.glob("checkpoints/*/__0_0.distcp"):
        cut(path)
    witness = Witness()
    with pytest.raises(ResumeError, match=r"run/checkpoints: "):
        pretrain(told, folder, witness)
    assert len(witness.notes) == 2
    shutil.rmtree(folder / "checkpoints")
    assert train(told, folder).finished


def test_export_ignores_damage_to_other_checkpoints(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, folder = run
    (newest(folder) / STATE).unlink()
    assert export(folder, tmp_path / "model", which="2").step == 2
    for which in ("newest", "best", "4"):
        with pytest.raises(CheckpointError, match=r"step-000000004/state\.json: .*No such file"):
            export(folder, tmp_path / "other", which=which)
    with pytest.raises(CheckpointError, match=r"step-000000004/state.json"):
        average(folder, tmp_path / "other", last=1)
    for which in ("3", "-4", "last", "", "²"):
        with pytest.raises(ResumeError, match=r"newest, best, .* 2, 4"):
            choose(folder, which)
    assert not (tmp_path / "other").exists()


# --- malice ------------------------------------------------------------------------------------------------------


LIVE: Final = list(live(Path("/nowhere")))


@pytest.mark.parametrize("name", mostly_long(LIVE, quick=range(3)))
def test_pickles_run_nothing(run: tuple[Recipe, Path], tmp_path: Path, name: str) -> None:
    told, folder = run
    marker = tmp_path / "marker"
    content = live(marker)[name]
    (newest(folder) / ".metadata").write_bytes(content)
    reseal(newest(folder))
    read_verified(newest(folder))
    with pytest.raises(CheckpointError, match=r"\.metadata.*(which no checkpoint needs|holds an object of)"):
        export(folder, tmp_path / "model")
    if name == LIVE[0]:
        with pytest.raises(CheckpointError, match=r"\.metadata.*(which no checkpoint needs|holds an object of)"):
            train(told, folder)
    assert not marker.exists()
    with suppress(Exception):
        pickle.loads(content)
    assert marker.exists()


def test_pytorch_would_run_them(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    marker = tmp_path / "marker"
    (newest(run[1]) / ".metadata").write_bytes(live(marker)["os.system"])
    with suppress(Exception):
        FileSystemReader(newest(run[1])).read_metadata()
    assert marker.exists()


def test_pickles_in_pieces_run_nothing(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    told, folder = run
    marker = tmp_path / "marker"
    data = torch_zip(live(marker)["os.system"])
    with (newest(folder) / "__0_0.distcp").open("ab") as stream:
        at = stream.tell()
        stream.write(data)
    described = pickle.loads((newest(folder) / ".metadata").read_bytes())  # our own
    for info in described.storage_data.values():
        info.offset, info.length = at, len(data)
        break
    (newest(folder) / ".metadata").write_bytes(pickle.dumps(described))
    reseal(newest(folder))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        train(told, folder)
    assert not marker.exists()


INVALID: Final = [
    {"position": [0]},
    {"position": None},
    {"position": ["a", 0, 0]},
    {"position": [0, -1, 0]},
    {"position": [0, 1, 0]},
    {"tokens": "many"},
    {"surroundings": None},
    {"surroundings": {}},
    {"scaler": 3, "more": [1]},
    {"files": {"../../recipe.yaml": "0" * 64}},
    {"files": {"__0_0.distcp": 3}},
    {"files": []},
    {"validation_loss": "low"},
    {"step": 3},
    {"step": "4"},
    {"version": 2},
    {"format": "another"},
]


@pytest.mark.parametrize("values", mostly_long(INVALID, quick={0, 4, 9, 12, 16}), ids=str)
def test_invalid_state(run: tuple[Recipe, Path], values: dict[str, Any]) -> None:
    """With hashes made to match: refused or skipped by name, or of no effect."""
    told, folder = run
    reseal(newest(folder), **values)
    witness = Witness()
    if {"position", "tokens", "surroundings"} & values.keys():
        with pytest.raises((CheckpointError, ResumeError), match=str(folder)):
            train(told, folder)
    else:
        with suppress(FinishedError):  # of no effect on a run that has ended
            assert pretrain(told, folder, witness).finished
        assert any("skipped" in note for note in witness.notes) != ("scaler" in values)


# --- full disks --------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of eight megabytes, where the system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Filler(Witness):
    """Fills a disk after one step, once the checkpoints before are written, and makes room again after another."""

    def __init__(self, disk: Path, full: int, free: int) -> None:
        super().__init__()
        self._disk, self._path, self._full, self._free = disk, disk / "filler", full, free

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._full and not self._path.exists():
            written(self._disk / "run", step - 1)
            with self._path.open("wb", buffering=0) as stream:
                for size in (1 << 16, 1 << 9):
                    with suppress(OSError):
                        while stream.write(bytes(size)) == size:
                            pass
        if step == self._free:
            self._path.unlink()


def written(run: Path, step: int) -> None:
    """Waits for a checkpoint."""
    for _ in range(100_000):
        if (run / "checkpoints" / f"step-{step:09d}").exists():
            return
        time.sleep(0.005)
    pytest.fail(f"no checkpoint of step {step}")


@pytest.mark.long
def test_a_full_disk(disk: Path, store: Path, tmp_path: Path) -> None:
    """Training goes on, and in the end nothing is missing: no checkpoint, no line, no point of a chart."""
    told = recipe(store, run={"steps": 20}, log={"tensorboard": True})
    train(told, tmp_path / "whole")
    witness = Filler(disk, 3, 17)
    assert pretrain(told, disk / "run", witness) == Outcome(20, finished=True)
    failed = r"a checkpoint could not be written: No space left on device; .*"
    others = [note for note in witness.notes if not re.fullmatch(failed, note)]
    assert len(others) == 1
    assert "metrics.jsonl: No space left on device" in others[0]
    assert len(witness.notes) >= 2
    assert_same(disk / "run", tmp_path / "whole")
    assert points(disk / "run") == points(tmp_path / "whole")


@pytest.mark.long
def test_a_disk_that_stays_full(disk: Path, store: Path, tmp_path: Path) -> None:
    """The end of a run cannot be written: an error, and the same command goes on once there is room."""
    told = recipe(store, run={"steps": 8})
    train(told, tmp_path / "whole")
    with pytest.raises(
        OutputError,
        match=r"run/checkpoints: .* step 8 .*: No space left on device",
    ):
        pretrain(told, disk / "run", Filler(disk, 5, 100))
    assert [path.name for path in sorted((disk / "run/checkpoints").iterdir())] == ["step-000000002", "step-000000004"]
    with pytest.raises(OutputError, match="No space left on device"):
        train(told, disk / "run")
    (disk / "filler").unlink()
    witness = Witness()
    assert pretrain(told, disk / "run", witness) == Outcome(8, finished=True)
    assert witness.notes == ["continues after step 4"]
    assert_same(disk / "run", tmp_path / "whole")


def points(run: Path) -> list[tuple[int, float]]:
    """The losses that TensorBoard shows of a run that was not interrupted."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = (run / "tensorboard").iterdir()
    found = [
        (event.step, value.simple_value)
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert [step for step, _ in found] == [line["step"] for line in metrics(run) if "loss" in line]
    return found


class Limiter(Witness):
    """Bounds the size of files after one step, and no more after another."""

    def __init__(self, run: Path, full: int, free: int) -> None:
        super().__init__()
        self._run, self._full, self._free = run, full, free

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step in (self._full, self._free):
            if step == self._full:
                written(self._run, step - 1)
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step == self._full else most, most))


def test_checkpoints_that_cannot_be_written(store: Path, tmp_path: Path) -> None:
    """The same by a limit on the size of files, which anybody may set."""
    told = recipe(store, run={"steps": 12}, save={"every": 3})
    train(told, tmp_path / "whole")
    witness = Limiter(tmp_path / "run", 4, 8)
    assert pretrain(told, tmp_path / "run", witness) == Outcome(12, finished=True)
    failed = r"a checkpoint could not be written: File too large; .*"
    assert witness.notes
    assert all(re.fullmatch(failed, note) for note in witness.notes)
    assert_same(tmp_path / "run", tmp_path / "whole")
