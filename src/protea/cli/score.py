"""``protea score``: effects of variants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea.cli.ensemble import check_lengths, common_alphabet, ensemble
from protea.cli.interrupt import interruptible
from protea.cli.load import circumstances, load_to_compute
from protea.cli.options import (
    BUNDLED,
    Device,
    Dtype,
    Fast,
    Method,
    Models,
    Offset,
    Overwrite,
    TokenBudget,
    Unknown,
    Windows,
)
from protea.cli.terminal import advancing, counted, progress_bars, tell
from protea.disk import check_new
from protea.errors import FastaError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from protea.letters import ReportRow as Note
    from protea.score.effects import Scoring
    from protea.score.variant_table import Rows

_SHOWN = 10
"""Problems told on standard error where there is no report."""


def score(
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
    scan: Annotated[bool, typer.Option("--scan", help="Every residue replaced by each of the other 19.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="OUT.csv, .tsv or .parquet: the table with the scores."),
    ] = None,
    models: Models = BUNDLED,
    method: Method = "masked-marginals",
    offset: Offset = 1,
    column: Annotated[str, typer.Option(metavar="NAME", help="Of the scores.")] = "model_score",
    long: Windows = "window",
    unknown: Unknown = "x",
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    token_budget: TokenBudget = None,
    overwrite: Overwrite = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="With --scan: a heat map, .png, .svg or .html.")
    ] = None,
) -> None:
    """Score variants of proteins: log-likelihood ratios, negative where the model prefers the wild type.

    Substitutions (A24V, several at once A24V:G30S) by all methods; insertions (A24_G25insKL), deletions (A24del) and
    replacements (A24_G30delinsKL) by pseudo-likelihood. A table's rows are kept, a column is added; the column `mutant`
    or `mutated_sequence` says what to score, `id` of which protein. Rows that cannot be scored are left empty and
    listed in OUT.report.tsv; the exit code is then 1.

    \b
    Examples:
      protea score protein.fasta variants.csv -o scored.csv
      protea score protein.fasta -v A24V,A24V:G30S
      protea score protein.fasta --scan -o scan.csv --plot scan.html --fast
      protea score protein.fasta indels.csv --method pseudo-likelihood -o scored.csv
      protea score p53.fasta variants.csv --offset 94 -m esm1v_t33_650M_UR90S_1 -m esm1v_t33_650M_UR90S_2 -o scored.csv
    """
    from protea.plot import check_place
    from protea.score.effects import Scoring
    from protea.score.records import wild_types
    from protea.score.variant_table import check_columns, rows_of, scores_of, with_scores
    from protea.tables import check_output

    if sum((table is not None, variants is not None, scan)) != 1:
        raise UsageError("name what to score: a table, --variants, or --scan")
    if output is None and variants is None:
        raise UsageError("name an output: -o OUT.csv")
    if plot is not None and not scan:
        raise UsageError("--plot draws a --scan")
    if output is not None:
        check_output(output, overwrite=overwrite)
    if plot is not None:
        check_place(plot)
        check_new(plot, overwrite=overwrite)
    how = Scoring(method=method, offset=offset, long=long, token_budget=token_budget)
    with interruptible():
        members = ensemble(models)
        alphabet = common_alphabet(members)
        notes: list[Note] = []
        wild = wild_types([proteins], alphabet, unknown, notes)
        rows = rows_of(_content(table, variants, wild, offset), wild, alphabet, how)
        check_columns(rows.table, column, models)
        if not rows.table.num_rows:
            raise FastaError(f"{proteins}: nothing to scan: no protein in it has residues")
        if plot is not None and len(rows.proteins) != 1:
            raise UsageError(f"--plot draws one protein, and there are {len(rows.proteins)}")
        check_lengths(members, rows.proteins, long)
        scores, provenance = {}, {}
        for name in models:
            model = load_to_compute(name, device=device, dtype=dtype, fast=fast)
            with progress_bars("passes") as progress:
                advance = advancing(progress, "scoring", how.passes(rows.proteins))
                scores[name] = scores_of(model.module, rows, how, advance)
            provenance[name] = circumstances(model)
            del model  # before the next takes its place in memory
        scored = with_scores(rows.table, column, scores)
        settings = {"command": "score", "proteins": proteins, "variants": variants or ("scan" if scan else str(table))}
        settings |= how.shown() | {"unknown": unknown, "models": provenance}
        _write(output, scored, rows, notes, settings)
        if plot is not None:
            _plot(plot, rows, scored.column(column).to_pylist(), how)
    if rows.problems:
        raise typer.Exit(1)


def _content(table: Path | None, variants: str | None, wild: dict[str, str], offset: int) -> pa.Table:
    from protea.score.variant_table import read_table, scan_table, variant_table

    if table is not None:
        return read_table(table)
    if variants is not None:
        return variant_table(variants.split(","))
    return scan_table(wild, offset)


def _write(output: Path | None, scored: pa.Table, rows: Rows, notes: list[Note], settings: dict[str, Any]) -> None:
    from protea.tables import Beside, write_table

    if output is None:
        typer.echo("\t".join(scored.column_names))
        for row in scored.to_pylist():
            typer.echo("\t".join(f"{value:.4f}" if isinstance(value, float) else value or "" for value in row.values()))
    else:
        of_wild_types = [("", note.id, f"{note.what}: {note.detail}") for note in notes]
        of_all = [("", "", advice) for advice in rows.advice]
        write_table(output, scored, Beside("row\tvariant\treason", [*of_wild_types, *rows.problems, *of_all], settings))
        variants = counted(scored.num_rows - len(rows.problems), "variant")
        typer.echo(f"{output}: {variants} of {counted(len(rows.proteins), 'protein')} scored")
    for note in notes:
        tell(f"{note.id}: {note.what}: {note.detail}")
    shown = rows.problems if output is None else rows.problems[:_SHOWN]
    for problem in shown:
        tell(f"row {problem.row}: {problem.reason}")
    if len(rows.problems) > len(shown):
        tell(f"{counted(len(rows.problems), 'row')} could not be scored: see {output}.report.tsv")
    for advice in rows.advice:
        tell(advice)


def _plot(path: Path, rows: Rows, scores: list[float | None], how: Scoring) -> None:
    import numpy as np

    from protea.plot import single_site_scan
    from protea.score.variants import CANONICAL

    protein, places = rows.proteins[0], rows.places[0]
    cells = np.full((len(protein.sequence), len(CANONICAL)), np.nan)
    for variant, place in zip(protein.variants, places, strict=True):
        cells[variant.edits[0].start, CANONICAL.index(variant.edits[0].new)] = scores[place]
    single_site_scan(path, cells, sequence=protein.sequence, letters=CANONICAL, title=protein.name, offset=how.offset)
    typer.echo(f"{path}: the scan of {protein.name}")
