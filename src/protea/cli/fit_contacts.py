"""``protea fit-contacts``: a contact head for a model, from structures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.options import Device, Model
from protea.cli.structures import Structures, show_means, tell_rows
from protea.cli.terminal import bars
from protea.errors import DataError
from protea.text import counted

if TYPE_CHECKING:
    from protea.contacts.fitted_heads import Head


def fit_contacts(
    structures: Structures,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder to write; must be new.")],
    model: Model = bundled.NAME,
    count: Annotated[int, typer.Option(metavar="N", help="Chains to fit on; the others measure the head.")] = 20,
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
    from protea.letters import ReportRow

    settings = FitSettings(head=cast("Head", head), count=count, seed=seed, c=c, rank=rank)
    rows: list[ReportRow] = []
    with interruptible(), bars() as bar:
        try:
            record, precisions = write_fitted(model, structures, output, settings, rows, device=device, progress=bar)
        except DataError:
            tell_rows(rows, "-o writes a report of them")
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
