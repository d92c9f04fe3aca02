"""``protea data``: stores of training data, made and described."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea.cli.interrupt import interruptible
from protea.cli.terminal import progress_bars, tell
from protea.errors import UsageError

if TYPE_CHECKING:
    from protea.data.work import Numbers, Watcher

data = typer.Typer(
    name="data",
    help="Training data: from FASTA to a store of clusters, filtered, sampled and masked.",
    epilog="docs/data.md has every option, every file of a store, and what can be wrong with input.",
    rich_markup_mode=None,
)


@data.callback(invoke_without_command=True)
def _options(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to make; must be new.")]
Valid = Annotated[str, typer.Option(metavar="N|P%", help="Clusters drawn for validation.")]
Test = Annotated[str, typer.Option(metavar="N|P%", help="Clusters drawn for testing, never filtered against.")]
Seed = Annotated[int, typer.Option(help="Of the drawing.")]
Alphabet = Annotated[str, typer.Option(metavar="NAME", help="Of the tokens: esm (ESM-1b, 1v, 2) or esm-1nv.")]
Filter = Annotated[
    bool,
    typer.Option("--filter/--no-filter", help="Remove training clusters similar to a validation cluster."),
]
FilterFlags = Annotated[
    str | None,
    typer.Option(
        metavar="FLAGS",
        help="Of mmseqs search. [default: --min-seq-id 0.5 --alignment-mode 3 --max-seqs 300 -s 7 -c 0.8 --cov-mode 0]",
        show_default=False,
    ),
]
SearchFrom = Annotated[
    str,
    typer.Option(
        metavar="SIDE",
        help="train looks each training cluster up among the validation ones, as public pipelines do; valid the other "
        "way round, much faster.",
    ),
]
Unknown = Annotated[
    str, typer.Option(metavar="POLICY", help="A letter outside the alphabet: x (becomes X), error, or skip.")
]
MinLength = Annotated[int, typer.Option(metavar="N", help="Leave shorter sequences out.")]
MaxLength = Annotated[
    int | None, typer.Option(metavar="N", help="Leave longer sequences out, as ESM-1nv's data did over 512.")
]
LeaveOut = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Leave records out whose header it matches, as in 'Tax=synthetic construct'."),
]
Absent = Annotated[
    str, typer.Option(metavar="POLICY", help="A member that is named and not in the sequences: error or skip.")
]
Empty = Annotated[
    str,
    typer.Option(metavar="POLICY", help="A training cluster without members: error, representative (as one), or drop."),
]
Program = Annotated[str, typer.Option(metavar="PROGRAM", help="MMseqs2, by name or path.")]
Threads = Annotated[int | None, typer.Option(metavar="N", help="Of MMseqs2; all by default.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a store that exists, and forget an unfinished one.")
]


@data.command("uniref")
def uniref(
    uniref50: Annotated[
        list[Path], typer.Option("--uniref50", metavar="FASTA", help="Representatives; may be given several times.")
    ],
    output: Output,
    uniref90: Annotated[
        list[Path] | None,
        typer.Option("--uniref90", metavar="FASTA", help="Members; without, each cluster is its representative."),
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option(
            metavar="TSV",
            help="Cluster and members by comma, or UniProt's idmapping_selected.tab; without, members' headers tell.",
        ),
    ] = None,
    valid: Valid = "0.5%",
    test: Test = "0",
    seed: Seed = 0,
    filtered: Filter = True,
    filter_flags: FilterFlags = None,
    search_from: SearchFrom = "train",
    alphabet: Alphabet = "esm",
    unknown: Unknown = "x",
    min_length: MinLength = 1,
    max_length: MaxLength = None,
    leave_out: LeaveOut = None,
    absent: Absent = "error",
    empty: Empty = "error",
    mmseqs: Program = "mmseqs",
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Build a store from UniRef: UniRef50's clusters, sampled by their UniRef90 members, as ESM-2 was trained.

    Interrupted or killed, the same command goes on after the last finished step and gives the same files.

    \b
    Examples:
      protea data uniref --uniref50 uniref50.fasta.gz --uniref90 uniref90.fasta.gz \\
        --members idmapping_selected.tab.gz --valid 0.5% --leave-out 'Tax=(synthetic|artificial)' -o uniref/
      protea data uniref --uniref50 uniref50.fasta.gz --no-filter --valid 5000 --test 1000000 \\
        --max-length 512 --alphabet esm-1nv -o esm1nv-data/
    """
    from protea.data.build_settings import BuildSettings
    from protea.data.uniref import build_uniref

    values = _values(locals(), BuildSettings)
    with interruptible(), _bars() as watcher:
        numbers = build_uniref(BuildSettings(**values), uniref50, uniref90 or [], members, watcher, overwrite=overwrite)
    _report(output, numbers)


@data.command("fasta")
def fasta(
    inputs: Annotated[
        list[str], typer.Argument(metavar="IN.fasta...", help="FASTA, also .gz .bz2 .xz .zst; - is standard input.")
    ],
    output: Output,
    valid: Valid = "0.5%",
    test: Test = "0",
    seed: Seed = 0,
    filtered: Filter = True,
    filter_flags: FilterFlags = None,
    search_from: SearchFrom = "train",
    member_flags: Annotated[
        str, typer.Option(metavar="FLAGS", help="Of the mmseqs linclust whose representatives are the members.")
    ] = "--min-seq-id 0.9 -c 0.8 --cov-mode 1",
    cluster_flags: Annotated[
        str, typer.Option(metavar="FLAGS", help="Of the mmseqs linclust that clusters the members.")
    ] = "--min-seq-id 0.5 -c 0.8 --cov-mode 1",
    alphabet: Alphabet = "esm",
    unknown: Unknown = "x",
    min_length: MinLength = 1,
    max_length: MaxLength = None,
    leave_out: LeaveOut = None,
    mmseqs: Program = "mmseqs",
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Build a store from any sequences: clustered with MMseqs2, members at 90 % identity within clusters at 50 %.

    Interrupted or killed, the same command goes on after the last finished step and gives the same files.

    \b
    Examples:
      protea data fasta proteins.fasta.gz -o store/
      protea data fasta a.fasta b.fasta --valid 1000 --search-from valid --max-length 1022 -o store/
    """
    from protea.data.cluster import ClusterSettings, build_fasta

    values = _values(locals(), ClusterSettings)
    with interruptible(), _bars() as watcher:
        numbers = build_fasta(ClusterSettings(**values), inputs, watcher, overwrite=overwrite)
    _report(output, numbers)


@data.command("import")
def import_(
    output: Output,
    mapping: Annotated[
        Path | None, typer.Option(metavar="TSV", help="BioNeMo 1: mapping.tsv; with --uniref50 and --uniref90.")
    ] = None,
    uniref50: Annotated[
        Path | None, typer.Option("--uniref50", metavar="FASTA", help="BioNeMo 1: uniref50_train_filt.fasta.")
    ] = None,
    uniref90: Annotated[
        Path | None,
        typer.Option("--uniref90", metavar="FASTA", help="BioNeMo 1: uniref90membersandreps_ur50trainfiltreps.fasta."),
    ] = None,
    uniref50_valid: Annotated[
        Path | None, typer.Option("--uniref50-valid", metavar="FASTA", help="BioNeMo 1: uniref50_valid.fasta.")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option("--csv", metavar="DIR", help="BioNeMo 1: uf50, with train, val and test.")
    ] = None,
    members_csv: Annotated[
        Path | None, typer.Option(metavar="DIR", help="BioNeMo 1: uf90/uf90_csvs; with --starts and --counts.")
    ] = None,
    starts: Annotated[Path | None, typer.Option(metavar="FILE", help="BioNeMo 1: starts.mmap.")] = None,
    counts: Annotated[Path | None, typer.Option(metavar="FILE", help="BioNeMo 1: counts.mmap.")] = None,
    train_clusters: Annotated[
        Path | None, typer.Option(metavar="PARQUET", help="BioNeMo 2: lists ur90_id; with --database.")
    ] = None,
    valid_clusters: Annotated[
        Path | None, typer.Option(metavar="PARQUET", help="BioNeMo 2: ur50_id, a sequence each.")
    ] = None,
    database: Annotated[
        Path | None, typer.Option(metavar="SQLITE", help="BioNeMo 2: a table protein(id, sequence).")
    ] = None,
    alphabet: Alphabet = "esm",
    unknown: Unknown = "x",
    min_length: MinLength = 1,
    max_length: MaxLength = None,
    absent: Absent = "error",
    empty: Empty = "error",
    overwrite: Overwrite = False,
) -> None:
    """Build a store from data that BioNeMo 1 or 2 prepared; they come divided and filtered, and stay so.

    \b
    Examples:
      protea data import --mapping mapping.tsv --uniref50 uniref50_train_filt.fasta \\
        --uniref90 ur90_ur50_sampler.fasta -o store/
      protea data import --csv uf50/ --members-csv uf90/uf90_csvs --starts starts.mmap --counts counts.mmap -o store/
      protea data import --train-clusters train.parquet --valid-clusters valid.parquet --database protein.db -o store/
    """
    from protea.data import importers
    from protea.data.build_settings import BuildSettings

    kinds = {"--mapping": mapping, "--csv": shards, "--train-clusters": train_clusters}
    if sum(value is not None for value in kinds.values()) != 1:
        raise UsageError(f"name what to import with one of {', '.join(kinds)}")
    settings = BuildSettings(**_values(locals(), BuildSettings), valid="0", filtered=False)
    with interruptible(), _bars() as watcher:
        if mapping is not None:
            if uniref50 is None or uniref90 is None:
                raise UsageError("--mapping needs --uniref50 and --uniref90")
            numbers = importers.import_fasta(
                settings, mapping, uniref50, uniref90, uniref50_valid, watcher, overwrite=overwrite
            )
        elif shards is not None:
            numbers = importers.import_csv(settings, shards, members_csv, starts, counts, watcher, overwrite=overwrite)
        else:
            if train_clusters is None or database is None:
                raise UsageError("--train-clusters needs --database")
            numbers = importers.import_parquet(
                settings, train_clusters, valid_clusters, database, watcher, overwrite=overwrite
            )
    _report(output, numbers)


@data.command("info")
def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A store of training data.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw lengths and composition: FILE.png or FILE.svg.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its hash.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a store holds: how it was made, its counts, lengths and composition.

    \b
    Examples:
      protea data info store/
      protea data info store/ --verify --plot store.png
      protea data info store/ --json
    """
    import json

    from protea.data.manifest import read_manifest
    from protea.data.manifest import verify as compare
    from protea.data.store_summary import describe, draw, lines

    manifest = read_manifest(folder)
    if verify:
        with interruptible(), _bars() as watcher:
            watcher.begin("verify", sum(known["bytes"] for known in manifest["files"].values()))
            compare(folder, manifest, watcher.advance)
    if plot is not None:
        draw(manifest, plot)
    if as_json:
        typer.echo(json.dumps(describe(folder, manifest, verified=verify), indent=2))
        return
    for line in lines(describe(folder, manifest, verified=verify)):
        typer.echo(line)


def _values(given: dict[str, Any], settings: type) -> dict[str, Any]:
    """Of a command's parameters those that its settings have."""
    from dataclasses import fields

    return {each.name: given[each.name] for each in fields(settings) if each.name in given}


def _report(output: Path, numbers: Numbers) -> None:
    for step in numbers["steps"]:
        shown = [f"{value:,} {name.replace('_', ' ')}" for name, value in step.items() if _counts(value)]
        typer.echo(f"{step['step']}: {', '.join(shown) or 'nothing to do'}", err=True)
    for name, split in numbers["splits"].items():
        typer.echo(
            f"{output}/{name}: {split['clusters']:,} clusters, {split['sequences']:,} sequences, "
            f"{split['residues']:,} residues"
        )
    odd = sum(step.get("altered_records", 0) for step in numbers["steps"])
    odd += sum(value for step in numbers["steps"] for name, value in step.items() if name.startswith("skipped"))
    if odd:
        tell(f"{odd:,} records altered or left out: see {output}/report.tsv")


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@contextmanager
def _bars() -> Iterator[Watcher]:
    from protea.cli.data_progress import Bars

    with progress_bars(remaining=False) as progress:
        yield Bars(progress)
