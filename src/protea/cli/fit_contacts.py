"""``protea fit-contacts``: a contact head for a model, from structures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.options import Device, Model
from protea.cli.structures import Structures, echo_means, one_bar, tell_notes
from protea.cli.terminal import counted, tell
from protea.errors import DataError

if TYPE_CHECKING:
    from protea.cli.structures import Progress
    from protea.contacts.fitted_heads import FitSettings, Head
    from protea.contacts.precision import ChainPrecision
    from protea.contacts.structures import Chain, Note


def fit_contacts(
    structures: Structures,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder to write; must be new.")],
    model: Model = bundled.NAME,
    count: Annotated[int, typer.Option(metavar="N", help="Chains to fit on; the others measure the head.")] = 20,
    seed: Annotated[int, typer.Option(help="Chooses the chains.")] = 0,
    head: Annotated[
        str, typer.Option(metavar="KIND", help="regression on attention maps, or bilinear on the last hidden states.")
    ] = "regression",
    c: Annotated[
        float,
        typer.Option("--c", metavar="C", help="Of the regression: inverse strength of its L1 penalty."),
    ] = 0.15,
    rank: Annotated[int, typer.Option(metavar="N", help="Of the bilinear head: rows of P and Q.")] = 32,
    device: Device = "auto",
) -> None:
    """Fit a contact head to structures, and write the model with it.

    FOLDER is a Hugging Face folder with the model's weights as they were, and the head in place of one that the model
    had. contact-head.json in it says what the head was fitted on; `protea evaluate contacts` leaves those chains out.

    \b
    Examples:
      protea fit-contacts structures/ -m my-model/ -o my-model-contacts/
      protea fit-contacts *.cif.gz -m esm1v_t33_650M_UR90S_1 -o esm1v-contacts/ --count 40 --seed 1
      protea fit-contacts structures/ -m my-model/ -o my-model-bilinear/ --head bilinear --count 100
    """
    from protea.contacts.fitted_heads import FitSettings

    settings = FitSettings(head=cast("Head", head), count=count, seed=seed, c=c, rank=rank)
    with interruptible(), one_bar() as progress:
        fitted, rows, notes = _fit(structures, model, output, settings, device, progress)
    _report(output, settings, fitted, rows)
    if tell_notes(notes, f"see {output}/contact-head.json"):
        raise typer.Exit(1)


def _fit(
    structures: list[Path], model: str, output: Path, settings: FitSettings, device: str, progress: Progress
) -> tuple[list[Chain], list[ChainPrecision], list[Note]]:
    """Chains that the head was fitted on, its precision on others, and what was odd."""
    from protea.checkpoints.formats import open_checkpoint
    from protea.checkpoints.hub import locate
    from protea.contacts.fitted_heads import choose, description, fit, write
    from protea.contacts.precision import predict, score, unfit
    from protea.contacts.structures import Note, read_structures, structure_files
    from protea.infer.loading import load_model
    from protea.models.heads import ContactHead
    from protea.output import staged

    files = structure_files(structures)
    with staged(output) as place, open_checkpoint(locate(model)) as checkpoint:
        chains, notes = read_structures(files, progress)
        module = load_model(model, device=device, trainable=True).module
        replaced = module.contact_head is not None
        reasons = {chain.name: unfit(module, chain) for chain in chains}
        notes += [Note(name, "skipped", reason) for name, reason in reasons.items() if reason is not None]
        try:
            chosen, others = choose([chain for chain in chains if reasons[chain.name] is None], settings)
        except DataError:
            tell_notes(notes, "-o writes a report of them")
            raise
        # What is stored may be rounded, and that is what is measured.
        head = fit(module, chosen, settings, progress).to(checkpoint.dtype).float()
        module.contact_head = head
        if isinstance(head, ContactHead) and not head.regression.weight.any():
            tell("no attention head follows contacts: the regression uses none, and all pairs get one probability")
        rows: list[ChainPrecision] = []
        for chain in others:
            rows.append(score(chain, predict(module, chain)))
            progress("precision", len(rows), len(others))
        write(place, checkpoint, head, description(chosen, settings, notes, _versions(), replaced=replaced))
    if replaced:
        tell("this head is in place of the one that the model had")
    return chosen, rows, notes


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import protea

    return {"protea": protea.__version__} | {name: version(name) for name in ("torch", "scikit-learn", "biotite")}


def _report(output: Path, settings: FitSettings, fitted: list[Chain], rows: list[ChainPrecision]) -> None:
    from protea.contacts.structures import pairs

    found = [pairs(chain) for chain in fitted]
    total, contacts = sum(len(one.rows) for one in found), sum(int(one.contacts.sum()) for one in found)
    typer.echo(
        f"{output}: {settings.head} head, fitted on {counted(len(fitted), 'chain')}: {total:,} pairs, {contacts:,} in "
        "contact"
    )
    if rows:
        typer.echo(
            f"precision on {counted(len(rows), 'chain')} that it was not fitted on, with 95 % intervals over chains:"
        )
        echo_means(rows)
