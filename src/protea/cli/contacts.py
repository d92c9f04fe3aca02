"""``protea contacts``, ``protea fit-contacts``, and what they share with ``protea evaluate contacts``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from protea import bundled
from protea.cli import options
from protea.cli.interrupt import interruptible
from protea.cli.options import Device, Dtype, Fast, Fasta, MapPlot, Model, Overwrite, loader
from protea.cli.terminal import bars, show_table, tell, tell_doubts
from protea.errors import DataError, UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.contacts.fitted_heads import Head
    from protea.contacts.precision import ChainPrecision
    from protea.infer.runner import FloatArray
    from protea.letters import ReportRow

Structures = Annotated[
    list[Path],
    typer.Argument(metavar="STRUCTURES", help="PDB or mmCIF files, also .gz, or folders.", show_default=False),
]


@options.options_of(options.columns, options.letters, options.computing)
def contacts(
    inputs: Fasta,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="OUT.h5: one map per record; OUT.csv, .tsv or .parquet: one row per pair.",
        ),
    ] = None,
    model: Model = bundled.NAME,
    least: Annotated[
        float, typer.Option("--min-probability", metavar="P", help="Least probability of a pair.", min=0, max=1)
    ] = 0.1,
    separation: Annotated[
        int, typer.Option("--min-separation", metavar="N", help="Least distance of a pair, in residues.", min=1)
    ] = 6,
    plot: MapPlot = None,
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Predict contacts: the probability that the Cβ atoms of two residues are closer than 8 Å.

    The model needs a contact head; `protea fit-contacts` makes one for models without. Each protein is computed as a
    whole: memory grows with the square of its length.

    \b
    Examples:
      protea contacts proteins.fasta -m esm2_t33_650M_UR50D -o maps.h5
      protea contacts protein.fasta -m my-model/ -o pairs.csv --min-probability 0.3 --plot map.html
    """
    from protea.contacts.maps import check_maps, predict_maps, without_too_long, write_maps
    from protea.output import fingerprint
    from protea.rerun import INPUT, PLOT
    from protea.score.proteins import Reading, wild_types

    if output is None and plot is None:
        raise UsageError("name an output: -o OUT.h5, or --plot PICTURE")
    reading = Reading(**given)
    settings: dict[str, Any] = {"command": "contacts", "inputs": inputs, **asdict(reading)}
    settings |= {
        "min_probability": least,
        "min_separation": separation,
        INPUT: fingerprint(inputs),
        PLOT: plot and str(plot),
    }
    load = loader(device=device, dtype=dtype, fast=fast)
    rows: list[ReportRow] = []
    with interruptible():
        if output is not None:
            check_maps(output, settings, lambda: load.identities([model]), overwrite=overwrite)
        loaded = load(model)
        loaded.module.require("contacts")
        proteins = wild_types(inputs, loaded.module.alphabet, reading, rows)
        proteins = without_too_long(loaded.module, proteins, rows)
        pictures = {} if plot is None else picture_paths(plot, list(proteins), overwrite=overwrite)

        def draw(name: str, probabilities: FloatArray) -> None:
            if name in pictures:
                draw_map(pictures[name], probabilities, title=name)

        settings["models"] = {model: loaded.circumstances()}
        with bars("residues") as bar:
            maps = predict_maps(loaded.module, proteins, draw, bar)
            write_maps(output, maps, rows, settings)
    for row in tell_doubts(rows):
        tell(f"{row.id}: {row.what}: {row.detail}", failed=row.what == "skipped")
    for path in filter(None, (output, plot)):
        typer.echo(f"{path}: contacts of {counted(len(proteins), 'protein')}")
    if any(row.what == "skipped" for row in rows):
        raise typer.Exit(1)


@options.options_of(options.computing)
def fit_contacts(
    structures: Structures,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder to write; must be new.")],
    model: Model = bundled.NAME,
    count: Annotated[int, typer.Option(metavar="N", help="Chains to fit on; the head is measured on the others.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed for the choice of chains and for the fit.")] = 0,
    head: Annotated[
        str, typer.Option(metavar="KIND", help="regression on attention maps, or bilinear on the last hidden states.")
    ] = "regression",
    c: Annotated[
        float, typer.Option("--c", metavar="C", help="Inverse strength of the regression's L1 penalty.")
    ] = 0.15,
    rank: Annotated[int, typer.Option(metavar="N", help="Rows of the bilinear head's P and Q.")] = 32,
    device: Device = "auto",
) -> None:
    """Fit a contact head to structures, and write the model with it.

    FOLDER is a Hugging Face folder with the model's weights unchanged; the new head replaces one that the model had.
    Its contact-head.json lists the chains that the head was fitted on; `protea evaluate contacts` leaves them out.

    \b
    Examples:
      protea fit-contacts structures/ -m my-model/ -o my-model-contacts/
      protea fit-contacts *.cif.gz -m esm1v_t33_650M_UR90S_1 -o esm1v-contacts/ --count 40 --seed 1
      protea fit-contacts structures/ -m my-model/ -o my-model-bilinear/ --head bilinear --count 100
    """
    from protea.contacts.fitted_heads import FitSettings, write_fitted

    settings = FitSettings(head=cast("Head", head), count=count, seed=seed, c=c, rank=rank)
    rows: list[ReportRow] = []
    with interruptible(), bars() as bar:
        try:
            record, precisions = write_fitted(model, structures, output, settings, rows, device=device, progress=bar)
        except DataError:
            tell_rows(rows)
            raise
    typer.echo(
        f"{output}: {head} head, fitted on {counted(count, 'chain')}: {record['pairs']:,} pairs, "
        f"{record['contacts']:,} in contact"
    )
    if precisions:
        chains = counted(len(precisions), "chain")
        typer.echo(f"precision on {chains} that it was not fitted on, with 95 % intervals over chains:")
        show_means(precisions)
    if tell_rows(rows, f"see {output}/contact-head.json"):
        raise typer.Exit(1)


def tell_rows(rows: Sequence[ReportRow], report: str | None = None) -> bool:
    """Tell which files and chains were skipped, and count the other rows; return whether anything was skipped.

    ``report`` says where the other rows are listed, or how to have them listed, if there is a way.
    """
    for row in rows:
        if row.what == "skipped":
            tell(f"{row.id}: skipped: {row.detail}", failed=True)
    for reason, count in Counter(row.detail for row in rows if row.what == "left out").items():
        tell(f"left out {counted(count, 'chain')}: {reason}")
    if odd := Counter(row.what for row in rows if row.what not in ("skipped", "left out")):
        where = "" if report is None else f"; {report}"
        tell(f"structures: {', '.join(f'{count} {what}' for what, count in sorted(odd.items()))}{where}")
    return any(row.what == "skipped" for row in rows)


def show_means(chains: Sequence[ChainPrecision], seed: int = 0) -> None:
    """Print mean precisions with their intervals, one line per range."""
    from protea.contacts.precision import means

    by_range = means(chains, seed)
    parts = list(next(iter(by_range.values())))
    rows = []
    for name, by_part in by_range.items():
        cells = [name, str(by_part["chance"].chains)]
        for part, mean in by_part.items():
            # One chain has no interval over chains.
            interval = "" if part == "chance" or mean.chains < 2 else f" ({mean.low:.3f} to {mean.high:.3f})"
            cells.append(decimals(mean.value) + interval)
        rows.append(cells)
    show_table(["range", "chains", *parts], rows)


def decimals(value: float) -> str:
    """A number for a table; a dash for nan."""
    return "-" if isnan(value) else f"{value:.3f}"


def picture_paths(plot: Path, names: Sequence[str], *, kind: str = ".png", overwrite: bool) -> dict[str, Path]:
    """Where each protein's picture goes: the file, or one of a kind in the folder, if it can be written there."""
    from protea.embed.stores import file_name
    from protea.output import check_output
    from protea.plot import check_kind, check_place

    single = plot.suffix != "" and not plot.is_dir()
    if single and len(names) > 1:
        raise UsageError(f"--plot {plot}: there are {len(names):,} proteins; name a folder for their pictures")
    if single:
        check_place(plot)
    else:
        check_kind(kind, plot)
    paths = {name: plot if single else plot / f"{file_name(name)}{kind}" for name in names}
    if plot.is_dir():
        for path in paths.values():
            check_output(path, overwrite=overwrite)
    else:
        check_output(plot, overwrite=overwrite, ours=None if single else lambda _: False)
    return paths


def draw_map(path: Path, probabilities: FloatArray, **options: Any) -> None:
    """Draw a contact map where ``picture_paths`` says; its folder is made with its first picture."""
    from protea.output import write_failure
    from protea.plot import contact_map

    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise write_failure(error, path.parent) from error
    contact_map(path, probabilities, **options)
