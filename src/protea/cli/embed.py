"""``protea embed``: sequences in, embeddings out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protea.cli.options import Device, Dtype, Model
from protea.errors import UsageError

if TYPE_CHECKING:
    from protea.embed.files import Job, Totals
    from protea.language_model import LanguageModel


def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="IN.fasta...", help="FASTA, also .gz .bz2 .xz .zst; - is standard input."),
    ],
    sequences: Annotated[
        Path | None,
        typer.Option("-o", "--sequences", metavar="OUT", help="One vector a sequence: OUT.parquet or OUT.h5."),
    ] = None,
    residues: Annotated[
        Path | None, typer.Option("-r", "--residues", metavar="OUT", help="One vector a residue: OUT.h5.")
    ] = None,
    model: Model = None,
    pool: Annotated[
        str,
        typer.Option(metavar="NAMES", help="For -o: mean, max, std (over residues), bos; several by comma."),
    ] = "mean",
    layers: Annotated[
        str, typer.Option(metavar="NUMBERS", help="0 is the embedding, -1 the last layer; several by comma.")
    ] = "-1",
    dtype: Dtype = "float32",
    device: Device = "auto",
    long: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="A sequence over the model's limit (1,022 residues; 510 for ESM-1nv): full, truncate or error.",
        ),
    ] = "full",
    token_budget: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens computed at a time; bounds memory.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
) -> None:
    """Embed protein sequences: one vector a sequence (-o), one a residue (-r), or both in one pass.

    \b
    Examples:
      protea embed proteins.fasta -m esm2_t6_8M_UR50D -o proteins.parquet
      protea embed a.fasta.gz b.fasta -m my-model/ -r residues.h5 --layers 0,3,-1
      zcat big.fasta.gz | protea embed - -m my-model/ -o big.h5 --pool mean,max
    """
    from protea.embed.engine import parse_long, resolve_layers
    from protea.embed.files import Job
    from protea.embed.pooling import check_poolings
    from protea.embed.stores import RESIDUE_SUFFIXES, SEQUENCE_SUFFIXES, check_path
    from protea.language_model import load

    if sequences is None and residues is None:
        raise UsageError(
            "nothing to write: name an output with -o (one vector a sequence) or -r (one vector a residue)"
        )
    if sequences == residues:
        raise UsageError(f"-o and -r both name {sequences}; give each its own file")
    policy = parse_long(long)
    poolings = check_poolings(_split(pool))
    numbers = _numbers(layers)
    for path, suffixes, option in ((sequences, SEQUENCE_SUFFIXES, "-o"), (residues, RESIDUE_SUFFIXES, "-r")):
        if path is not None:
            check_path(path, suffixes, option, overwrite=overwrite)
    language_model = load(model, device=device, dtype=dtype)
    job = Job(
        inputs=tuple(inputs),
        sequences=sequences,
        residues=residues,
        layers=resolve_layers(numbers, language_model.module),
        poolings=poolings,
        long=policy,
        token_budget=token_budget,
    )
    start = time.perf_counter()
    totals = _run(job, language_model)
    _report(job, language_model, totals, time.perf_counter() - start)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _split(text)]
    except ValueError as error:
        raise UsageError(f"--layers {text!r}: expected whole numbers by comma, as in 0,3,-1") from error


def _run(job: Job, model: LanguageModel) -> Totals:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from protea.embed.files import run, scan

    settings = {
        "version": _package_version(),
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": job.layers,
        "pool": job.poolings,
        "long": job.long,
    }
    columns = (
        TextColumn("embedding"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.completed:,.0f} residues"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        expected = scan(job, model.module)
        task = progress.add_task("embed", total=expected.residues if expected else None)
        return run(job, model.module, settings, lambda encoded: progress.advance(task, len(encoded.ids)))


def _package_version() -> str:
    import protea

    return str(protea.__version__)


def _report(job: Job, model: LanguageModel, totals: Totals, seconds: float) -> None:
    width = model.config.hidden_size
    if job.sequences is not None:
        typer.echo(f"{job.sequences}: {totals.records:,} sequences x {width} values ({', '.join(job.poolings)})")
    if job.residues is not None:
        typer.echo(f"{job.residues}: {totals.records:,} sequences, {totals.residues:,} residues x {width} values")
    if totals.truncated:
        limit = model.module.trained_tokens - 2
        typer.echo(
            f"protea: note: {totals.truncated:,} sequences were truncated to their first {limit:,} residues; "
            "truncated_from in the output has their full lengths",
            err=True,
        )
    typer.echo(
        f"{totals.residues:,} residues in {seconds:.1f} s ({totals.residues / seconds:,.0f} residues/s), "
        f"{model.dtype}, {model.device}",
        err=True,
    )
