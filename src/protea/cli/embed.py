"""``protea embed``: sequences in, embeddings out."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli import options
from protea.cli.interrupt import interruptible
from protea.cli.options import FASTA, Device, Dtype, Fast, Model, TokenBudget, loader
from protea.cli.terminal import aside, bars, tell, tell_doubts
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.embed.settings import EmbedSettings
    from protea.embed.survey import Totals
    from protea.progress import Progress

_OF_COMMAND = ("config", "update", "overwrite", "ray", "shards", "cpus_per_shard")
"""Options that are no settings of a run."""

_REPORTED = ("truncated", "windowed", "altered", "renamed", "gapped", "skipped")
"""Counts of records that the report lists."""


@options.options_of(options.columns, options.letters, options.computing)
def embed(
    ctx: typer.Context,
    inputs: Annotated[list[str] | None, FASTA] = None,
    sequences: Annotated[
        Path | None,
        typer.Option(
            "-o", "--sequences", metavar="OUT", help="One vector a sequence: .parquet, .h5, .csv, .npz, or a folder."
        ),
    ] = None,
    residues: Annotated[
        Path | None,
        typer.Option("-r", "--residues", metavar="OUT", help="One vector per residue: .h5, .parquet, or a folder."),
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Log-probabilities and entropy of each residue: .h5, .parquet, or a folder."),
    ] = None,
    model: Model = bundled.NAME,
    pool: Annotated[
        str, typer.Option(metavar="NAMES", help="Poolings for -o, by comma: mean, max, std (over residues), bos.")
    ] = "mean",
    layers: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Layers, by comma: 0 is the embedding, -1 the last layer.")
    ] = "-1",
    dtype: Dtype = "float32",
    fast: Fast = False,
    store: Annotated[str, typer.Option(metavar="TYPE", help="Type to write: float32 or float16.")] = "float32",
    compression: Annotated[
        int | None, typer.Option(metavar="LEVEL", help="gzip level of HDF5 datasets, 1 to 9; none by default.")
    ] = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(metavar="N", help="Number of GPUs that share the work.")] = 1,
    long: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="What to do with a sequence that is longer than in training: truncate, window, full, error.",
        ),
    ] = "truncate",
    duplicates: Annotated[
        str, typer.Option(metavar="POLICY", help="What to do with a repeated id: error, rename, skip.")
    ] = "error",
    token_budget: TokenBudget = None,
    shard: options.Shard = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="RUN.yaml", help="Read options from a file, such as OUT.run.yaml; flags override it."),
    ] = None,
    ray: options.Ray = None,
    shards: options.Shards = None,
    cpus_per_shard: options.CpusPerShard = 1,
    update: Annotated[
        bool, typer.Option("--update", help="Compute only new and changed sequences; keep the others of the output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing outputs and drop unfinished ones.")
    ] = False,
    **_reading: Any,
) -> None:
    """Embed protein sequences: one vector per sequence (-o), one per residue (-r), predictions (--logits), in one pass.

    After an interruption the same command continues; after the end it finds nothing to do. OUT.report.tsv lists every
    record that was truncated, altered, renamed or skipped.

    \b
    Examples:
      protea embed proteins.fasta -m esm2_t6_8M_UR50D -o proteins.parquet
      protea embed a.fasta.gz b.fasta -m my-model/ -r residues.h5 --layers 0,3,-1 --fast
      zcat big.fasta.gz | protea embed - -m my-model/ -o big.h5 --pool mean,max
      protea embed big.fasta -m my-model/ -o big.h5 --shard $SLURM_ARRAY_TASK_ID/16
      protea embed big.fasta -m my-model/ -o big.h5 --ray auto --shards 64
      protea embed --config proteins.parquet.run.yaml -o again.parquet
      protea embed grown.fasta -m esm2_t6_8M_UR50D -o proteins.parquet --update
    """
    from protea.embed.settings import parse, read_config

    values: dict[str, Any] = {} if config is None else read_config(config)
    values |= _given(ctx)
    settings = parse(values, "protea embed" if config is None else f"--config {config}")
    if update and (overwrite or settings.devices > 1 or settings.shard is not None):
        raise UsageError("--update works alone, in one process; leave out --overwrite, --devices and --shard")
    if ray is not None and (update or settings.devices > 1 or settings.shard is not None):
        raise UsageError("--ray makes the shards itself; leave out --update, --devices and --shard")
    if ray is None and shards is not None:
        raise UsageError("--shards is for --ray; without it, --shard i/N computes one share")
    with interruptible():
        if ray is not None:
            _embed_in_shards(settings, partial(_on_ray, ray, shards, cpus_per_shard), overwrite=overwrite)
        elif settings.devices > 1:
            from protea.embed.sharded import run_on_devices

            _embed_in_shards(settings, run_on_devices, overwrite=overwrite)
        else:
            _embed(settings, overwrite=overwrite, update=update)


def _given(ctx: typer.Context) -> dict[str, Any]:
    """The options on the command line, without defaults."""
    given = {name: value for name, value in ctx.params.items() if name not in _OF_COMMAND}
    return {name: value for name, value in given.items() if options.is_given(ctx, name)}


def _on_ray(
    address: str, shards: int | None, cpus: int, settings: EmbedSettings, progress: Progress, *, overwrite: bool
) -> Totals:
    from protea.embed.sharded import sharded
    from protea.scatter import run_on_ray

    command, gpu = sharded(settings, progress), settings.device != "cpu"
    return run_on_ray(command, address, progress, shards=shards, cpus=cpus, gpu=gpu, overwrite=overwrite)


def _embed_in_shards(settings: EmbedSettings, run: Callable[..., Totals], *, overwrite: bool) -> None:
    from protea.letters import ReportRow
    from protea.output import report_path

    with bars("residues") as progress:
        totals = run(settings, progress=progress, overwrite=overwrite)
    for output in settings.outputs:
        typer.echo(f"{output}: {counted(totals.embedded, 'sequence')}, {counted(totals.residues, 'residue')}")
    report = report_path(settings.outputs[0]).read_text(encoding="utf-8").splitlines()[1:]
    tell_doubts([ReportRow(*line.split("\t")) for line in report])


def _embed(settings: EmbedSettings, *, overwrite: bool, update: bool) -> None:
    from protea.device import native_bfloat16
    from protea.embed.run import EmbedRun

    start = time.perf_counter()
    loaded = loader(device=settings.device, dtype=settings.dtype, fast=settings.fast)(settings.model)
    model = loaded.module
    with bars("bytes") as progress:
        files = loaded.weights_sha256(progress)
    with bars("residues") as progress:
        run = EmbedRun(settings, model, files, overwrite=overwrite, update=update, progress=progress)
        totals = run()
    for output in run.outputs:
        typer.echo(
            f"{output.path}: {counted(totals.embedded, 'sequence')}, {counted(totals.residues, 'residue')}, "
            f"{output.layout.width} values each ({', '.join(output.layout.kinds)})"
        )
    if run.was_complete:
        return
    reported = [f"{count:,} {what}" for what in _REPORTED if (count := getattr(totals, what))]
    if totals.nucleotides:
        reported.append(f"{counted(totals.nucleotides, 'record')} that look like DNA or RNA")
    if reported:
        tell(f"{', '.join(reported)}: see {run.outputs[0].path}.report.tsv")
    seconds = time.perf_counter() - start
    aside(f"{counted(totals.residues, 'residue')} in {seconds:.1f} s, {model.precision}, {model.device}")
    if model.precision == "float32" and native_bfloat16(model.device):
        tell("this hardware multiplies bfloat16 natively: --fast is faster; docs/embedding.md says how near it comes")
