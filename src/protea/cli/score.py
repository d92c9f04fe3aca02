"""``protea score``: effects of variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea.cli import options
from protea.cli.contacts import picture_paths
from protea.cli.interrupt import interruptible
from protea.cli.scattered import check_shares, on_ray
from protea.cli.terminal import bars, tell, tell_doubts
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.score.sharded_scores import MergedScores
    from protea.score.variant_table import Rows

_PROBLEMS_SHOWN = 10  # most rows that standard error shows if a report lists all


@options.options_of(options.columns, options.letters, options.computing)
def score(
    ctx: typer.Context,
    proteins: Annotated[str, typer.Argument(metavar="IN.fasta", help="The wild type, or several.", show_default=False)],
    table: Annotated[
        Path | None,
        typer.Argument(
            metavar="[VARIANTS.csv]", help="Rows to score: .csv, .tsv (also .gz), .parquet.", show_default=False
        ),
    ] = None,
    variants: Annotated[
        str | None, typer.Option("-v", "--variants", metavar="NAMES", help="Variants by comma: A24V,A24V:G30S.")
    ] = None,
    scan: Annotated[bool, typer.Option("--scan", help="Replace every residue by each of the other 19.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="OUT.csv, .tsv or .parquet: the table with the scores."),
    ] = None,
    models: options.Models = options.BUNDLED,
    positions: Annotated[
        str | None, typer.Option(metavar="LIST", help="With --scan: positions and ranges to scan: 10-40,55.")
    ] = None,
    mutant_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the table's column of variants.")
    ] = None,
    mutated_sequence_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the table's column of mutated sequences.")
    ] = None,
    method: options.Method = "masked-marginals",
    offset: options.Offset = 1,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the column that receives the scores.")
    ] = "model_score",
    long: options.Windows = "window",
    dtype: options.Dtype = "float32",
    fast: options.Fast = False,
    device: options.Device = "auto",
    token_budget: options.TokenBudget = None,
    shard: options.Shard = None,
    ray: options.Ray = None,
    shards: options.Shards = None,
    cpus_per_shard: options.CpusPerShard = 1,
    overwrite: options.Overwrite = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="With --scan: a heat map, .png, .svg, .html, or a folder of pages."),
    ] = None,
    **reading: Any,
) -> None:
    """Score variants of proteins: log-likelihood ratios, negative where the model prefers the wild type.

    All methods score substitutions (A24V, several at once A24V:G30S); pseudo-likelihood also scores insertions
    (A24_G25insKL), deletions (A24del) and replacements (A24_G30delinsKL), by means over residues, and
    pseudo-likelihood-sum by sums. HGVS's names (p.Ala24Val) are read too. A table keeps its rows and gets a column of
    scores; its column `mutant`, `hgvs_pro` or `mutated_sequence` names the variant, `id` the protein. Rows that cannot
    be scored stay empty and are listed in OUT.report.tsv; the exit code is then 1. If the proteins are in FASTA,
    --sequence-column names the column of mutated sequences.

    \b
    Examples:
      protea score protein.fasta variants.csv -o scored.csv
      protea score protein.fasta -v A24V,A24V:G30S
      protea score protein.fasta --scan -o scan.csv --plot scan.html --fast
      protea score protein.fasta --scan --positions 10-40,55 -o scan.csv
      protea score protein.fasta mavedb.csv --mutant-column hgvs_pro -o scored.csv
      protea score protein.fasta indels.csv --method pseudo-likelihood -o scored.csv
      protea score proteome.fasta --scan -o scan.parquet --shard $SLURM_ARRAY_TASK_ID/16
      protea score p53.fasta variants.csv --offset 94 -m esm1v_t33_650M_UR90S_1 -m esm1v_t33_650M_UR90S_2 -o scored.csv
    """
    from protea.records import is_table
    from protea.rerun import record_plot
    from protea.score.effects import Scoring
    from protea.score.proteins import Reading
    from protea.score.variant_table import Columns, score_variants

    if sum((table is not None, variants is not None, scan)) != 1:
        raise UsageError("name what to score: a table, --variants or --scan")
    if table is not None and not is_table(table) and not table.exists():
        raise UsageError(f"{table}: is no table (.csv, .tsv, .parquet); a variant comes after -v: -v {table}")
    if output is None and variants is None:
        raise UsageError("name an output: -o OUT.csv")
    part = check_shares(ctx, output)
    if plot is not None:
        if not scan or shard or ray:
            raise UsageError("--plot draws a whole scan; add --scan, and leave out --shard and --ray")
        # A finished output that is given again has its pictures already.
        replaced = overwrite or (output is not None and output.exists())
        place = partial(picture_paths, plot, kind=".html", overwrite=replaced)
        place([])
    pictures: dict[str, Path] = {}
    if mutated_sequence_column is None and not is_table(proteins):
        mutated_sequence_column, reading["sequence_column"] = reading["sequence_column"], None
    how = Scoring(method=method, offset=offset, long=long, token_budget=token_budget)
    compute = partial(
        score_variants,
        proteins,
        variants.split(",") if variants is not None else table,
        how,
        models=models,
        columns=Columns(mutant_column, mutated_sequence_column),
        positions=positions,
        column=column,
        reading=Reading(**reading),
        check=None if plot is None else lambda names: pictures.update(place(names)),
        plot=plot,
        output=output,
        shard=part,
        overwrite=overwrite,
        load=options.loader(device=device, dtype=dtype, fast=fast),
    )
    with interruptible():
        if ray is not None and output is not None:
            failed = _on_ray(ctx, output, [proteins, *([] if table is None else [str(table)])], models, compute)
        else:
            with bars("passes") as progress:
                scored = compute(progress=progress)
            _show(scored, output if part is None or output is None else part.output(output))
            if plot is not None:
                _draw(plot, pictures, scored, column, positions, offset)
                record_plot(output, plot)
            # Of a shard, `protea merge` says so; a scheduler shall not compute it again.
            failed = bool(scored.problems) and part is None
    if failed:
        raise typer.Exit(1)


def _on_ray(ctx: typer.Context, output: Path, inputs: list[str], models: list[str], whole: Callable[[], Any]) -> bool:
    from protea.scatter import local_files
    from protea.score.sharded_scores import merge_scores

    def join(output: Path, shards: list[Path], overwrite: bool) -> Any:
        return merge_scores(output, shards, overwrite=overwrite)

    files = [*inputs, *local_files(*models)]
    with bars("shards") as progress:
        merged = on_ray(ctx, output, files, progress, finished=whole, join=join, title="scoring")
    return show_merged(output, merged)


def show_merged(output: Path, merged: MergedScores) -> bool:
    """Tell what was merged; returns whether rows could not be scored."""
    typer.echo(f"{output}: {counted(merged.shards, 'shard')} joined")
    if merged.failed:
        tell(f"{counted(merged.failed, 'row')} could not be scored: see {output}.report.tsv")
    elif merged.told:
        tell(f"{counted(merged.told, 'note')} in {output}.report.tsv")
    return bool(merged.failed)


def _draw(plot: Path, paths: Mapping[str, Path], scored: Rows, column: str, positions: str | None, offset: int) -> None:
    from protea.plot import share_script, single_site_scan
    from protea.score.variants import CANONICAL, chosen_places, scan_cells

    if plot not in paths.values():
        share_script(plot)
    scores = scored.table.column(column).to_pylist()
    for (name, sequence, _), rows in zip(scored.proteins, scored.places, strict=True):
        places = chosen_places(name, sequence, positions, offset)
        cells = scan_cells(sequence, places, [scores[row] for row in rows])
        single_site_scan(paths[name], cells, sequence=sequence, letters=CANONICAL, title=name, offset=offset)
    typer.echo(f"{plot}: the scan of {name}" if len(paths) == 1 else f"{plot}: {counted(len(paths), 'scan')}")


def _show(rows: Rows, output: Path | None) -> None:
    if output is None:
        typer.echo("\t".join(rows.table.column_names))
        for row in rows.table.to_pylist():
            typer.echo("\t".join(f"{value:.4f}" if isinstance(value, float) else value or "" for value in row.values()))
    else:
        number = counted(rows.table.num_rows - len(rows.problems), "variant")
        typer.echo(f"{output}: {number} of {counted(len(rows.proteins), 'protein')} scored")
    for change in tell_doubts(rows.changes):
        tell(f"{change.id}: {change.what}: {change.detail}")
    shown = rows.problems if output is None else rows.problems[:_PROBLEMS_SHOWN]
    for problem in shown:
        tell(f"row {problem.row}: {problem.reason}", failed=True)
    if len(rows.problems) > len(shown):
        tell(f"{counted(len(rows.problems), 'row')} could not be scored: see {output}.report.tsv", failed=True)
    for advice in rows.advice:
        tell(advice)
