"""``protea evaluate proteingym``: effects of variants beside deep mutational scans."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea.cli.interrupt import interruptible
from protea.cli.load import circumstances, load_to_compute
from protea.cli.options import BUNDLED, Device, Dtype, Fast, Method, Models, Offset, Overwrite, TokenBudget, Windows
from protea.cli.terminal import bars, counted, tell
from protea.errors import UsageError

if TYPE_CHECKING:
    from protea.evaluate.proteingym import Measured


def evaluate_proteingym(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Deep mutational scans, as ProteinGym lays them out.", show_default=False),
    ],
    models: Models = BUNDLED,
    method: Method = "masked-marginals",
    offset: Offset = 1,
    long: Windows = "window",
    only: Annotated[
        str | None, typer.Option("--assays", metavar="NAMES", help="These by comma; all by default.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Published models to show, by comma, as the table of assays calls them."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="A row an assay: .csv, .tsv or .parquet.")
    ] = None,
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    token_budget: TokenBudget = None,
    overwrite: Overwrite = False,
) -> None:
    """Score deep mutational scans and compare with the measurements, by ProteinGym's measures.

    Spearman's correlation, AUC, MCC, NDCG and top recall of each assay, their means over assays and over proteins, and
    the published correlations of other models where the table of assays has them (columns `spearman NAME`). Variants
    that cannot be scored are left out and counted; the exit code is then 1.

    \b
    Examples:
      protea evaluate proteingym proteingym/ -m esm2_t6_8M_UR50D --beside "ESM2 (8M)" -o esm2_8M.csv
      protea evaluate proteingym proteingym/ -m esm1v_t33_650M_UR90S_1 -m esm1v_t33_650M_UR90S_2 --fast
    """
    from protea.evaluate.proteingym import AssayScores, read_assays
    from protea.score.effects import Scoring
    from protea.score.ensemble import check_lengths, common_alphabet, open_ensemble
    from protea.tables import check_output

    how = Scoring(method=method, offset=offset, long=long, token_budget=token_budget)
    if output is not None:
        check_output(output, overwrite=overwrite)
    assays = {assay.name: assay for assay in read_assays(folder)}
    names = list(assays) if only is None else _named(only)
    if strangers := [name for name in names if name not in assays]:
        raise UsageError(f"--assays {strangers[0]}: is not there; {folder} has {', '.join(assays)}")
    published = [] if beside is None else _named(beside)
    known = {name for assay in assays.values() for name in assay.published}
    if strangers := [name for name in published if name not in known]:
        raise UsageError(
            f"--beside {strangers[0]!r}: nothing is published under it; known are {', '.join(sorted(known)) or 'none'}"
        )
    with interruptible():
        members = open_ensemble(models)
        alphabet = common_alphabet(members)
        scans = [AssayScores(assays[name], alphabet, how) for name in names]
        settings: dict[str, Any] = {"command": "evaluate proteingym", "folder": str(folder), "assays": names}
        settings |= asdict(how) | {"models": {}}
        check_lengths(members, [protein for scan in scans for protein in scan.rows.proteins], long)
        for name in models:
            model = load_to_compute(name, device=device, dtype=dtype, fast=fast)
            with bars("passes") as progress:
                progress.begin(name, sum(how.passes(scan.rows.proteins) for scan in scans))
                for scan in scans:
                    scan.add(model.module, progress)
            settings["models"][name] = circumstances(model)
            del model  # before the next takes its place in memory
        results = [scan.measured() for scan in scans]
        _print(results, published)
        if output is not None:
            _write(output, results, settings)
    for one in results:
        if one.problems:
            tell(f"{one.assay.name}: {counted(one.left_out, 'variant')} could not be scored: {one.problems[0].reason}")
        for advice in one.advice:
            tell(advice)
    if any(one.problems for one in results):
        raise typer.Exit(1)


def _named(names: str) -> list[str]:
    """What was listed by comma, each once."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",")))
    if "" in found:
        raise UsageError(f"{names!r}: a name by comma is empty")
    return found


def _print(results: list[Measured], published: list[str]) -> None:
    from protea.evaluate.proteingym import MEASURES, means

    theirs = {
        name: {one.assay.name: one.assay.published[name] for one in results if name in one.assay.published}
        for name in published
    }
    header = ["assay", "variants", *MEASURES, *published]
    lines = [
        [one.assay.name, f"{one.count:,}"]
        + [f"{one.measures[name]:.3f}" for name in MEASURES]
        + [f"{theirs[name].get(one.assay.name, float('nan')):.3f}" for name in published]
        for one in results
    ]
    averages = [means(results, name) for name in MEASURES]
    averages += [means(results, "spearman", values) for values in theirs.values()]
    lines += [[f"mean over {over}", "", *(f"{one[over]:.3f}" for one in averages)] for over in averages[0]]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    for line in [header, *lines]:
        first, *rest = (f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join([first.strip().ljust(widths[0]), *rest]))


def _write(output: Path, results: list[Measured], settings: dict[str, Any]) -> None:
    import pyarrow as pa

    from protea.tables import Beside, write_table

    published = dict.fromkeys(name for one in results for name in one.assay.published)
    rows = [
        {"assay": one.assay.name, "protein": one.assay.protein, "variants": one.count, "left_out": one.left_out}
        | dict(one.measures)
        | {f"spearman {name}": one.assay.published.get(name) for name in published}
        for one in results
    ]
    problems: list[tuple[str, int | str, str, str]] = []
    for one in results:
        problems += [(one.assay.name, *problem) for problem in one.problems]
        problems += [(one.assay.name, "", "", advice) for advice in one.advice]
    write_table(output, pa.Table.from_pylist(rows), Beside("assay\trow\tvariant\treason", problems, settings))
    typer.echo(f"{output}: {counted(len(results), 'assay')}")
