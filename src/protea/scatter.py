"""Runs one command in shards, in processes here or on a Ray cluster, and joins what they write.

The shards are in the hidden folder ``.OUT.KIND`` beside the first output, until the output is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from protea.errors import ProteaError, ResumeError, UsageError
from protea.fasta import flows
from protea.journal import work_path
from protea.output import write_failure
from protea.progress import Progress
from protea.remote import RemoteTask, ray_cluster
from protea.shards import Shard

_POLL_SECONDS: Final = 0.5
_PLAN: Final = "plan.json"
_CHILD: Final = """
import ctypes, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
from protea.cli import main
main()
"""
"""Runs ``protea`` in a process that ends when its parent ends, for whatever reason; only Linux can do this."""

Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True)
class ShardedCommand(Generic[Told]):
    """A command whose work is computed in shards.

    Attributes:
        outputs: files or folders that it writes.
        inputs: files and folders that every shard reads.
        options: all else that the shards depend on, as plain values.
        arguments: makes the command line of a shard, from the places of the whole outputs' shards.
        check: refuses an output that cannot be written, if ``overwrite`` is false also one that exists.
        finished: is called if all outputs exist: the result of a run that finds them complete, or an error.
        merge: joins the shards of an output, and replaces it if ``overwrite``.
        title: what the progress bar says.
        done: how much of a shard is computed, from the place of its first output; by default whole shards count.
    """

    outputs: Sequence[Path]
    inputs: Sequence[str]
    options: Mapping[str, Any]
    arguments: Callable[[Shard, Mapping[Path, Path]], list[str]]
    check: Callable[[Path, bool], object]
    finished: Callable[[], Told]
    merge: Callable[[Path, list[Path], bool], Told]
    title: str
    done: Callable[[Path], int] | None = None


Computing = Callable[[Sequence[RemoteTask], Path, Callable[[], None]], None]
"""Computes the shards of some tasks, which lie in a folder, and waits for them; calls a function from time to time."""


def run_on_ray(
    command: ShardedCommand[Told],
    address: str,
    progress: Progress,
    *,
    shards: int | None,
    cpus: int,
    gpu: bool,
    overwrite: bool,
) -> Told:
    """Run with a Ray cluster whose machines share the disk of the outputs; each shard is a task with ``cpus`` cores.

    A finished shard is not computed again, and one whose process died continues from its journal if it has one.
    """
    if once := [path for path in command.inputs if flows(path)]:
        raise UsageError(f"--ray needs files that every machine can read; {once[0]} is not one")
    with ray_cluster(address, cpus=cpus, gpu=gpu) as cluster:

        def compute(tasks: Sequence[RemoteTask], folder: Path, watch: Callable[[], None]) -> None:
            cluster.check_machines(folder, [Path(path) for path in command.inputs])
            cluster.run(tasks, watch)

        wanted = shards or _planned(_folder(command, "ray")) or cluster.shards
        return run_in_shards(command, wanted, "ray", compute, progress, overwrite=overwrite)


def run_in_shards(
    command: ShardedCommand[Told], count: int, kind: str, compute: Computing, progress: Progress, *, overwrite: bool
) -> Told:
    """Compute the shards that are missing, and merge all. After an error, the same command continues each of them."""
    folder = _folder(command, kind)
    try:
        resuming = folder.exists() and not overwrite
        if not (resuming or overwrite) and all(map(os.path.lexists, command.outputs)):
            return command.finished()
        for output in command.outputs:
            command.check(output, overwrite or resuming)
        _claim(folder, command, count, resuming=resuming)
        shards = [Shard(number=number, of=count) for number in range(1, count + 1)]
        # Under their own names in the folder, two outputs from different folders cannot collide.
        hidden = {path: folder / f"{number}-{path.name}" for number, path in enumerate(command.outputs)}
        tasks, places = [], []
        for shard in shards:
            if not all(_is_finished(shard.output(path)) for path in hidden.values()):
                log = (folder / f"{shard.number}.log").absolute()
                tasks.append(RemoteTask(f"shard {shard}", command.arguments(shard, hidden), log))
                places.append(shard.output(hidden[command.outputs[0]]))
        progress.begin(command.title, None if command.done else len(tasks))
        compute(tasks, folder, _Following(places, command.done or _is_finished, progress).look)
        for output in command.outputs:
            # An earlier attempt may have stopped between two outputs; its first output is merged again.
            told = command.merge(output, [shard.output(hidden[output]) for shard in shards], overwrite or resuming)
        shutil.rmtree(folder)
    except OSError as error:
        raise write_failure(error, command.outputs[0]) from error
    return told


def compute_here(tasks: Sequence[RemoteTask], _: Path, watch: Callable[[], None]) -> None:
    """Run each task in a process of this machine; if one fails, the others are stopped."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for task in tasks:
            command = [sys.executable, "-c", _CHILD, *task.arguments]
            with task.log.open("wb") as stream:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream)
            running.append(process)
        while True:
            codes = [process.poll() for process in running]
            for task, code in zip(tasks, codes, strict=True):
                if code:
                    lines = task.log.read_text(errors="replace").strip().splitlines()
                    last = lines[-1].removeprefix("protea: error: ") if lines else f"exit code {code}"
                    raise ProteaError(f"{task.name}: {last}")
            watch()
            if None not in codes:
                return
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def local_files(*models: str) -> list[str]:
    """Those models that are files or folders here, not names."""
    return [model for model in models if Path(model).exists()]


class _Following:
    """Tells a progress how much of some shards is computed, from the places of their outputs."""

    def __init__(self, places: Iterable[Path], done: Callable[[Path], int], progress: Progress) -> None:
        self._measure, self._progress, self._done = done, progress, dict.fromkeys(places, 0)
        self._shown = 0

    def look(self) -> None:
        """Look again; the journals of finished shards are gone, what they told before still counts."""
        for place in self._done:
            self._done[place] = max(self._done[place], self._measure(place))
        done = sum(self._done.values())
        self._progress.advance(max(0, done - self._shown))
        self._shown = max(done, self._shown)


def _folder(command: ShardedCommand[Any], kind: str) -> Path:
    first = command.outputs[0]
    return first.with_name(f".{first.name}.{kind}")


def _planned(folder: Path) -> int | None:
    """The number of shards of an unfinished run."""
    try:
        return int(json.loads((folder / _PLAN).read_text())["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _claim(folder: Path, command: ShardedCommand[Any], count: int, *, resuming: bool) -> None:
    """Check that the shards in the folder are of these settings and inputs, or clear the folder."""
    stats = [(path, Path(path).stat()) for path in command.inputs if Path(path).is_file()]
    plan = {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats], "shards": count}
    plan |= json.loads(json.dumps(dict(command.options)))
    if resuming and (folder / _PLAN).exists():
        if json.loads((folder / _PLAN).read_text()) != plan:
            raise ResumeError(
                f"{command.outputs[0]}: an unfinished run has other settings or another input; use those, or pass "
                "--overwrite to start again"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / _PLAN).write_text(json.dumps(plan))


def _is_finished(place: Path) -> bool:
    return place.exists() and not work_path(place).exists()
