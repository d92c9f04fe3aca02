"""``protea data``: make and describe stores of training data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea.cli.interrupt import interruptible
from protea.cli.options import FASTA, AsJson, Commands, Gaps, IdColumn, SequenceColumn, Unknown, options_of
from protea.cli.terminal import aside, bars, show_json, tell
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.data.build import Numbers
    from protea.data.build_settings import BuildSettings

_SEARCH_FLAGS = "--min-seq-id 0.5 --alignment-mode 3 --max-seqs 300 -s 7 -c 0.8 --cov-mode 0"

data = typer.Typer(
    name="data",
    cls=Commands,
    help="Training data: from FASTA to a store of clusters, filtered, sampled and masked.",
    epilog="docs/data.md has every option, every file of a store, and what can be wrong with input.",
    rich_markup_mode=None,
)


@data.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


# Options that several commands share. Their names are those of BuildSettings.


def _sampling(
    *,
    valid: Annotated[str, typer.Option(metavar="N|P%", help="Clusters drawn for validation.")] = "0.5%",
    test: Annotated[str, typer.Option(metavar="N|P%", help="Clusters drawn for testing; no filter uses them.")] = "0",
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    filtered: Annotated[
        bool, typer.Option("--filter/--no-filter", help="Remove training clusters similar to a validation cluster.")
    ] = True,
    filter_flags: Annotated[
        str | None, typer.Option(metavar="FLAGS", help=f"Flags for mmseqs search.  [default: {_SEARCH_FLAGS}]")
    ] = None,
    search_from: Annotated[
        str, typer.Option(metavar="SIDE", help="Split whose clusters are the queries: train, or valid (much faster).")
    ] = "train",
    leave_out: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Skip records by header, as in 'Tax=synthetic construct'.")
    ] = None,
    mmseqs: Annotated[str, typer.Option(metavar="PROGRAM", help="MMseqs2, by name or path.")] = "mmseqs",
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of MMseqs2; all by default.")] = None,
) -> None: ...


def _common(
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the store.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that exists.")] = False,
    alphabet: Annotated[
        str,
        typer.Option(metavar="NAME", help="The model's alphabet: its name in `protea info MODEL`, in small letters."),
    ] = "esm",
    unknown: Unknown = "x",
    gaps: Gaps = "keep",
    min_length: Annotated[int, typer.Option(metavar="N", help="Skip shorter sequences.")] = 1,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Skip longer sequences.")] = None,
) -> None: ...


def _members(
    *,
    absent: Annotated[
        str, typer.Option(metavar="POLICY", help="A member that is named but has no sequence: error or skip.")
    ] = "error",
    empty: Annotated[
        str, typer.Option(metavar="POLICY", help="A training cluster without members: error, representative or drop.")
    ] = "error",
) -> None: ...


@data.command("uniref")
@options_of(_common, _sampling, _members)
def uniref(
    uniref50: Annotated[list[Path], typer.Option("--uniref50", metavar="FASTA", help="Representatives; repeatable.")],
    uniref90: Annotated[
        list[Path] | None, typer.Option("--uniref90", metavar="FASTA", help="Members; by default the representatives.")
    ] = None,
    members: Annotated[
        Path | None, typer.Option(metavar="TSV", help="The mapping of clusters to members; by default the headers.")
    ] = None,
    *,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Build a store from UniRef: UniRef50's clusters, sampled by their UniRef90 members, as ESM-2 was trained.

    After an interrupt, run the same command again: it continues after the last finished step and gives the same files.

    \b
    Examples:
      protea data uniref --uniref50 uniref50.fasta.gz --uniref90 uniref90.fasta.gz \\
        --members idmapping_selected.tab.gz --valid 0.5% --leave-out 'Tax=(synthetic|artificial)' -o uniref/
      protea data uniref --uniref50 uniref50.fasta.gz --no-filter --valid 5000 --test 1000000 \\
        --max-length 512 --alphabet esm-1nv -o esm1nv-data/
    """
    from protea.data.build_settings import BuildSettings
    from protea.data.from_fasta import build_uniref

    _run(build_uniref, BuildSettings(**settings), uniref50, uniref90 or [], members, overwrite=overwrite)


@data.command("fasta")
@options_of(_common, _sampling)
def fasta(
    inputs: Annotated[list[str], FASTA],
    id_column: IdColumn = None,
    sequence_column: SequenceColumn = None,
    member_flags: Annotated[
        str, typer.Option(metavar="FLAGS", help="Flags for the mmseqs linclust that finds the members.")
    ] = "--min-seq-id 0.9 -c 0.8 --cov-mode 1",
    cluster_flags: Annotated[
        str, typer.Option(metavar="FLAGS", help="Flags for the mmseqs linclust that clusters the members.")
    ] = "--min-seq-id 0.5 -c 0.8 --cov-mode 1",
    *,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Build a store from any sequences: clustered with MMseqs2, members at 90 % identity within clusters at 50 %.

    After an interrupt, run the same command again: it continues after the last finished step and gives the same files.

    \b
    Examples:
      protea data fasta proteins.fasta.gz -o store/
      protea data fasta a.fasta b.fasta --valid 1000 --search-from valid --max-length 1022 -o store/
    """
    from protea.data.build_settings import ClusterSettings
    from protea.data.from_fasta import build_fasta
    from protea.records import InputColumns

    values = ClusterSettings(member_flags=member_flags, cluster_flags=cluster_flags, **settings)
    _run(partial(build_fasta, columns=InputColumns(id_column, sequence_column)), values, inputs, overwrite=overwrite)


_Source = Path | None


def _option(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=f"{text}.")


@data.command("import")
@options_of(_common, _members)
def import_(
    mapping: Annotated[_Source, _option("TSV", "BioNeMo 1: mapping.tsv")] = None,
    uniref50: Annotated[_Source, _option("FASTA", "BioNeMo 1: uniref50_train_filt.fasta")] = None,
    uniref90: Annotated[_Source, _option("FASTA", "BioNeMo 1: uniref90membersandreps_ur50trainfiltreps.fasta")] = None,
    uniref50_valid: Annotated[_Source, _option("FASTA", "BioNeMo 1: uniref50_valid.fasta")] = None,
    csv: Annotated[_Source, _option("DIR", "BioNeMo 1: uf50, with folders train, val and test")] = None,
    members_csv: Annotated[_Source, _option("DIR", "BioNeMo 1: uf90/uf90_csvs")] = None,
    starts: Annotated[_Source, _option("FILE", "BioNeMo 1: starts.mmap")] = None,
    counts: Annotated[_Source, _option("FILE", "BioNeMo 1: counts.mmap")] = None,
    train_clusters: Annotated[_Source, _option("PARQUET", "BioNeMo 2: ur90_id has the members of a cluster")] = None,
    valid_clusters: Annotated[_Source, _option("PARQUET", "BioNeMo 2: ur50_id has a sequence's id")] = None,
    database: Annotated[_Source, _option("SQLITE", "BioNeMo 2: a table protein(id, sequence)")] = None,
    *,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Build a store from data that BioNeMo 1 or 2 divided and filtered.

    \b
    Examples:
      protea data import --mapping mapping.tsv --uniref50 uniref50_train_filt.fasta \\
        --uniref90 ur90_ur50_sampler.fasta -o store/
      protea data import --csv uf50/ --members-csv uf90/uf90_csvs --starts starts.mmap --counts counts.mmap -o store/
      protea data import --train-clusters train.parquet --valid-clusters valid.parquet --database protein.db -o store/
    """
    from protea.data import importers
    from protea.data.build_settings import BuildSettings

    sources = {"--mapping": mapping, "--csv": csv, "--train-clusters": train_clusters}
    if sum(source is not None for source in sources.values()) != 1:
        raise UsageError(f"name what to import with one of {', '.join(sources)}")
    values = BuildSettings(valid="0", filtered=False, **settings)
    if mapping is not None:
        if uniref50 is None or uniref90 is None:
            raise UsageError("--mapping needs --uniref50 and --uniref90")
        _run(importers.import_fasta, values, mapping, uniref50, uniref90, uniref50_valid, overwrite=overwrite)
    elif csv is not None:
        _run(importers.import_csv, values, csv, members_csv, starts, counts, overwrite=overwrite)
    elif database is None:
        raise UsageError("--train-clusters needs --database")
    else:
        _run(importers.import_parquet, values, train_clusters, valid_clusters, database, overwrite=overwrite)


@data.command("info")
@options_of()
def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A store of training data.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw lengths and composition: FILE.png or FILE.svg.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its hash.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a store holds: how it was made, its counts, lengths and composition.

    \b
    Examples:
      protea data info store/
      protea data info store/ --verify --plot store.png
      protea data info store/ --json
    """
    from protea.data import manifest as manifests

    manifest = manifests.read_manifest(folder)
    if verify:
        with interruptible(), bars("bytes") as progress:
            manifests.verify(folder, manifest, progress)
    if plot is not None:
        manifests.draw_splits(manifest, plot)
        typer.echo(f"{plot}: lengths and composition", err=as_json)
    description = manifests.describe(folder, manifest, verified=verify)
    if as_json:
        show_json(description)
    else:
        typer.echo("\n".join(manifests.description_lines(description)))


def _run(build: Callable[..., Numbers], settings: BuildSettings, *inputs: Any, overwrite: bool) -> None:
    """Build a store, and print what it holds and how many records were changed."""
    from protea.data.manifest import split_line, step_line

    with interruptible(), bars() as progress:
        numbers = build(settings, *inputs, progress, overwrite=overwrite)
    for step in numbers["steps"]:
        aside(step_line(step))
    for name, split in numbers["splits"].items():
        typer.echo(f"{settings.output}/{name}: {split_line(split)}")
    skipped = (count for step in numbers["steps"] for name, count in step.items() if name.startswith("skipped"))
    reported = sum(step.get("altered_records", 0) for step in numbers["steps"]) + sum(skipped)
    if reported:
        tell(f"{counted(reported, 'record')} altered or skipped: see {settings.output}/report.tsv")
