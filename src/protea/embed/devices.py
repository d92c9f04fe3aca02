"""Several GPUs of one machine embed one input: each has a process and a shard, which are merged at the end."""

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

from protea.embed.merge import merge
from protea.embed.outputs import check_place, run_error
from protea.embed.settings import EmbedSettings, Shard
from protea.embed.stores import kind_of
from protea.embed.survey import Totals
from protea.errors import DeviceError, ProteaError, ResumeError
from protea.journal import JOURNAL, work_path
from protea.progress import Progress

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


class ShardError(ProteaError):
    """One of several processes failed; the message is that of the process."""


def run_on_devices(settings: EmbedSettings, progress: Progress, *, overwrite: bool) -> Totals:
    """Embed with ``settings.devices`` processes.

    On a CPU (``device="cpu"``) the processes share the cores and give the numbers of one process with as many threads
    as each of them has. The shards are in the hidden folder ``.OUT.devices`` beside the first output.

    Raises:
        DeviceError: the machine has fewer GPUs.
        ShardError: a process failed; the others are stopped, and the same command continues where each of them was.
        ProteaError: merging failed.
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
        progress.begin("embedding")
        with _processes(inner, [shard for shard in shards if not _finished(inner, shard)], folder) as running:
            _wait(running, inner, progress)
        for output, hidden in zip(settings.outputs, inner.outputs, strict=True):
            # An earlier attempt may have stopped between two outputs; its first output is merged again.
            parts = [shard.output(hidden) for shard in shards]
            totals = merge(output, parts, overwrite=overwrite or resuming, settings=settings.shown())
        shutil.rmtree(folder)
    except OSError as error:
        raise run_error(error, first) from error
    return totals


def _claim(folder: Path, settings: EmbedSettings, *, resuming: bool) -> None:
    """Check that the shards in the folder are of these settings and inputs, or clear the folder."""
    stats = [(path, Path(path).stat()) for path in settings.inputs if Path(path).is_file()]
    plan = settings.shown() | {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}
    if resuming and (folder / _PLAN).exists():
        if json.loads((folder / _PLAN).read_text()) != plan:
            raise ResumeError(
                f"{settings.outputs[0]}: an unfinished run has other settings or another input; use those, or pass "
                "--overwrite to start again"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / _PLAN).write_text(json.dumps(plan))


def _inside(settings: EmbedSettings, folder: Path) -> dict[str, Any]:
    """The outputs under their own names in the folder; ``-o`` and ``-r`` cannot collide."""
    if settings.sequences == settings.residues and settings.sequences is not None:
        one = folder / settings.sequences.name
        return {"sequences": one, "residues": one}
    places = {"sequences": settings.sequences, "residues": settings.residues}
    return {name: None if path is None else folder / f"{name}-{path.name}" for name, path in places.items()}


def _finished(settings: EmbedSettings, shard: Shard) -> bool:
    outputs = [shard.output(output) for output in settings.outputs]
    return all(output.exists() and not work_path(output).exists() for output in outputs)


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
    running: dict[Shard, tuple[subprocess.Popen[bytes], Path]], settings: EmbedSettings, progress: Progress
) -> None:
    """Wait for all processes; their progress is read from their journals."""
    shown = 0
    while True:
        codes = {shard: process.poll() for shard, (process, _) in running.items()}
        for shard, code in codes.items():
            if code:
                lines = running[shard][1].read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
                raise ShardError(f"shard {shard}: {lines[-1].removeprefix('protea: error: ')}")
        done = sum(_residues(work_path(shard.output(settings.outputs[0])) / JOURNAL) for shard in running)
        progress.advance(max(0, done - shown))
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
