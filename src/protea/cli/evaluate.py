"""``protea evaluate contacts``, ``flip`` and ``proteingym``: predictions compared with measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli import options
from protea.cli.contacts import Structures, decimals, draw_map, picture_paths, show_means, tell_rows
from protea.cli.interrupt import interruptible
from protea.cli.terminal import bars, show_json, show_table, tell
from protea.text import counted

if TYPE_CHECKING:
    from protea.contacts.precision import ChainPrecision
    from protea.contacts.structures import Chain
    from protea.evaluate.proteingym import Measured
    from protea.infer.runner import FloatArray

evaluate = typer.Typer(
    name="evaluate", cls=options.Commands, help="Compare predictions with measurements.", rich_markup_mode=None
)

_Table = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="OUT", help="Table of all results: .csv, .tsv or .parquet.")
]


@evaluate.callback(invoke_without_command=True)
def _options(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@evaluate.command("contacts")
@options.options_of(options.computing)
def evaluate_contacts(
    structures: Structures,
    model: options.Model = bundled.NAME,
    output: _Table = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="Chains to leave out: a contact-head.json, or a name; may be repeated."),
    ] = None,
    include_fitted: Annotated[
        bool, typer.Option("--include-fitted", help="Keep chains that the model's contact head was fitted on.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed for the intervals.", min=0)] = 0,
    plot: options.MapPlot = None,
    dtype: options.Dtype = "float32",
    fast: options.Fast = False,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure a model's contacts against structures: precision of the L, L/2 and L/5 most probable pairs.

    Means over chains come with 95 % intervals, by bootstrap over chains. Chains listed in the model's contact-head.json
    are left out. OUT.report.tsv lists what was skipped, altered or incomplete. Pictures show predictions above the
    diagonal and the structure's contacts below.

    \b
    Examples:
      protea evaluate contacts structures/ -m esm2_t6_8M_UR50D
      protea evaluate contacts 1abc.cif.gz 2xyz.pdb -m my-model/ -o precision.csv --plot maps
      protea evaluate contacts structures/ -m my-model/ --exclude 1abc:A --exclude other/contact-head.json
    """
    from protea.contacts.precision import shown
    from protea.contacts.structure_run import evaluate_structures
    from protea.contacts.structures import contact_map
    from protea.letters import ReportRow

    def drawing(names: Sequence[str]) -> Callable[[Chain, FloatArray], None]:
        pictures = {} if plot is None else picture_paths(plot, names, overwrite=overwrite)

        def draw(chain: Chain, probabilities: FloatArray) -> None:
            if chain.name in pictures:
                truth, missing = contact_map(chain)
                draw_map(pictures[chain.name], probabilities, truth=truth, missing=missing, title=chain.name)

        return draw

    rows: list[ReportRow] = []
    load = options.loader(device=device, dtype=dtype, fast=fast)
    with interruptible(), bars() as bar:
        precisions = evaluate_structures(
            structures,
            rows,
            model=model,
            exclude=exclude or (),
            include_fitted=include_fitted,
            seed=seed,
            plot=plot,
            drawing=drawing,
            output=output,
            overwrite=overwrite,
            load=load,
            progress=bar,
        )
    if as_json:
        show_json(shown(precisions, seed))
    else:
        _show_precisions(precisions, seed, output, plot)
    skipped = tell_rows(rows, "-o OUT.csv writes a report of them" if output is None else f"see {output}.report.tsv")
    if skipped or not precisions:
        raise typer.Exit(1)


def _show_precisions(precisions: list[ChainPrecision], seed: int, output: Path | None, plot: Path | None) -> None:
    if output is not None:
        typer.echo(f"{output}: {counted(len(precisions), 'chain')}")
    elif precisions:
        _show_chains(precisions)
    if plot is not None and precisions:
        typer.echo(f"{plot}: {counted(len(precisions), 'contact map')}")
    if precisions:
        show_means(precisions, seed)


def _show_chains(precisions: list[ChainPrecision]) -> None:
    columns = [f"{name} {part}" for name, result in precisions[0].ranges.items() for part in result.precisions]
    rows = []
    for chain in precisions:
        values = [value for result in chain.ranges.values() for value in result.precisions.values()]
        rows.append([chain.name, str(chain.resolved), *(decimals(value) for value in values)])
    show_table(["chain", "L", *columns], rows)
    typer.echo()


@evaluate.command("proteingym")
@options.options_of(options.computing)
def evaluate_proteingym(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Deep mutational scans in ProteinGym's layout.", show_default=False)
    ],
    models: options.Models = options.BUNDLED,
    method: options.Method = "masked-marginals",
    offset: options.Offset = 1,
    long: options.Windows = "window",
    only: Annotated[
        str | None, typer.Option("--assays", metavar="NAMES", help="Assays, separated by commas; all by default.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Published models to show, separated by commas, as the table names them."),
    ] = None,
    output: _Table = None,
    dtype: options.Dtype = "float32",
    fast: options.Fast = False,
    device: options.Device = "auto",
    token_budget: options.TokenBudget = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Score deep mutational scans and compare with the measurements, by ProteinGym's measures.

    Prints Spearman's correlation, AUC, MCC, NDCG and top recall of each assay, their means over assays and over
    proteins, and published correlations of other models where the table of assays has them (columns `spearman NAME`).
    Variants that cannot be scored are left out and counted, and assays whose scan is not in DIR are skipped; the exit
    code is then 1.

    \b
    Examples:
      protea evaluate proteingym proteingym/ -m esm2_t6_8M_UR50D --beside "ESM2 (8M)" -o esm2_8M.csv
      protea evaluate proteingym proteingym/ -m esm1v_t33_650M_UR90S_1 -m esm1v_t33_650M_UR90S_2 --fast
    """
    from protea.evaluate.proteingym import chosen_names, evaluate_assays, read_assays, rows_of_results
    from protea.score.effects import Scoring

    how = Scoring(method=method, offset=offset, long=long, token_budget=token_budget)
    known = {name for assay in read_assays(folder) for name in assay.published}
    published = [] if beside is None else chosen_names("--beside", beside.split(","), known)
    assays = read_assays(folder, None if only is None else only.split(","))
    with interruptible(), bars("passes") as bar:
        results = evaluate_assays(
            folder,
            assays,
            how,
            models=models,
            output=output,
            overwrite=overwrite,
            load=options.loader(device=device, dtype=dtype, fast=fast),
            progress=bar,
        )
    if as_json:
        show_json({"assays": rows_of_results(results), "means": _means(results)})
    else:
        _show_results(results, published)
        if output is not None:
            typer.echo(f"{output}: {counted(len(results), 'assay')}")
    for result in results:
        if result.problems:
            left_out = counted(result.left_out, "variant")
            tell(f"{result.assay.name}: {left_out} could not be scored: {result.problems[0].reason}", failed=True)
        for advice in result.advice:
            tell(advice, failed=not result.count)
    if any(result.problems or not result.count for result in results):
        raise typer.Exit(1)


def _means(results: list[Measured]) -> dict[str, dict[str, float]]:
    from protea.evaluate.proteingym import MEASURES, means

    return {name: means([result for result in results if result.count], name) for name in MEASURES}


def _show_results(results: list[Measured], published: list[str]) -> None:
    from protea.evaluate.proteingym import MEASURES, counts, means

    rows = []
    for result in results:
        values = [result.measures[name] for name in MEASURES]
        values += [result.assay.published.get(name, float("nan")) for name in published]
        rows.append([result.assay.name, f"{result.count:,}", *(decimals(value) for value in values)])
    computed = [result for result in results if result.count]
    averages = [*_means(results).values()]
    for name in published:
        by_assay = {result.assay.name: result.assay.published.get(name, float("nan")) for result in computed}
        averages.append(means(computed, "spearman", by_assay))
    numbers, of_all = counts(computed), counts(results)
    for over in averages[0]:
        of = "" if numbers[over] == of_all[over] else f"{numbers[over]:,} of "
        label = f"mean over {of}{counted(of_all[over], over.removesuffix('s'))}"
        rows.append([label, "", *(decimals(average[over]) for average in averages)])
    show_table(["assay", "variants", *MEASURES, *published], rows)


@evaluate.command("flip")
@options.options_of(options.computing)
def evaluate_flip(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="FLIP's files, a folder for each task.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help="Folder that receives the predictors and flip.tsv."),
    ],
    model: options.Model = bundled.NAME,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="secondary_structure, conservation, gb1, scl (localisation) or meltome; may be repeated; by default "
            "all.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="frozen (a head on the model as it is), lora, or full.")
    ] = "frozen",
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of training examples of each task, for a quick look."),
    ] = None,
    dtype: options.Dtype = "float32",
    fast: options.Fast = False,
    device: options.Device = "auto",
    token_budget: options.TokenBudget = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Train predictors for the tasks of FLIP and compare their numbers with published ones.

    Each task is trained as `protea finetune --config flip/TASK` does, into OUT/TASK/SPLIT. OUT/flip.tsv has our numbers
    on the test sets with 95 % intervals, the best baseline, published figures, and what differs between them and ours.
    After an interruption the same command continues. Tasks whose files are absent are skipped.

    \b
    Examples:
      protea evaluate flip FLIP/ -m esm2_t33_650M_UR50D -o flip-650M/
      protea evaluate flip FLIP/ -m my-model/ -o quick/ --task gb1 --task meltome --limit 200
    """
    from protea.finetune.flip import TABLE, FlipRun
    from protea.infer.loading import computing_dtype

    computed = computing_dtype(device, dtype, fast=fast)
    values = {"model": model, "method": method, "dtype": computed, "device": device, "token_budget": token_budget}
    with interruptible(), bars() as progress:
        run = FlipRun(
            folder=folder,
            output=output,
            tasks=task or (),
            limit=limit,
            options=values,
            overwrite=overwrite,
            progress=progress,
        )
        table = run()
    if as_json:
        show_json(table.to_pylist())
    else:
        _show_flip(table.to_pylist())
        typer.echo(f"{output / TABLE}: {counted(table.num_rows, 'row')}")
    if limit is not None:
        tell(f"--limit {limit}: trained on a few examples alone; not comparable with published figures")


def _show_flip(rows: list[dict[str, Any]]) -> None:
    """Our numbers, then the published ones with what differs."""
    from protea.finetune.flip import figures

    ours = {(row["task"], row["split"], row["test"], row["number"]): row for row in rows}
    shown = []
    for row in ours.values():
        counts = "/".join(f"{row[part]:,}" for part in ("train", "validation", "test"))
        value, low, high = (
            decimals(float("nan") if row[end] is None else row[end]) for end in ("value", "low", "high")
        )
        baseline = f"{decimals(row['baseline_value'])} {row['baseline']}" if row["baseline"] else ""
        shown.append([row["task"], row["split"], counts, row["number"], f"{value} ({low} to {high})", baseline])
    show_table(["task", "split", "train/validation/test", "number", "value (95 % interval)", "best baseline"], shown)
    published = [row for row in rows if row["source"]]
    if published:
        typer.echo("\nPublished figures; `differs` says what they do not share with ours:")
        cells = [
            [row["task"], row["split"], row["number"], figures(row), row["source"], row["differs"]] for row in published
        ]
        show_table(["task", "our split", "number", "published", "source", "differs"], cells)
