"""``protea perplexity``: how well a model predicts residues that it cannot see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli import options
from protea.cli.interrupt import interruptible
from protea.cli.options import AsJson, Device, Dtype, Fast, Fasta, Model, Overwrite, TokenBudget, loader
from protea.cli.terminal import aside, bars, show_json, tell, tell_doubts
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.score.perplexity import Predicted

_CHANGES_SHOWN = 10  # most records that standard error shows; a report lists all


@options.options_of(options.columns, options.letters, options.computing)
def perplexity(
    inputs: Fasta,
    model: Model = bundled.NAME,
    pseudo: Annotated[
        bool, typer.Option("--pseudo", help="Pseudo-perplexity: mask each residue by itself, one pass per residue.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="One row per sequence: .csv, .tsv or .parquet.")
    ] = None,
    masking: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="How residues are selected and masked: a variant of docs/data.md; default: standard."
        ),
    ] = None,
    select: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of residues to predict; default: that of --masking.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the masks; default: 42.")] = None,
    long: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY", help="A sequence over 1,022 residues: truncate (--pseudo: window), full, error."
        ),
    ] = None,
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    token_budget: TokenBudget = None,
    against: Annotated[
        str | None, typer.Option(metavar="LIBRARY", help="Compare with transformers or fair-esm on the same masks.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="With --pseudo: entropy and perplexity along a protein; .png .svg .html."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    **reading: Any,
) -> None:
    """Perplexity of masked residues over all sequences, or pseudo-perplexity of each.

    Without --pseudo, 15 % of all residues are selected at once, of which 80 % are hidden, 10 % replaced and 10 % left,
    in one pass per sequence; the result is the exponential of the mean loss over all of them. Compare perplexities only
    for the same sequences, masks and cuts.

    \b
    Examples:
      protea perplexity proteins.fasta
      protea perplexity proteins.fasta -m my-model/ --against transformers
      protea perplexity proteins.fasta --pseudo -o pseudo.csv --fast
      protea perplexity protein.fasta --pseudo --plot protein.html
    """
    from protea.checkpoints.peers import check_peer
    from protea.output import check_output
    from protea.plot import check_place, profile
    from protea.rerun import record_plot
    from protea.score.perplexity import measure_perplexity
    from protea.score.proteins import Reading

    if against is not None:
        check_peer(against)
    if pseudo and against is not None:
        raise UsageError("--against compares perplexities of masked residues; leave out --pseudo")
    if pseudo and (masking, select, seed) != (None, None, None):
        raise UsageError("--pseudo masks each residue by itself; leave out --masking, --select and --seed")
    if plot is not None:
        if not pseudo:
            raise UsageError("--plot draws pseudo-perplexity; add --pseudo")
        check_place(plot)
        check_output(plot, overwrite=overwrite or (output is not None and output.exists()))
    with interruptible():
        with bars("residues") as progress:
            predicted = measure_perplexity(
                inputs,
                model=model,
                pseudo=pseudo,
                masking=masking or "standard",
                select=select,
                seed=42 if seed is None else seed,
                long=long,
                reading=Reading(**reading),
                token_budget=token_budget,
                against=against,
                plot=plot,
                output=output,
                overwrite=overwrite,
                load=loader(device=device, dtype=dtype, fast=fast),
                progress=progress,
            )
        if plot is not None and predicted.log_probabilities is not None:
            (name, _, sequence, _), letters = predicted.records[0], predicted.letters
            values = predicted.log_probabilities
            profile(plot, sequence=sequence, log_probabilities=values, letters=letters, title=name)
            (aside if as_json else typer.echo)(f"{plot}: the profile of {name}")
            record_plot(output, plot)
    if as_json:
        show_json(predicted.shown())
    else:
        _show(predicted, output, against)
    changes = tell_doubts(predicted.changes)
    for change in changes[:_CHANGES_SHOWN]:
        tell(f"{change.id}: {change.what}: {change.detail}")
    if len(changes) > _CHANGES_SHOWN:
        tell(f"{counted(len(changes), 'record')} truncated, altered or skipped")
    if not predicted.agrees:
        raise typer.Exit(1)


def _show(predicted: Predicted, output: Path | None, against: str | None) -> None:
    from protea.score.perplexity import TOLERANCE

    numbers = predicted.shown()
    sequences, residues = counted(numbers["sequences"], "sequence"), counted(numbers["residues"], "residue")
    predicted_residues = f"{numbers['predicted_residues']:,} of {residues} predicted"
    typer.echo(f"{predicted.kind} {predicted.perplexity:.4f}: {predicted_residues}, {sequences}")
    if output is not None:
        typer.echo(f"{output}: {sequences}")
    if predicted.peer is not None:
        peer, largest = predicted.peer
        verdict = "equal" if predicted.agrees else "DIFFERS"
        typer.echo(
            f"{against}: perplexity {peer:.4f}, {verdict} within {TOLERANCE}; largest difference of a residue's "
            f"log-probability {largest:.1e}"
        )
