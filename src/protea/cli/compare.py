"""``protea compare``: several models on the same benchmarks, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protea.cli import options
from protea.cli.interrupt import interruptible
from protea.cli.terminal import bars, show_table, tell
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.compare.compared import Compared
    from protea.compare.measured import ComparedBenchmark


@options.options_of(options.computing)
def compare(
    models: Annotated[
        list[str], typer.Option("-m", "--model", metavar="MODEL", help="Model to compare; give one -m for each.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Folder that receives the tables and the picture.")
    ],
    structures: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Contacts: PDB or mmCIF files, or a folder; may be repeated."),
    ] = None,
    proteingym: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Deep mutational scans in ProteinGym's layout.")
    ] = None,
    flip: Annotated[Path | None, typer.Option(metavar="DIR", help="FLIP's files, a folder for each task.")] = None,
    sequences: Annotated[
        list[str] | None, typer.Option(metavar="FASTA", help="Perplexity: sequences; may be repeated.")
    ] = None,
    assays: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="With --proteingym: assays, separated by commas; all by default."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --proteingym: scoring; by default masked-marginals."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="With --flip: a task; may be repeated; by default all.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --flip: number of training examples, for a quick look."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    dtype: options.Dtype = "float32",
    fast: options.Fast = False,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Compare models on contacts, deep mutational scans, the tasks of FLIP and perplexity, in one table.

    Numbers are those of `protea evaluate contacts`, `evaluate proteingym`, `evaluate flip` (a head on each model as it
    is) and `protea perplexity`, with 95 % intervals, beside published figures. Differences between models are measured
    on the same items. What a model cannot do is a cell with the reason. OUT has compare.csv, differences.csv,
    compare.json, compare.html, and a folder for each model. After an interruption the same command continues; further
    models and benchmarks are added to what OUT has.

    \b
    Examples:
      protea compare -m protea-mini -m my-model/ --structures structures/ -o compared/
      protea compare -m esm2_t6_8M_UR50D -m esm2_t12_35M_UR50D --proteingym proteingym/ --flip FLIP/ -o compared/ --fast
      protea compare -m a/ -m b/ --flip FLIP/ --task gb1 --limit 200 --sequences proteins.fasta -o quick/ --json
    """
    from protea.compare.benchmarks import Contacts, Perplexity, Scans
    from protea.compare.comparison import JSON, PAGE, Comparison
    from protea.compare.flip_benchmark import Flip

    for name, value, of, chosen in (
        ("assays", assays, "proteingym", proteingym),
        ("method", method, "proteingym", proteingym),
        ("task", task, "flip", flip),
        ("limit", limit, "flip", flip),
    ):
        if value is not None and chosen is None:
            raise UsageError(f"--{name} is an option of --{of}; add --{of} DIR")
    benchmarks: list[ComparedBenchmark] = [Contacts(structures)] if structures else []
    benchmarks += [Perplexity(sequences)] if sequences else []
    if proteingym is not None:
        benchmarks.append(Scans(proteingym, assays and assays.split(","), method or "masked-marginals"))
    benchmarks += [] if flip is None else [Flip(flip, task or (), limit)]
    with interruptible(), bars() as progress:
        compared = Comparison(
            models=models,
            benchmarks=benchmarks,
            output=output,
            load=options.loader(device=device, dtype=dtype, fast=fast),
            overwrite=overwrite,
            progress=progress,
        )()
    if as_json:
        typer.echo((output / JSON).read_text(encoding="utf-8"), nl=False)
    else:
        _show(compared)
        typer.echo(f"\n{output / PAGE}: {counted(len(models), 'model')}")
    if limit is not None:
        tell(f"--limit {limit}: trained on a few examples alone; not comparable with published figures")
    if compared.failed:
        raise typer.Exit(1)


def _show(compared: Compared) -> None:
    """The table, its notes, and the differences between models."""
    from protea.compare.views import PAIRS, grid, pairs

    shown = grid(compared)
    show_table(shown.header, shown.rows)
    for note in shown.notes:
        typer.echo(note)
    if compared.differences:
        typer.echo("\nDifferences, both models on the same items:")
        show_table(PAIRS, pairs(compared))
