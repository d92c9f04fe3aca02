"""``protea pretrain``: what it prints, how signals end it, and what it refuses."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Run, fails
from messages import check_message
from protea.cli.pretrain_view import TrainingView
from protea.train.loop import pretrain
from protea.train.recipe import recipe_names
from protea.train.run_checkpoints import choose
from protea.train.run_export import average, export
from recorded import Recorded
from trials import assert_same, finish, make_store, metrics, recipe, start, train, write_fasta

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "esm")


@pytest.fixture
def file(store: Path, tmp_path: Path) -> Path:
    """A recipe in a file."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(store).shown()))
    return tmp_path / "recipe.yaml"


def test_a_run(run: Run, file: Path, tmp_path: Path) -> None:
    result = run("pretrain", file, "-o", "run")
    assert result.code == 0
    assert result.out == "run: 4 steps done; `protea export run -o FOLDER` makes a model of it\n"
    lines = result.err.splitlines()
    assert lines[0].endswith(" parameters; 4 steps of 288 tokens (3 packs of 96), 1.15e+03 tokens in all")
    assert lines[-1].startswith("step 4: validation perplexity ")
    loss = choose(tmp_path / "run", "4").loss
    assert run("export", "run", "-o", "model").out == f"model: the model after step 4, validation loss {loss:.4f}\n"
    assert run("info", "model").code == 0
    for made in (export, partial(average, last=1)):
        recorded = Recorded()
        made(tmp_path / "run", tmp_path / "again", progress=recorded)
        assert len(recorded.complete) == len(recorded.tasks) >= 2
        assert recorded.complete[-1] == "writing weights"
        shutil.rmtree(tmp_path / "again")
    more = run("pretrain", file, "run.steps=5", "-o", "run")
    fails(more, 1, "run: ", "run.steps 4 -> 5", "--accept-changes")
    more = run("pretrain", file, "run.steps=5", "-o", "run", "--accept-changes")
    assert more.code == 0
    assert more.err.startswith("protea: note: the recipe changed: run.steps 4 -> 5\nprotea: note: continues after ")


def test_a_narrow_terminal(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps done and the time left stay; what has no room is cut."""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    result = run("pretrain", file, "-o", "run")
    assert result.code == 0
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", result.err).splitlines()[-1]
    assert re.search(r"4/4 \S+ 00:00 loss 3\.\d+ · perplexity .*…", last)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error on a full disk is no reason to end."""
    with suppress(OSError), Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        view = TrainingView()
        with view.bar:
            outcome = pretrain(recipe(store), tmp_path / "run", view)
    assert outcome.finished


def test_list_and_dry_run(run: Run, file: Path) -> None:
    listed = run("pretrain", "--list").out.splitlines()
    assert [line.split()[0] for line in listed[1:-2]] == recipe_names()
    assert listed[0].split() == ["recipe", "trains", "parameters", "tokens", "memory"]
    result = run("pretrain", file, "batch.tokens=960", "--dry-run")
    assert result.code == 0
    shown = yaml.safe_load(result.out)
    assert shown["batch"] == {"tokens": 960, "pack": 96}
    assert yaml.safe_load(file.read_text()) | {"batch": shown["batch"]} == shown
    assert "# memory: " in result.out


def test_wrong_usage(run: Run, file: Path) -> None:
    fails(run("pretrain"), 2, "--list")
    fails(run("pretrain", file), 2, "-o RUN")
    fails(run("pretrain", "esm2_8m", "-o", "run"), 2, "esm2_8m: ", "'esm2_8M'")
    fails(run("pretrain", "no.yaml", "-o", "run"), 2, "no.yaml: ", "quickstart")
    fails(run("pretrain", file, "run.stebs=1", "-o", "run"), 2, "'run.stebs'", "'steps'")
    fails(run("pretrain", file, "steps", "-o", "run"), 2, "'steps'", "key=value")
    fails(run("pretrain", file, "data.store=nothing", "-o", "run"), 1, "nothing: ")
    fails(run("pretrain", file, "-o", file), 1, "recipe.yaml: is a file")
    fails(run("export", "nothing", "-o", "model"), 1, "nothing/checkpoints")


KEYS = ["name", "init", "model"]
for section, keys in recipe(None).shown().items():
    KEYS += [f"{section}.{key}" for key in keys] if isinstance(keys, dict) else []
ODD = [
    "",
    "null",
    "0",
    "-1",
    "1e999",
    ".nan",
    ".inf",
    "[]",
    "{}",
    "[[1]]",
    "{a: {b: c}}",
    "yes",
    "'",
    "é",
    "\x00",
    "*a",
]
VALUES = st.one_of(st.sampled_from(ODD), st.integers().map(str), st.floats().map(str), st.text(max_size=8))


@pytest.mark.long
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), value=VALUES)
def test_any_value(run: Run, file: Path, key: str, value: str) -> None:
    assert_accepted_or_refused(run, file, key, value)


@pytest.mark.parametrize(
    ("key", "value"), [("run.seed", "1e999"), ("model", "[[1]]"), ("data.fasta", "\x00"), ("", "*a")]
)
def test_odd_values(run: Run, file: Path, key: str, value: str) -> None:
    assert_accepted_or_refused(run, file, key, value)


def assert_accepted_or_refused(run: Run, file: Path, key: str, value: str) -> None:
    """A refusal is one line."""
    result = run("pretrain", file, "--dry-run", "--", f"{key}={value}")
    if result.code:
        fails(result, result.code)
        assert result.code in (1, 2)


def test_a_disk_that_is_full_at_the_end(run: Run, file: Path, store: Path, tmp_path: Path) -> None:
    """A limit on file sizes, which fails writes as a full disk does."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        result = run("pretrain", file, "-o", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert result.code == 1
    check_message("pretrain.last checkpoint", result.err.splitlines()[-1])
    assert run("pretrain", file, "-o", "run").code == 0
    train(recipe(store), tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


# --- signals ------------------------------------------------------------------------------------------------------


def wait_for(process: subprocess.Popen[str], path: Path, text: bytes) -> None:
    """Until a file holds a text; fails if the process ends without writing it."""
    while not (path.exists() and text in path.read_bytes()):
        assert process.poll() is None, finish(process)
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_interrupted(store: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A checkpoint of the last whole step, and the same command goes on."""
    told = recipe(store, run={"steps": 30}, save={"every": 1000}, validation={"every": 15})
    process = start(told, tmp_path / "run")
    wait_for(process, tmp_path / "run/metrics.jsonl", b'"step": 3,')
    process.send_signal(number)
    code, err = finish(process)
    assert code == 130
    lines = err.splitlines()[-3:]
    check_message("pretrain.stopping", lines[0])
    step = choose(tmp_path / "run", "newest").step
    assert f"{tmp_path / 'run'}: stopped after step {step} of 30" in lines[1]
    assert lines[2].startswith("protea: interrupted; ")
    assert 3 <= step < 30
    train(told, tmp_path / "run")
    train(told, tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_interrupted_twice(tmp_path: Path) -> None:
    """Amid a step of many seconds: the second signal does not wait for its end."""
    store = make_store(tmp_path / "data")
    big = {"hidden_size": 320, "intermediate_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 12}
    told = recipe(store, model=big, batch={"pack": 20_000, "tokens": 2_000_000}, validation={"every": None})
    process = start(told, tmp_path / "run")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("memory: "):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert "stopping: " in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, err = finish(process)
    assert code == 130
    check_message("pretrain.stopped by a second signal", err.splitlines()[0], tmp=tmp_path)


@pytest.mark.long
def test_interrupted_before_training(tmp_path: Path) -> None:
    """While sequences are read from a pipe that says nothing."""
    pipe = tmp_path / "pipe.fasta"
    os.mkfifo(pipe)
    told = recipe(None, data={"fasta": pipe}, validation={"every": None})
    process = start(told, tmp_path / "run")
    with pipe.open("w") as writer:
        writer.write(">a\nMKT\n")
        writer.flush()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        code, err = finish(process)
    assert code == 130
    assert err.splitlines()[-1].startswith("protea: interrupted; ")
    pipe.unlink()
    write_fasta(pipe)
    assert train(told, tmp_path / "run").finished
    assert metrics(tmp_path / "run")


def test_preparation_has_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """A task whose total is unknown does not keep that of the task before it."""
    view = TrainingView()
    view.begin("read sequences", 200)
    view.advance(50)
    (task,) = view.bar.tasks
    assert (task.description, task.completed, task.total) == ("read sequences", 50, 200)
    view.begin("cluster")
    (task,) = view.bar.tasks
    assert (task.description, task.completed, task.total) == ("cluster", 0, None)
    view.start([], 10, 2)
    (task,) = view.bar.tasks
    assert (task.description, task.completed, task.total) == ("", 2, 10)
    for number, handler in view._handlers.items():
        signal.signal(number, handler)
    assert "training data: read sequences" in capsys.readouterr().err


def test_time_left_is_shown_for_slow_steps() -> None:
    """Four minutes between two logged steps."""
    view = TrainingView()
    now = 0.0
    view.bar.get_time = lambda: now
    view.bar.reset(view._task, total=100, completed=0)
    for step in (10, 20, 30):
        now += 240.0
        view.bar.update(view._task, completed=step)
    assert view.bar.tasks[0].time_remaining == 7 * 240
