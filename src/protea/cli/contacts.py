"""``protea contacts``: which residues of a protein touch."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.load import circumstances, load_to_compute
from protea.cli.options import Device, Dtype, Fast, Model, Overwrite, Unknown
from protea.cli.pictures import MapPlot, map_places
from protea.cli.terminal import advancing, counted, progress_bars, tell
from protea.errors import SequenceTooLongError, UsageError

if TYPE_CHECKING:
    from protea.letters import ReportRow as Note
    from protea.models.encoder import Encoder


def contacts(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IN.fasta...", help="FASTA, also .gz .bz2 .xz .zst; - is standard input.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="OUT.h5: a map a record; OUT.csv, .tsv or .parquet: a row a pair."
        ),
    ] = None,
    model: Model = bundled.NAME,
    least: Annotated[
        float, typer.Option("--min-probability", metavar="P", help="Of pairs in a table.", min=0, max=1)
    ] = 0.1,
    apart: Annotated[
        int, typer.Option("--min-separation", metavar="N", help="Of pairs in a table, along the chain.", min=1)
    ] = 6,
    plot: MapPlot = None,
    unknown: Unknown = "x",
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Predict contacts: the probability that two residues' Cβ are closer than 8 Å.

    Needs a model with a contact head; `protea fit-contacts` makes one for those without. Proteins are run whole:
    memory grows with the length squared.

    \b
    Examples:
      protea contacts proteins.fasta -m esm2_t33_650M_UR50D -o maps.h5
      protea contacts protein.fasta -m my-model/ -o pairs.csv --min-probability 0.3 --plot map.html
    """
    from protea.contacts.maps import check_maps
    from protea.letters import ReportRow as Note
    from protea.score.proteins import wild_types

    if output is None and plot is None:
        raise UsageError("name an output: -o OUT.h5, or --plot PICTURE")
    if output is not None:
        check_maps(output, overwrite=overwrite)
    settings: dict[str, Any] = {"command": "contacts", "inputs": inputs, "unknown": unknown}
    settings |= {"min_probability": least, "min_separation": apart}
    with interruptible():
        loaded = load_to_compute(model, device=device, dtype=dtype, fast=fast)
        loaded.module.require("contacts")
        notes: list[Note] = []
        proteins = wild_types(inputs, loaded.module.alphabet, unknown, notes)
        for name, sequence in list(proteins.items()):
            if reason := _beyond(loaded.module, len(sequence)):
                notes.append(Note(name, "skipped", reason))
                del proteins[name]
        if not proteins:
            raise SequenceTooLongError(f"{notes[-1].id}: {notes[-1].detail}")
        pictures = {} if plot is None else map_places(plot, list(proteins), overwrite=overwrite)
        settings["models"] = {model: circumstances(loaded)}
        _predict(loaded.module, proteins, output, pictures, notes, settings)
    for note in notes:
        tell(f"{note.id}: {note.what}: {note.detail}")
    for path in [output, plot]:
        if path is not None:
            typer.echo(f"{path}: contacts of {counted(len(proteins), 'protein')}")
    if any(note.what == "skipped" for note in notes):
        raise typer.Exit(1)


def _beyond(model: Encoder, length: int) -> str | None:
    """Why a protein is too long, if it is."""
    from protea.contacts.predict import too_large

    most, frame = model.max_tokens, model.alphabet.frame
    if most is not None and frame.tokens(length) > most:
        takes = frame.residues(most)
        return f"{length:,} residues, and {model.config.family} takes {takes:,}; name a model of the ESM-2 family"
    return too_large(model, length)


def _predict(
    model: Encoder,
    proteins: dict[str, str],
    output: Path | None,
    pictures: dict[str, Path],
    notes: list[Note],
    settings: dict[str, Any],
) -> None:
    from protea.contacts.maps import open_maps
    from protea.contacts.predict import contacts as score_contacts
    from protea.plot import contact_map
    from protea.tables import Beside

    with ExitStack() as stack:
        maps = None
        if output is not None:
            maps = open_maps(output, least=settings["min_probability"], apart=settings["min_separation"])
            stack.callback(maps.abandon)
        progress = stack.enter_context(progress_bars("residues"))
        advance = advancing(progress, "predicting", sum(map(len, proteins.values())))
        for name, sequence in proteins.items():
            (found,) = score_contacts(model, [model.alphabet.encode(sequence)], name)
            if maps is not None:
                maps.add(name, sequence, found)
            if name in pictures:
                contact_map(pictures[name], found, title=name)
            advance(len(sequence))
        if output is not None and maps is not None:
            maps.finish(Beside("id\twhat\tdetail", notes, settings))
