"""``protea embed`` in shards: on the GPUs of one machine or on a Ray cluster; and the merge of any run's shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.embed.embeddings import resolve_layers
from protea.embed.finished import check_complete, identity, input_fingerprint, reading
from protea.embed.outputs import EmbeddingOutput, RunJournal, check_place, outputs_of, publish, run_error
from protea.embed.settings import PROVENANCE, EmbedSettings
from protea.embed.stores import Contents, kind_of, read_store
from protea.embed.survey import Totals
from protea.errors import DeviceError, OutputError, ResumeError
from protea.infer.loading import computing_dtype, stored_weights
from protea.journal import JOURNAL, complete, differences, work_path
from protea.output import note_what_is_replaced, report_path
from protea.progress import SILENT, Progress
from protea.scatter import ShardedCommand, compute_here, local_files, run_in_shards
from protea.shards import Shard, check_shard
from protea.text import counted


def run_on_devices(settings: EmbedSettings, progress: Progress, *, overwrite: bool) -> Totals:
    """Embed with ``settings.devices`` processes.

    On a CPU (``device="cpu"``) the processes share the cores. The numbers are those of one process with as many threads
    as each of them has. If a process fails, the others are stopped.
    """
    count = settings.devices
    if settings.device != "cpu" and torch.cuda.device_count() < count:
        raise DeviceError(f"--devices {count}: this machine has {counted(torch.cuda.device_count(), 'GPU')}")
    command = sharded(settings, progress, each_its_gpu=settings.device != "cpu")
    return run_in_shards(command, count, "devices", compute_here, progress, overwrite=overwrite)


def sharded(settings: EmbedSettings, progress: Progress, *, each_its_gpu: bool = False) -> ShardedCommand[Totals]:
    """The run as one that is computed in shards; with ``each_its_gpu``, the first shard computes on the first GPU."""

    def arguments(shard: Shard, hidden: Mapping[Path, Path]) -> list[str]:
        device = f"cuda:{shard.number - 1}" if each_its_gpu else settings.device
        places = {"sequences": settings.sequences, "residues": settings.residues, "logits": settings.logits}
        inner = {name: hidden[path] for name, path in places.items() if path is not None}
        options = settings.model_copy(update=inner).shown() | {"shard": str(shard), "device": device, "devices": 1}
        config = hidden[settings.outputs[0]].with_name(f"{shard.number}.yaml")
        config.write_text(yaml.safe_dump(options), encoding="utf-8")
        return ["embed", "--config", str(config)]

    def merged(output: Path, shards: list[Path], overwrite: bool) -> Totals:
        return merge(output, shards, overwrite=overwrite, settings=settings.shown(), progress=progress)

    return ShardedCommand(
        outputs=settings.outputs,
        inputs=[*settings.inputs, *local_files(settings.model)],
        options=settings.shown(),
        arguments=arguments,
        check=lambda path, overwrite: check_place(path, kind_of(path, settings.option(path)), overwrite=overwrite),
        finished=lambda: _check_complete(settings, progress),
        merge=merged,
        title="embedding",
        done=computed_residues,
    )


def computed_residues(shard: Path) -> int:
    """How many residues of an unfinished shard are computed, by its journal."""
    try:
        entry: dict[str, Any] = json.loads((work_path(shard) / JOURNAL).read_text())
        return int(entry["progress"]["totals"]["residues"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


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


def stored(shard: Path, output: Path) -> tuple[EmbeddingOutput, Contents]:
    """An output as a finished shard of it is, and what is in the shard."""
    kind = kind_of(output, "merge")
    contents = read_store(shard, kind)
    return EmbeddingOutput(output, kind, contents.layout), contents


def merge(
    output: Path,
    shards: list[Path],
    *,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    opened: Callable[[Path, Path], tuple[EmbeddingOutput, Contents]] = stored,
    progress: Progress = SILENT,
) -> Totals:
    """Write an output from its shards, which stay, and return the counts of the whole output.

    If the output exists and is of these shards already, there is nothing to do.
    The shards are in order. ``settings`` replace theirs in the output; ``opened`` opens a shard of an output.
    """
    try:
        parts: list[EmbeddingOutput] = []
        contents: list[Contents] = []
        rows: list[list[str]] = []
        for shard in shards:
            with _reading(shard):
                part, content = opened(shard, output)
                parts.append(part)
                contents.append(content)
                check_shard(shard)
                report = report_path(shard).read_text(encoding="utf-8")
                rows += [line.split("\t") for line in report.splitlines()[1:]]
        provenance = _common(output, [content.provenance for content in contents], shards)
        provenance |= {name: value for name, value in (settings or {}).items() if name in provenance}
        merged = parts[0]
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
            store = merged.open(journal.folders[0], None)
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
