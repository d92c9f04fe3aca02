"""Builds that are killed or interrupted, at every stage and at any moment, and continue to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from sources import Sources, build, contents, make_sources, needs_mmseqs

from protea.progress import Progress

QUICK = "--min-seq-id 0.5 --alignment-mode 3 --max-seqs 300 -s 1 -k 5 -c 0.8 --cov-mode 0"


class Killer(Progress):
    """Stops a build at the beginning of its n-th stage, or in the midst of it."""

    def __init__(self, stage: int, *, amid: bool) -> None:
        self.stage, self.amid = stage, amid
        self.notes: list[str] = []

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        self.stage -= 1
        if self.stage < 0 and not self.amid:
            raise KeyboardInterrupt

    def advance(self, amount: int = 1) -> None:
        if self.stage < 0 and self.amid:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("amid", [False, True])
def test_a_build_stopped_at_any_stage_continues(tmp_path: Path, amid: bool) -> None:
    sources = make_sources(tmp_path, 20)
    expected = contents(build(sources, tmp_path / "whole", valid="7").folder)
    stopped = 0
    while True:
        killer = Killer(stopped, amid=amid)
        try:
            build(sources, tmp_path / "store", valid="7", progress=killer)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "store").exists()
        killer = Killer(1000, amid=False)
        build(sources, tmp_path / "store", valid="7", progress=killer)
        assert any("done before" in note for note in killer.notes) == (stopped > 0)
        assert contents(tmp_path / "store") == expected
        assert not list(tmp_path.glob(".*.partial"))
        shutil.rmtree(tmp_path / "store")
        stopped += 1
    assert stopped >= (3 if amid else 6)


def test_changed_stages_are_done_again(tmp_path: Path) -> None:
    """Another build in the same place repeats the stages that depend on a change, and no others."""
    sources = make_sources(tmp_path, 60)
    with pytest.raises(KeyboardInterrupt):
        build(sources, tmp_path / "store", valid="7", progress=Killer(5, amid=False))
    sources.sequences[sources.clusters["UniRef50_C3"][0]] = "MKTAYIAKQR" * 4
    sources.write()
    killer = Killer(1000, amid=False)
    store = build(sources, tmp_path / "store", valid="9", progress=killer)
    assert [note for note in killer.notes if "done before" in note] == []
    assert contents(store.folder) == contents(build(sources, tmp_path / "fresh", valid="9").folder)
    with pytest.raises(KeyboardInterrupt):
        build(sources, tmp_path / "next", valid="9", progress=Killer(5, amid=False))
    killer = Killer(1000, amid=False)
    build(sources, tmp_path / "next", valid="8", progress=killer)
    assert [note.split(":")[0] for note in killer.notes] == ["read representatives"]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "protea", "data", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, err


def command(sources: Sources, output: Path, *options: object) -> list[object]:
    return [
        *("uniref", "--uniref50", sources.uniref50, "--uniref90", sources.uniref90, "--members", sources.mapping),
        *("-o", output, *options),
    ]


def appears(path: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path():
            return True
        time.sleep(0.002)
    return False


def prefiltering(folder: Path) -> list[int]:
    """Those processes that run the prefilter; one may end before its command line is read."""
    processes = []
    for number in at_work(folder):
        with suppress(OSError):
            if b"prefilter" in Path(f"/proc/{number}/cmdline").read_bytes():
                processes.append(number)
    return processes


def at_work(folder: Path) -> list[int]:
    """Processes of MMseqs2 whose command line names a folder."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if b"mmseqs" in line and str(folder).encode() in line and state != "Z" and b"-m\0protea" not in line:
            processes.append(int(entry.name))
    return processes


@pytest.mark.long
def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 2000, most=8, low=100, high=300)
    options = ("--valid", 100, "--no-filter")
    assert finish(start(*command(sources, tmp_path / "whole", *options)))[0] == 0
    expected = contents(tmp_path / "whole")
    rng = random.Random(0)
    for _ in range(4):
        process = start(*command(sources, tmp_path / "store", *options))
        assert appears((tmp_path / ".store.partial").exists)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        if (tmp_path / "store").exists():
            assert contents(tmp_path / "store") == expected
            break
    else:
        assert finish(start(*command(sources, tmp_path / "store", *options)))[0] == 0
    assert contents(tmp_path / "store") == expected


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_the_program_ends_with_its_run(tmp_path: Path) -> None:
    """A stand-in for MMseqs2 that never ends is killed with its run."""
    program = tmp_path / "mmseqs-fake"
    program.write_text(
        f'#!{sys.executable}\nimport sys, time\nprint(0) if "version" in sys.argv else time.sleep(300)\n'
    )
    program.chmod(0o755)
    sources = make_sources(tmp_path, 20)
    arguments = command(sources, tmp_path / "store", "--valid", 3, "--mmseqs", program)
    process = start(*arguments)
    assert appears(lambda: bool(at_work(tmp_path / ".store.partial")))
    process.kill()
    process.communicate()
    assert appears(lambda: not at_work(tmp_path / ".store.partial"), 10)
    assert not (tmp_path / "store").exists()


@pytest.mark.long
@needs_mmseqs
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_mmseqs_and_its_runs_that_are_killed(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 500, most=2, low=200, high=400)
    slow = ("--valid", 20, "--threads", 1)
    work = tmp_path / ".store.partial"
    # If the run is killed, its MMseqs2 ends too.
    process = start(*command(sources, tmp_path / "store", *slow))
    assert appears(lambda: bool(at_work(work)))
    process.kill()
    process.communicate()
    assert appears(lambda: not at_work(work), 10)
    assert not (tmp_path / "store").exists()
    # MMseqs2 alone is killed: its run says so.
    process = start(*command(sources, tmp_path / "store", *slow))
    assert appears(lambda: bool(prefiltering(work)))
    for number in prefiltering(work):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    code, err = finish(process)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("protea: error: mmseqs search ")
    assert "Killed" in last or "prefilter died" in last
    # If it is interrupted, it ends at once, MMseqs2 too, and says how to continue.
    process = start(*command(sources, tmp_path / "store", *slow))
    assert appears(lambda: bool(at_work(work)))
    process.send_signal(signal.SIGINT)
    code, err = finish(process)
    assert code == 130
    assert "`protea data`" in err
    assert "continue when you run the same command again" in err
    assert appears(lambda: not at_work(work), 10)
    quick = (*slow, "--filter-flags", QUICK)
    code, err = finish(start(*command(sources, tmp_path / "store", *quick)))
    assert code == 0, err
    assert "read representatives: done before" in err
    assert finish(start(*command(sources, tmp_path / "whole", *quick)))[0] == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
