"""One machine's GPUs at work on one input: a process and a shard for each, laid end to end when all are done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from protea.embed.journal import JOURNAL, work_folder
from protea.embed.merge import merge
from protea.embed.outputs import check_place, write_error
from protea.embed.run import Watcher
from protea.embed.settings import EmbedSettings, Shard
from protea.embed.stores import kind_of
from protea.embed.survey import Totals
from protea.errors import DeviceError, ProteaError, ResumeError

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
"""``protea`` in a process that ends when its parent does, however that comes; Linux alone can."""


class ShardError(ProteaError):
    """A process of several failed; the message is its own."""


def run_on_devices(settings: EmbedSettings, watcher: Watcher, *, overwrite: bool) -> Totals:
    """Embed with ``settings.devices`` processes.

    On a CPU (``device="cpu"``) the processes share the cores; they give the numbers of one process with as many threads
    as each of them has. Shards lie in the hidden folder ``.OUT.devices`` beside the first output.

    Raises:
        DeviceError: there are fewer GPUs.
        ShardError: a process failed; the others are stopped, and the same command goes on where each was.
        ProteaError: whatever merging raises.
    """
    count = settings.devices
    if settings.device != "cpu" and torch.cuda.device_count() < count:
        raise DeviceError(f"--devices {count}: this machine has {torch.cuda.device_count()} GPUs")
    first = settings.outputs[0]
    folder = first.with_name(f".{first.name}.devices")
    try:
        resuming = folder.exists() and not overwrite
        for output in settings.outputs:
            check_place(output, kind_of(output, "--devices"), overwrite=overwrite or resuming)
        _claim(folder, settings, resuming=resuming)
        shards = [Shard(number=number, of=count) for number in range(1, count + 1)]
        inner = settings.model_copy(update=_inside(settings, folder))
        watcher.begun(None, Totals())
        with _processes(inner, [shard for shard in shards if not _finished(inner, shard)], folder) as running:
            _wait(running, inner, watcher)
        for output, hidden in zip(settings.outputs, inner.outputs, strict=True):
            # Merged again where an earlier attempt was stopped between two outputs: the shards are still there.
            parts = [shard.output(hidden) for shard in shards]
            totals = merge(output, parts, overwrite=overwrite or resuming, settings=settings.shown())
        shutil.rmtree(folder)
    except OSError as error:
        raise write_error(error, first) from error
    return totals


def _claim(folder: Path, settings: EmbedSettings, *, resuming: bool) -> None:
    """See that the folder's shards are of these settings and inputs, or begin anew."""
    stats = [(path, Path(path).stat()) for path in settings.inputs if Path(path).is_file()]
    plan = settings.shown() | {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}
    if resuming and (folder / _PLAN).exists():
        if json.loads((folder / _PLAN).read_text()) != plan:
            raise ResumeError(
                f"{settings.outputs[0]}: an unfinished run was started with other settings or input; use those again, "
                "or pass --overwrite to start anew"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / _PLAN).write_text(json.dumps(plan))


def _inside(settings: EmbedSettings, folder: Path) -> dict[str, Any]:
    """The outputs under their own names, but within a folder, ``-o`` and ``-r`` apart."""
    if settings.sequences == settings.residues and settings.sequences is not None:
        one = folder / settings.sequences.name
        return {"sequences": one, "residues": one}
    places = {"sequences": settings.sequences, "residues": settings.residues}
    return {name: None if path is None else folder / f"{name}-{path.name}" for name, path in places.items()}


def _finished(settings: EmbedSettings, shard: Shard) -> bool:
    outputs = [shard.output(output) for output in settings.outputs]
    return all(output.exists() and not work_folder(output).exists() for output in outputs)


@contextmanager
def _processes(
    settings: EmbedSettings, shards: list[Shard], folder: Path
) -> Iterator[dict[Shard, tuple[subprocess.Popen[bytes], Path]]]:
    running: dict[Shard, tuple[subprocess.Popen[bytes], Path]] = {}
    try:
        for shard in shards:
            device = settings.device if settings.device == "cpu" else f"cuda:{shard.number - 1}"
            options = settings.shown() | {"shard": str(shard), "device": device, "devices": 1}
            config, log = folder / f"{shard.number}.yaml", folder / f"{shard.number}.log"
            config.write_text(yaml.safe_dump(options), encoding="utf-8")
            command = [sys.executable, "-c", _CHILD, "embed", "--config", str(config)]
            with log.open("wb") as stream:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream)
            running[shard] = process, log
        yield running
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _wait(
    running: dict[Shard, tuple[subprocess.Popen[bytes], Path]], settings: EmbedSettings, watcher: Watcher
) -> None:
    """Until all are done; progress is read from their journals."""
    shown = 0
    while True:
        codes = {shard: process.poll() for shard, (process, _) in running.items()}
        for shard, code in codes.items():
            if code:
                lines = running[shard][1].read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
                raise ShardError(f"shard {shard}: {lines[-1].removeprefix('protea: error: ')}")
        done = sum(_residues(work_folder(shard.output(settings.outputs[0])) / JOURNAL) for shard in running)
        watcher.embedded(max(0, done - shown))
        shown = max(done, shown)
        if all(code == 0 for code in codes.values()):
            return
        time.sleep(_POLL_SECONDS)


def _residues(journal: Path) -> int:
    try:
        entry: dict[str, Any] = json.loads(journal.read_text())
    except (OSError, ValueError):
        return 0
    return int(entry["progress"]["totals"]["residues"])
