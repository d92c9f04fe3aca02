"""``protea pretrain`` in several processes: one message, one exit code, one step at which all stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml

from messages import check_message
from protea.errors import ResumeError, TrainingError, UsageError
from protea.train.division import Division, plan_layout
from protea.train.estimate import estimate
from protea.train.failures import Failure, failure_of
from protea.train.model import architecture
from protea.train.recipe import Recipe, read_recipe
from protea.train.run_checkpoints import choose
from ranks import Command, start_commands
from trials import assert_same, make_store, metrics, recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {"run": {"steps": 100_000}, "validation": {"every": None}, "save": {"every": 10, "newest": 10**6}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


def told(store: Path, **sections: dict[str, object]) -> Recipe:
    return recipe(store, batch={"tokens": 4 * 96, "pack": 96}, **sections)


def start(
    size: int, told: Recipe, folder: Path, own: Mapping[int, Sequence[str]] = MappingProxyType({})
) -> list[Command]:
    """The same command in several processes; ``own`` are further arguments of some."""
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(told.shown()))
    return start_commands(
        size, lambda rank: ["pretrain", path, *own.get(rank, ()), "-o", folder], folder.with_name(f"{folder.name}-err")
    )


def finish(commands: Sequence[Command]) -> tuple[list[int], list[str]]:
    """The exit code and the standard error of each; no traceback."""
    ended = [command.finish() for command in commands]
    codes, errors = ([each[number] for each in ended] for number in (0, 1))
    assert not [error for error in errors if "Traceback" in error], errors
    return codes, errors


def wait(processes: Sequence[Command | subprocess.Popen[str]], there: Callable[[], bool]) -> None:
    while not there():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def test_a_signal_to_one_process(store: Path, tmp_path: Path) -> None:
    """All stop after the same step, and save it; one process goes on with it."""
    folder = tmp_path / "run"
    processes = start(2, told(store, **LONG), folder)
    wait(processes, lambda: steps(folder) > 2)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = finish(processes)
    assert codes == [130, 130]
    assert not errors[1]
    saved = choose(folder, "newest")
    assert saved.step == steps(folder) > 2
    assert f"stopped after step {saved.step:,} of 100,000; a checkpoint is saved" in errors[0]
    end = saved.step + 2
    train(told(store, **LONG | {"run": {"steps": end}}), folder, accept_changes=True)
    assert [line["step"] for line in metrics(folder)] == list(range(1, end + 1))


@pytest.mark.long
def test_a_whole_run(store: Path, tmp_path: Path) -> None:
    """As in one process, but for rounding: metrics, validation, best checkpoint, layout; stopped or not."""
    made = told(store, run={"steps": 6})
    train(made, tmp_path / "one")
    assert finish(start(2, made, tmp_path / "two"))[0] == [0, 0]
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    layout = choose(tmp_path / "two", "newest").values["surroundings"]["layout"]
    assert layout == "shard 2"
    codes, errors = finish(start(2, made, tmp_path / "two"))
    assert codes == [0, 0]
    assert "complete, nothing to do" in errors[0]
    assert not errors[1]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process(store: Path, tmp_path: Path, victim: int) -> None:
    """The others end, and say which one; the same command repeats what an undisturbed run does, to the bit."""
    made = told(store, run={"steps": 60}, save={"every": 5})
    assert not any(finish(start(3, made.model_copy(update={"batch": _packs(6)}), tmp_path / "whole"))[0])
    made, folder = made.model_copy(update={"batch": _packs(6)}), tmp_path / "run"
    processes = start(3, made, folder)
    wait(processes, lambda: steps(folder) > 12)
    processes[victim].send_signal(signal.SIGKILL)
    codes, errors = finish(processes)
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [1, 1]
    told_by = [error for number, error in enumerate(errors) if "error: " in error and number != victim]
    assert len(told_by) == 1
    assert f"rank {victim} of 3 ended" in told_by[0]
    assert finish(start(3, made, folder))[0] == [0, 0, 0]
    assert_same(folder, tmp_path / "whole")


def _packs(number: int) -> object:
    return recipe(None, batch={"tokens": number * 96, "pack": 96}).batch


@pytest.mark.long
def test_a_process_that_hangs(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = start(2, told(store, **LONG, parallel={"timeout": 40}), folder)
    wait(processes, lambda: steps(folder) > 2)
    processes[1].send_signal(signal.SIGSTOP)
    code, error = processes[0].finish()
    processes[1].send_signal(signal.SIGKILL)
    processes[1].finish()
    assert code == 1
    assert "rank 1 of 2 ended or hangs, at step " in error


@pytest.mark.long
@pytest.mark.parametrize(
    ("own", "code", "parts"),
    [
        (("run.seed=9",), 1, ("rank 1", "run.seed 0 -> 9")),
        (("optimizer.lr=-1",), 2, ("optimizer.lr",)),
        (("data.store=/nowhere",), 1, ("rank 1", "data.store")),
    ],
)
def test_processes_with_different_recipes(
    store: Path, tmp_path: Path, own: tuple[str, ...], code: int, parts: tuple[str, ...]
) -> None:
    codes, errors = finish(start(2, told(store), tmp_path / "run", {1: own}))
    assert codes == [code, code]
    assert not errors[1]
    (line,) = errors[0].strip().splitlines()
    assert line.startswith("protea: error: ")
    assert not [part for part in parts if part not in line], line
    assert not (tmp_path / "run").exists()


# ---- layouts ----
@pytest.mark.parametrize(
    ("parallel", "processes", "expected"),
    [
        ({}, 1, Division()),
        ({}, 4, Division(shard=4)),
        ({"replicate": 2}, 4, Division(2, 2)),
        ({"replicate": 4, "shard": 1}, 4, Division(4)),
    ],
)
def test_layouts(parallel: dict[str, int], processes: int, expected: Division) -> None:
    made = told(Path("store"), parallel=parallel)
    assert plan_layout(made, processes) == expected


@pytest.mark.parametrize(
    ("key", "sections", "processes"),
    [
        ("product", {"parallel": {"replicate": 2, "shard": 3}}, 4),
        ("started alone", {"parallel": {"replicate": 2}}, 1),
        ("packs", {"batch": {"tokens": 20 * 96, "pack": 96}}, 8),
        ("few packs", {"batch": {"tokens": 2 * 96, "pack": 96}}, 4),
        ("muon", {"optimizer": {"name": "muon"}, "parallel": {"replicate": 2}}, 4),
        ("float16", {"run": {"precision": "fp16-mixed"}}, 2),
    ],
)
def test_wording_of_refused_layouts(key: str, sections: dict[str, dict[str, object]], processes: int) -> None:
    with pytest.raises(UsageError) as caught:
        plan_layout(recipe(Path("store"), **({"batch": {"tokens": 384, "pack": 96}} | sections)), processes)
    check_message(f"train.parallel: {key}", caught.value)


@pytest.mark.parametrize("ranks", [3, 7, 64])
def test_the_named_numbers_of_tokens_are_accepted(ranks: int) -> None:
    with pytest.raises(UsageError) as caught:
        plan_layout(recipe(Path("store"), batch={"tokens": 100 * 96, "pack": 96}), ranks)
    named = [int(number) for number in re.findall(r"\d+", str(caught.value).split("batch.tokens=")[1])]
    assert len(named) == 2
    assert named[0] < 100 * 96 < named[1]
    for tokens in named:
        assert plan_layout(recipe(Path("store"), batch={"tokens": tokens, "pack": 96}), ranks).data == ranks


# ---- failures ----
@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("a"), 2), (ResumeError("b"), 1), (KeyboardInterrupt(), 130), (KeyError("c"), 1)],
)
def test_failures_travel(error: BaseException, code: int) -> None:
    failure = Failure(*failure_of(error, 3))
    assert (failure.rank, failure.code) == (3, code)
    again = failure.error()
    if isinstance(error, KeyError):
        assert isinstance(again, TrainingError)
        assert str(again) == "rank 3: KeyError: 'c'"
    else:
        assert type(again) is type(error)
        assert str(again) == str(error)


@pytest.mark.parametrize(
    ("name", "layout", "fits"),
    [
        ("esm2_650M", Division(replicate=16), True),
        ("esm2_3B", Division(replicate=4, shard=8), True),
        ("esm2_15B", Division(shard=2), False),
        ("esm2_15B", Division(shard=32), True),
        ("esm2nv_20B", Division(shard=64), True),
    ],
)
def test_memory_of_layouts(name: str, layout: Division, fits: bool) -> None:
    """Of the large recipes on cards of 80 GB, whose products are in bfloat16."""
    made, again = (
        read_recipe(name, ["run.precision=bf16-mixed", "run.device=cuda", f"run.recompute={recompute}"])
        for recompute in ("false", "true")
    )
    model = architecture(made)
    whole, needs = estimate(model, made, 400), estimate(model, made, 400, layout)
    assert (needs.state < 80e9) == fits, needs.state
    weights = sum(parameter.numel() for parameter in model.parameters())
    # Weights, gradients and moments of a shard; narrow weights and gradients of the whole model, or of a few layers.
    gathered = 6 * weights if layout.keeps_layers(4 * weights) else 0.6 * weights
    assert 16 * weights / layout.shard + gathered * 0.5 < needs.state < 16.2 * weights / layout.shard + gathered
    assert needs.copies == whole.copies // layout.shard
    assert (needs.parameters, needs.flops) == (whole.parameters, whole.flops)
    assert estimate(model, again, 400, layout).state == needs.state
    # Divided matrices are gathered in float32; their narrow weights are kept, or with recomputation those of a few.
    needs, less = (estimate(model, each, 400, layout._replace(tensor=2)).state for each in (made, again))
    assert less < needs - 0.8 * weights


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of child processes")
def test_torchrun_starts_again(store: Path, tmp_path: Path) -> None:
    """After a kill, all continue from the newest checkpoint, and end with the bits of an undisturbed run."""
    made, folder = told(store, run={"steps": 40}, save={"every": 5}), tmp_path / "run"
    assert finish(start(2, made, tmp_path / "whole"))[0] == [0, 0]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(made.shown()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = subprocess.Popen(
        [*command, "-m", "protea", "pretrain", str(path), "-o", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait([process], lambda: steps(folder) > 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=900)
    assert process.returncode == 0, error
    assert "continues after step" in error
    assert_same(folder, tmp_path / "whole")
