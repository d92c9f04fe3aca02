"""Shards of an output: the GPUs of one machine, or many machines, compute them; merging joins them to one output."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.embed.embeddings import resolve_layers
from protea.embed.finished import check_complete, identity, input_fingerprint, reading
from protea.embed.outputs import (
    EmbeddingOutput,
    RunJournal,
    check_place,
    outputs_of,
    publish,
    run_error,
)
from protea.embed.settings import PROVENANCE, EmbedSettings, Shard
from protea.embed.stores import kind_of, open_store, read_store
from protea.embed.survey import Totals
from protea.errors import DeviceError, OutputError, ProteaError, ResumeError, UsageError
from protea.fasta import flows
from protea.infer.loading import computing_dtype, stored_weights
from protea.journal import JOURNAL, complete, differences, work_path
from protea.output import note_what_is_replaced, report_path
from protea.progress import SILENT, Progress
from protea.remote import RemoteTask, ray_cluster
from protea.text import counted

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


Computing = Callable[[list[Shard], EmbedSettings, Path, Progress], None]
"""Computes some shards of settings whose outputs are in a folder, and waits for them."""


def run_on_devices(settings: EmbedSettings, progress: Progress, *, overwrite: bool) -> Totals:
    """Embed with ``settings.devices`` processes.

    On a CPU (``device="cpu"``) the processes share the cores. The numbers are those of one process with as many threads
    as each of them has. If a process fails, the others are stopped.
    """
    count = settings.devices
    if settings.device != "cpu" and torch.cuda.device_count() < count:
        raise DeviceError(f"--devices {count}: this machine has {counted(torch.cuda.device_count(), 'GPU')}")
    return run_in_shards(settings, count, "devices", _compute, progress, overwrite=overwrite)


def run_on_ray(
    settings: EmbedSettings, address: str, progress: Progress, *, shards: int | None, cpus: int, overwrite: bool
) -> Totals:
    """Embed with a Ray cluster whose machines share the disk of the outputs; each shard is a task with ``cpus`` cores.

    A finished shard is not computed again, and a shard whose process died continues from its journal.
    """
    absolute = _absolute(settings)
    with ray_cluster(address, cpus=cpus, gpu=settings.device != "cpu") as cluster:

        def compute(wanted: list[Shard], inner: EmbedSettings, folder: Path, progress: Progress) -> None:
            cluster.check_machines(folder, [Path(path) for path in inner.inputs])
            tasks = []
            for shard in wanted:
                config = _config(shard, inner, folder, inner.device)
                tasks.append(RemoteTask(f"shard {shard}", ["embed", "--config", str(config)], _log(folder, shard)))
            following = _Following(wanted, inner, progress)
            cluster.run(tasks, following.look)

        count = shards or cluster.shards
        return run_in_shards(absolute, count, "ray", compute, progress, overwrite=overwrite, shown=settings.shown())


def run_in_shards(
    settings: EmbedSettings,
    count: int,
    kind: str,
    compute: Computing,
    progress: Progress,
    *,
    overwrite: bool,
    shown: Mapping[str, Any] | None = None,
) -> Totals:
    """Embed in shards, which are in the hidden folder ``.OUT.KIND`` beside the first output, and merge them.

    After an error, the same command continues each of them. ``shown`` are the settings that the outputs tell.
    """
    first = settings.outputs[0]
    folder = first.with_name(f".{first.name}.{kind}")
    try:
        resuming = folder.exists() and not overwrite
        if not (resuming or overwrite) and all(map(os.path.lexists, settings.outputs)):
            return _check_complete(settings, progress)
        for output in settings.outputs:
            check_place(output, kind_of(output, settings.option(output)), overwrite=overwrite or resuming)
        _claim(folder, settings, count, resuming=resuming)
        shards = [Shard(number=number, of=count) for number in range(1, count + 1)]
        inner = settings.model_copy(update=_inside(settings, folder))
        progress.begin("embedding")
        compute([shard for shard in shards if not _finished(inner, shard)], inner, folder, progress)
        for output, hidden in zip(settings.outputs, inner.outputs, strict=True):
            # An earlier attempt may have stopped between two outputs; its first output is merged again.
            parts = [shard.output(hidden) for shard in shards]
            again, told = overwrite or resuming, shown or settings.shown()
            totals = merge(output, parts, overwrite=again, settings=told, progress=progress)
        shutil.rmtree(folder)
    except OSError as error:
        raise run_error(error, first) from error
    return totals


def _absolute(settings: EmbedSettings) -> EmbedSettings:
    """The settings with paths that hold in any folder."""
    if once := [path for path in settings.inputs if flows(path)]:
        raise UsageError(f"--ray needs files that every machine can read; {once[0]} is not one")
    here = {name: getattr(settings, name) for name in ("sequences", "residues", "logits")}
    paths: dict[str, Any] = {name: path.absolute() for name, path in here.items() if path is not None}
    model = Path(settings.model)
    if model.exists():
        paths["model"] = str(model.absolute())
    return settings.model_copy(update=paths | {"inputs": tuple(str(Path(path).absolute()) for path in settings.inputs)})


def _check_complete(settings: EmbedSettings, progress: Progress) -> Totals:
    """The counts of outputs that this run would write again; an ``OutputError`` if it would write others."""
    with open_checkpoint(locate(settings.model)) as checkpoint:
        model = checkpoint.model
    computed_in = computing_dtype(settings.device, settings.dtype, fast=settings.fast)
    wanted = identity(settings, stored_weights(settings.model), computed_in)
    wanted |= {"input": input_fingerprint(settings.inputs, settings.columns)}
    provenance = check_complete(outputs_of(settings, resolve_layers(settings.layers, model), model), wanted)
    for output in settings.outputs:
        progress.note(complete(output))
    return Totals(**provenance["counts"])


def _claim(folder: Path, settings: EmbedSettings, count: int, *, resuming: bool) -> None:
    """Check that the shards in the folder are of these settings and inputs, or clear the folder."""
    stats = [(path, Path(path).stat()) for path in settings.inputs if Path(path).is_file()]
    plan = settings.shown() | {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}
    plan |= {"shards": count}
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
    hidden = {path: folder / f"{number}-{path.name}" for number, path in enumerate(settings.outputs)}
    places = {"sequences": settings.sequences, "residues": settings.residues, "logits": settings.logits}
    return {name: hidden[path] for name, path in places.items() if path is not None}


def _finished(settings: EmbedSettings, shard: Shard) -> bool:
    outputs = [shard.output(output) for output in settings.outputs]
    return all(output.exists() and not work_path(output).exists() for output in outputs)


def _compute(shards: list[Shard], settings: EmbedSettings, folder: Path, progress: Progress) -> None:
    """Compute each shard in a process, and wait for all; their progress is read from their journals."""
    following = _Following(shards, settings, progress)
    running: dict[Shard, subprocess.Popen[bytes]] = {}
    try:
        for shard in shards:
            running[shard] = _started(shard, settings, folder)
        while True:
            codes = [process.poll() for process in running.values()]
            for shard, code in zip(shards, codes, strict=True):
                if code:
                    lines = _log(folder, shard).read_text(errors="replace").strip().splitlines()
                    last = lines[-1].removeprefix("protea: error: ") if lines else f"exit code {code}"
                    raise ProteaError(f"shard {shard}: {last}")
            following.look()
            if None not in codes:
                return
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _started(shard: Shard, settings: EmbedSettings, folder: Path) -> subprocess.Popen[bytes]:
    device = settings.device if settings.device == "cpu" else f"cuda:{shard.number - 1}"
    config = _config(shard, settings, folder, device)
    command = [sys.executable, "-c", _CHILD, "embed", "--config", str(config)]
    with _log(folder, shard).open("wb") as stream:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream)


def _config(shard: Shard, settings: EmbedSettings, folder: Path, device: str) -> Path:
    """The file of options that computes a shard."""
    config = folder / f"{shard.number}.yaml"
    options = settings.shown() | {"shard": str(shard), "device": device, "devices": 1}
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    return config


class _Following:
    """Tells a progress how many residues of some shards are computed, by their journals."""

    def __init__(self, shards: list[Shard], settings: EmbedSettings, progress: Progress) -> None:
        self._outputs = [shard.output(settings.outputs[0]) for shard in shards]
        self._progress, self._done = progress, dict.fromkeys(self._outputs, 0)
        self._shown = 0

    def look(self) -> None:
        """Read the journals again; those of finished shards are gone, what they told before still counts."""
        for output in self._outputs:
            self._done[output] = max(self._done[output], _residues(work_path(output) / JOURNAL))
        done = sum(self._done.values())
        self._progress.advance(max(0, done - self._shown))
        self._shown = max(done, self._shown)


def _log(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.number}.log"


def _residues(journal: Path) -> int:
    try:
        entry: dict[str, Any] = json.loads(journal.read_text())
    except (OSError, ValueError):
        return 0
    return int(entry["progress"]["totals"]["residues"])


def find_shards(output: Path) -> list[Path]:
    """The shards of an output, in order; ``OutputError`` if some are missing or belong to another number of shards."""
    pattern = re.compile(rf"{re.escape(output.stem)}\.shard-(\d+)-of-(\d+){re.escape(output.suffix)}")
    paths = output.parent.iterdir() if output.parent.is_dir() else iter(())
    matches = {match: path for path in paths if (match := pattern.fullmatch(path.name))}
    if not matches:
        raise OutputError(f"{output}: no shards {output.stem}.shard-1-of-N{output.suffix} beside it")
    counts = {int(match[2]) for match in matches}
    if len(counts) > 1:
        sets = " and of ".join(map(str, sorted(counts)))
        raise OutputError(f"{output}: there are shards of {sets}; remove those that do not belong to it")
    by_number = {int(match[1]): path for match, path in matches.items()}
    count = counts.pop()
    if missing := [number for number in range(1, count + 1) if number not in by_number]:
        raise OutputError(f"{output}: shard {', '.join(map(str, missing))} of {count} is missing; run it first")
    return [by_number[number] for number in range(1, count + 1)]


def merge(
    output: Path,
    shards: list[Path] | None = None,
    *,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Totals:
    """Write an output from its shards, which stay, and return the counts of the whole output.

    If the output exists and is of these shards already, there is nothing to do.
    The shards are in order; by default they are those beside the output. ``settings`` replace theirs in the output.
    """
    kind = kind_of(output, "merge")
    try:
        shards = _shards_of(output, kind, overwrite=overwrite) if shards is None else shards
        contents, rows = [], []
        for shard in shards:
            with _reading(shard):
                contents.append(read_store(shard, kind))
                report = report_path(shard).read_text(encoding="utf-8")
                rows += [line.split("\t") for line in report.splitlines()[1:]]
        provenance = _common(output, [content.provenance for content in contents], shards) | dict(settings or {})
        merged = EmbeddingOutput(output, kind, contents[0].layout)
        counts = Totals(**provenance[PROVENANCE]["counts"])
        if not os.path.lexists(output):
            note_what_is_replaced(output)
        elif not overwrite:
            wanted = {**provenance[PROVENANCE], **provenance}
            del wanted[PROVENANCE]
            check_complete([merged], wanted)
            progress.note(complete(output))
            return counts
        with RunJournal([output]) as journal:
            if journal.state is not None:
                raise ResumeError(f"{output}: an unfinished run is writing it; finish that run first")
            store = open_store(kind, journal.folders[0], merged.layout, None)
            try:
                for shard, content in zip(shards, contents, strict=True):
                    with _reading(shard):
                        for record, arrays in content.records:
                            store.write(record, arrays)
                path = store.finish(provenance)
            finally:
                store.abandon()
            publish(path, output, rows, provenance)
            journal.remove()
    except OSError as error:
        raise run_error(error, output) from error
    return counts


def _shards_of(output: Path, kind: str, *, overwrite: bool) -> list[Path]:
    check_place(output, kind, overwrite=True)
    try:
        return find_shards(output)
    except OutputError:
        check_place(output, kind, overwrite=overwrite)  # without its shards, what exists cannot be compared
        raise


def _reading(shard: Path) -> AbstractContextManager[None]:
    return reading(shard, "damaged, or not a shard of Protea's", "run that shard again")


def _common(output: Path, provenances: list[dict[str, Any]], shards: list[Path]) -> dict[str, Any]:
    """The provenance that all shards share, with the sums of their counts."""
    shared = []
    for provenance, shard in zip(provenances, shards, strict=True):
        with _reading(shard):
            own = {"shard": None, "device": None, PROVENANCE: None, "counts": None}
            shared.append({**provenance, **provenance[PROVENANCE], **own})
    for plan, shard in zip(shared[1:], shards[1:], strict=True):
        if changed := differences(shared[0], plan):
            raise OutputError(f"{output}: {shards[0].name} and {shard.name} are of different runs ({changed})")
    counts = [Totals(**provenance[PROVENANCE]["counts"]) for provenance in provenances]
    total = {name: sum(getattr(count, name) for count in counts) for name in asdict(counts[0])}
    # One process that computes all does not divide.
    circumstances = {name: value for name, value in provenances[0][PROVENANCE].items() if name != "division"}
    return provenances[0] | {"shard": None, PROVENANCE: circumstances | {"counts": total}}
