"""``protea contacts``: which residues of a protein are in contact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.options import Device, Dtype, Fast, Fasta, MapPlot, Model, Overwrite, Unknown, load_to_compute
from protea.cli.structures import picture_paths
from protea.cli.terminal import bars, tell
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.contacts.maps import ContactMap


def contacts(
    inputs: Fasta,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="OUT.h5: a map a record; OUT.csv, .tsv or .parquet: a row a pair."
        ),
    ] = None,
    model: Model = bundled.NAME,
    least: Annotated[
        float,
        typer.Option("--min-probability", metavar="P", help="Least probability of a pair.", min=0, max=1),
    ] = 0.1,
    separation: Annotated[
        int,
        typer.Option("--min-separation", metavar="N", help="Least distance of a pair, in residues.", min=1),
    ] = 6,
    plot: MapPlot = None,
    unknown: Unknown = "x",
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
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
    from protea.letters import ReportRow
    from protea.plot import contact_map
    from protea.score.proteins import wild_types

    if output is None and plot is None:
        raise UsageError("name an output: -o OUT.h5, or --plot PICTURE")
    if output is not None:
        check_maps(output, overwrite=overwrite)
    rows: list[ReportRow] = []
    with interruptible():
        loaded = load_to_compute(model, device=device, dtype=dtype, fast=fast)
        loaded.module.require("contacts")
        proteins = wild_types(inputs, loaded.module.alphabet, unknown, rows)
        proteins = without_too_long(loaded.module, proteins, rows)
        pictures = {} if plot is None else picture_paths(plot, list(proteins), overwrite=overwrite)

        def draw(predicted: ContactMap) -> None:
            if predicted.name in pictures:
                contact_map(pictures[predicted.name], predicted.probabilities, title=predicted.name)

        settings: dict[str, Any] = {"command": "contacts", "inputs": inputs, "unknown": unknown}
        settings |= {"min_probability": least, "min_separation": separation, "models": {model: loaded.circumstances()}}
        with bars("residues") as bar:
            maps = predict_maps(loaded.module, proteins, draw, bar)
            write_maps(output, maps, least=least, separation=separation, rows=rows, settings=settings)
    for row in rows:
        tell(f"{row.id}: {row.what}: {row.detail}")
    for path in filter(None, (output, plot)):
        typer.echo(f"{path}: contacts of {counted(len(proteins), 'protein')}")
    if any(row.what == "skipped" for row in rows):
        raise typer.Exit(1)
