"""One machine's GPUs at work on one input: a process and a shard for each, laid end to end when all are done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from protea.embed.journal import JOURNAL, work_folder
from protea.embed.merge import merge
from protea.embed.outputs import check_place
from protea.embed.run import Watcher
from protea.embed.settings import Settings, Shard
from protea.embed.survey import Totals
from protea.errors import DeviceError, ProteaError

_POLL_SECONDS: Final = 0.5


class ShardError(ProteaError):
    """A process of several failed; the message is its own."""


def run_on_devices(settings: Settings, watcher: Watcher, *, overwrite: bool) -> Totals:
    """Embed with ``settings.devices`` processes.

    On a CPU (``device="cpu"``) the processes share the cores; they give the numbers of one process with as many threads
    as each of them has.

    Raises:
        DeviceError: there are fewer GPUs.
        ShardError: a process failed; the others are stopped, and the same command goes on where each was.
        ProteaError: whatever merging raises.
    """
    count = settings.devices
    if settings.device != "cpu" and torch.cuda.device_count() < count:
        raise DeviceError(f"--devices {count}: this machine has {torch.cuda.device_count()} GPUs")
    for output in settings.outputs:
        check_place(output, overwrite=overwrite)
    shards = [Shard(number=number, of=count) for number in range(1, count + 1)]
    to_do = [shard for shard in shards if overwrite or not _finished(settings, shard)]
    watcher.begun(None, Totals())
    with tempfile.TemporaryDirectory() as folder, _processes(settings, to_do, Path(folder), overwrite) as running:
        _wait(running, settings, watcher)
    for output in settings.outputs:
        totals = merge(output, overwrite=overwrite)
    for shard in shards:
        for output in settings.outputs:
            _remove(shard.output(output))
    return totals


def _finished(settings: Settings, shard: Shard) -> bool:
    outputs = [shard.output(output) for output in settings.outputs]
    return all(output.exists() and not work_folder(output).exists() for output in outputs)


@contextmanager
def _processes(
    settings: Settings, shards: list[Shard], folder: Path, overwrite: bool
) -> Iterator[dict[Shard, tuple[subprocess.Popen[bytes], Path]]]:
    running: dict[Shard, tuple[subprocess.Popen[bytes], Path]] = {}
    try:
        for shard in shards:
            device = settings.device if settings.device == "cpu" else f"cuda:{shard.number - 1}"
            options = settings.shown() | {"shard": str(shard), "device": device, "devices": 1}
            config = folder / f"{shard.number}.yaml"
            config.write_text(yaml.safe_dump(options), encoding="utf-8")
            log = folder / f"{shard.number}.log"
            command = [sys.executable, "-m", "protea", "embed", "--config", str(config)]
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    command + ["--overwrite"] * overwrite, stdout=subprocess.DEVNULL, stderr=stream
                )
            running[shard] = process, log
        yield running
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _wait(running: dict[Shard, tuple[subprocess.Popen[bytes], Path]], settings: Settings, watcher: Watcher) -> None:
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


def _remove(output: Path) -> None:
    for path in (output, output.with_name(f"{output.name}.report.tsv"), output.with_name(f"{output.name}.run.yaml")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
