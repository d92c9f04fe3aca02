"""``protea embed``: sequences in, embeddings out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.load import load_to_compute, say_what_fast_gains
from protea.cli.options import Device, Model
from protea.cli.terminal import progress_bars, tell

if TYPE_CHECKING:
    from protea.embed.run import EmbedRun, Watcher
    from protea.embed.settings import EmbedSettings
    from protea.embed.survey import Totals
    from protea.models.encoder import Encoder

_ODD = ("truncated", "windowed", "altered", "renamed", "skipped")
"""Counts that the report has lines of."""


def embed(
    ctx: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IN.fasta...", help="FASTA, also .gz .bz2 .xz .zst; - is standard input.", show_default=False
        ),
    ] = None,
    sequences: Annotated[
        Path | None,
        typer.Option(
            "-o", "--sequences", metavar="OUT", help="One vector a sequence: OUT.parquet, OUT.h5, or a folder."
        ),
    ] = None,
    residues: Annotated[
        Path | None,
        typer.Option("-r", "--residues", metavar="OUT", help="One vector a residue: OUT.h5, OUT.parquet, or a folder."),
    ] = None,
    model: Model = bundled.NAME,
    pool: Annotated[
        str,
        typer.Option(metavar="NAMES", help="For -o: mean, max, std (over residues), bos; several by comma."),
    ] = "mean",
    layers: Annotated[
        str, typer.Option(metavar="NUMBERS", help="0 is the embedding, -1 the last layer; several by comma.")
    ] = "-1",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="What is computed in: float32, bfloat16 or float16.")
    ] = "float32",
    fast: Annotated[
        bool, typer.Option("--fast", help="Compute in bfloat16 where the hardware does so natively.")
    ] = False,
    store: Annotated[str, typer.Option(metavar="TYPE", help="What is written: float32 or float16.")] = "float32",
    compression: Annotated[
        int | None, typer.Option(metavar="LEVEL", help="gzip level of HDF5 datasets, 1 to 9; none by default.")
    ] = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(metavar="N", help="GPUs of this machine to share the work among.")] = 1,
    long: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="A sequence over 1,022 residues (510 for ESM-1nv): truncate, window, full or error.",
        ),
    ] = "truncate",
    unknown: Annotated[
        str, typer.Option(metavar="POLICY", help="A letter outside the alphabet: x (becomes X), error, or skip.")
    ] = "x",
    duplicates: Annotated[
        str, typer.Option(metavar="POLICY", help="A record whose id was used before: error, rename or skip.")
    ] = "error",
    token_budget: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens computed at a time; by default what the memory allows."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="i/N", help="Do the i-th of N equal shares, into OUT.shard-i-of-N; see protea merge."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="RUN.yaml", help="Options from a file, as OUT.run.yaml is one; flags override it."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist, and forget unfinished ones.")
    ] = False,
) -> None:
    """Embed protein sequences: one vector a sequence (-o), one a residue (-r), or both in one pass.

    A run that was interrupted goes on when the same command is given again. What became of records that could not be
    taken as they were is in OUT.report.tsv.

    \b
    Examples:
      protea embed proteins.fasta -m esm2_t6_8M_UR50D -o proteins.parquet
      protea embed a.fasta.gz b.fasta -m my-model/ -r residues.h5 --layers 0,3,-1 --fast
      zcat big.fasta.gz | protea embed - -m my-model/ -o big.h5 --pool mean,max
      protea embed big.fasta -m my-model/ -o big.h5 --shard $SLURM_ARRAY_TASK_ID/16
      protea embed --config proteins.parquet.run.yaml -o again.parquet
    """
    from protea.embed.settings import parse, read_config

    values: dict[str, Any] = {} if config is None else read_config(config)
    values |= _given(ctx)
    settings = parse(values, "protea embed" if config is None else f"--config {config}")
    with interruptible():
        _run(settings, overwrite=overwrite)


def _run(settings: EmbedSettings, *, overwrite: bool) -> None:
    from protea.embed.run import EmbedRun

    if settings.devices > 1:
        totals = _run_on_devices(settings, overwrite=overwrite)
        for output in settings.outputs:
            typer.echo(f"{output}: {totals.embedded:,} sequences, {totals.residues:,} residues")
        return
    start = time.perf_counter()
    model_at_work = load_to_compute(settings.model, device=settings.device, dtype=settings.dtype, fast=settings.fast)
    with _bars() as watcher:
        run = EmbedRun(
            settings, model_at_work.module, model_at_work.weights_sha256(), overwrite=overwrite, watcher=watcher
        )
        totals = run()
    _report(run, model_at_work.module, totals, time.perf_counter() - start)


def _given(ctx: typer.Context) -> dict[str, Any]:
    """The options on the command line, without defaults."""
    source = ctx.get_parameter_source
    named = {name: value for name, value in ctx.params.items() if name not in ("config", "overwrite")}
    return {name: value for name, value in named.items() if getattr(source(name), "name", "") == "COMMANDLINE"}


def _run_on_devices(settings: EmbedSettings, *, overwrite: bool) -> Totals:
    from protea.embed.devices import run_on_devices

    with _bars() as watcher:
        return run_on_devices(settings, watcher, overwrite=overwrite)


@contextmanager
def _bars() -> Iterator[Watcher]:
    from protea.cli.progress import Bars

    with progress_bars("residues") as progress:
        yield Bars(progress)


def _report(run: EmbedRun, model: Encoder, totals: Totals, seconds: float) -> None:
    for output in run.outputs:
        kinds = ", ".join(output.layout.kinds)
        typer.echo(
            f"{output.path}: {totals.embedded:,} sequences, {totals.residues:,} residues, "
            f"{output.layout.width} values each ({kinds})"
        )
    odd = [f"{count:,} {what}" for what in _ODD if (count := getattr(totals, what))]
    if odd:
        tell(f"{', '.join(odd)}: see {run.outputs[0].path}.report.tsv")
    computed = str(model.compute_dtype).removeprefix("torch.")
    typer.echo(f"{totals.residues:,} residues in {seconds:.1f} s, {computed}, {model.device}", err=True)
    say_what_fast_gains(model, "at a cosine of at least 0.999 to these numbers")
