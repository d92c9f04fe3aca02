"""``protea perplexity``: how well a model predicts residues that it cannot see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.load import circumstances, load_to_compute
from protea.cli.options import Device, Dtype, Fast, Model, Overwrite, TokenBudget, Unknown
from protea.cli.terminal import advancing, counted, progress_bars, tell
from protea.disk import check_new
from protea.errors import FastaError, UsageError

if TYPE_CHECKING:
    from protea.infer.runner import FloatArray
    from protea.letters import ReportRow as Note
    from protea.models.encoder import Encoder
    from protea.score.perplexity import Masked
    from protea.score.records import Encoded

_TOLERANCE = 0.0005
"""How far two implementations may be apart in perplexity."""

_SHOWN = 10
"""Notes told on standard error where there is no report."""


def perplexity(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IN.fasta...", help="FASTA, also .gz .bz2 .xz .zst; - is standard input.", show_default=False
        ),
    ],
    model: Model = bundled.NAME,
    pseudo: Annotated[
        bool, typer.Option("--pseudo", help="Pseudo-perplexity: each residue masked by itself, a pass a residue.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="A row a sequence: .csv, .tsv or .parquet.")
    ] = None,
    masking: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which residues are hidden, and how: a variant of docs/data.md; standard by default."
        ),
    ] = None,
    select: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of residues to be predicted; by default that of --masking.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the masks; 42 by default.")] = None,
    long: Annotated[
        str,
        typer.Option(
            metavar="POLICY", help="A sequence over 1,022 residues: truncate (--pseudo: window), full, error."
        ),
    ] = "",
    unknown: Unknown = "x",
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    token_budget: TokenBudget = None,
    against: Annotated[
        str | None, typer.Option(metavar="LIBRARY", help="Also by transformers or fair-esm, on the same masks.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="With --pseudo: entropy and perplexity along a protein; .png .svg .html."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Perplexity of masked residues over all sequences, or pseudo-perplexity of each.

    Without --pseudo: 15 % of all residues at once, of which 80 % hidden, 10 % replaced and 10 % left, one pass a
    sequence, and the exponential of the mean loss over all of them together. Perplexities compare on one set of
    sequences, masks and cuts only.

    \b
    Examples:
      protea perplexity proteins.fasta
      protea perplexity proteins.fasta -m my-model/ --against transformers
      protea perplexity proteins.fasta --pseudo -o pseudo.csv --fast
      protea perplexity protein.fasta --pseudo --plot protein.html
    """
    from protea.plot import check_place
    from protea.score.twin import check_twin
    from protea.tables import check_output

    if against is not None:
        check_twin(against)
    if pseudo and against is not None:
        raise UsageError("--against compares perplexities of masked residues; leave out --pseudo")
    if pseudo and (masking, select, seed) != (None, None, None):
        raise UsageError("--pseudo masks each residue by itself; leave out --masking, --select and --seed")
    if not pseudo and plot is not None:
        raise UsageError("--plot draws what --pseudo finds")
    if plot is not None:
        check_place(plot)
        check_new(plot, overwrite=overwrite)
    if output is not None:
        check_output(output, overwrite=overwrite)
    settings: dict[str, Any] = {"command": "perplexity", "inputs": inputs, "pseudo": pseudo, "unknown": unknown}
    with interruptible():
        loaded = load_to_compute(model, device=device, dtype=dtype, fast=fast)
        if against is not None:
            check_twin(against, loaded.module)
        notes: list[Note] = []
        records = _records(inputs, loaded.module, unknown, notes)
        if pseudo:
            settings["long"] = long or "window"
            found = _pseudo(loaded.module, records, settings, token_budget, plot)
        else:
            settings |= {"long": long or "truncate", "masking": masking or "standard", "select": select}
            settings["seed"] = 42 if seed is None else seed
            masked = _masked(loaded.module, records, settings, notes)
            found = _losses(loaded.module, masked, token_budget)
        _tell(records, found, notes, pseudo=pseudo)
        if output is not None:
            _write(output, records, found, notes, settings | {"models": {model: circumstances(loaded)}})
        same = against is None or _compare(against, model, masked, found)
    if not same:
        raise typer.Exit(1)


def _records(inputs: list[str], model: Encoder, unknown: str, notes: list[Note]) -> list[Encoded]:
    from protea.score.records import encoded

    records = list(encoded(inputs, model.alphabet, unknown, notes))
    if not records:
        raise FastaError(f"{', '.join(inputs)}: no sequence is left")
    return records


def _pseudo(
    model: Encoder, records: list[Encoded], settings: dict[str, Any], token_budget: int | None, plot: Path | None
) -> list[FloatArray]:
    """Losses ``[L]`` of each record, and the picture."""
    import numpy as np

    from protea.infer.budget import default_budget
    from protea.infer.runner import Runner
    from protea.score.expected import Sites, check_policy, masked

    check_policy(settings["long"])
    if plot is not None and len(records) != 1:
        raise UsageError(f"--plot draws one protein, and there are {len(records)}")
    sites = (Sites(record.place, ids, range(len(ids))) for record, ids in records)
    runner = Runner(model, token_budget or default_budget(model))
    found = []
    with progress_bars("residues") as progress:
        advance = advancing(progress, "masking", sum(len(ids) for _, ids in records))
        expected = masked(runner, sites, long=settings["long"], advance=advance)
        for (record, ids), (_, values) in zip(records, expected, strict=True):
            found.append(-values[np.arange(len(ids)), ids])
            if plot is not None:
                _plot(plot, model, record.id, ids, values)
    return found


def _plot(path: Path, model: Encoder, name: str, ids: Any, values: FloatArray) -> None:
    from protea.plot import profile

    letters = model.alphabet.residues
    columns = [model.alphabet.tokens.index(letter) for letter in letters]
    sequence = model.alphabet.decode(ids)
    profile(path, sequence=sequence, log_probabilities=values[:, columns], letters=letters, title=name)


def _masked(model: Encoder, records: list[Encoded], settings: dict[str, Any], notes: list[Note]) -> list[Masked]:
    from dataclasses import asdict, replace

    from protea.data.masking import masking_named
    from protea.embed.prepare import fit
    from protea.score.perplexity import mask
    from protea.score.records import cutting

    how = masking_named(settings["masking"])
    if settings["select"] is not None:
        how = replace(how, select=settings["select"])
    settings["masking"] = asdict(how)
    policy = cutting(settings["long"])
    cut = [fit(record, ids, model, policy.long, notes).ids for record, ids in records]
    named = ((record.place, ids) for (record, _), ids in zip(records, cut, strict=True))
    return list(mask(model.alphabet, named, how, settings["seed"]))


def _losses(model: Encoder, masked: list[Masked], token_budget: int | None) -> list[FloatArray]:
    from protea.infer.budget import default_budget
    from protea.infer.runner import Runner
    from protea.score.perplexity import losses

    runner = Runner(model, token_budget or default_budget(model))
    found = []
    with progress_bars("residues") as progress:
        advance = advancing(progress, "predicting", sum(len(one.tokens) for one in masked))
        for one, values in zip(masked, losses(runner, masked), strict=True):
            found.append(values)
            advance(len(one.tokens))
    return found


def _tell(records: list[Encoded], found: list[FloatArray], notes: list[Note], *, pseudo: bool) -> None:
    from protea.score.perplexity import of_all

    residues, predicted = sum(len(ids) for _, ids in records), sum(map(len, found))
    sequences = counted(len(records), "sequence")
    what = "pseudo-perplexity" if pseudo else "perplexity"
    typer.echo(f"{what} {of_all(found):.4f}: {predicted:,} of {residues:,} residues predicted, {sequences}")
    for note in notes[:_SHOWN]:
        tell(f"{note.id}: {note.what}: {note.detail}")
    if len(notes) > _SHOWN:
        tell(f"{len(notes):,} records were truncated, altered or skipped")


def _write(
    output: Path, records: list[Encoded], found: list[FloatArray], notes: list[Note], settings: dict[str, Any]
) -> None:
    import pyarrow as pa

    from protea.score.perplexity import of_loss
    from protea.tables import Beside, write_table

    losses = [float(values.mean(dtype="float64")) if len(values) else None for values in found]
    columns = {
        "id": [record.id for record, _ in records],
        "length": [len(ids) for _, ids in records],
        "predicted": [len(values) for values in found],
        "loss": losses,
        "perplexity": [None if loss is None else of_loss(loss) for loss in losses],
    }
    write_table(output, pa.table(columns), Beside("id\twhat\tdetail", notes, settings))
    typer.echo(f"{output}: {counted(len(records), 'sequence')}")


def _compare(library: str, model: str, masked: list[Masked], found: list[FloatArray]) -> bool:
    """The same masks through another library; whether both agree."""
    from protea.checkpoints.hub import locate
    from protea.score.perplexity import of_all
    from protea.score.twin import load_twin, losses

    run = load_twin(library, locate(model))
    theirs = []
    with progress_bars("sequences") as progress:
        advance = advancing(progress, library, len(masked))
        for values in losses(run, masked):
            theirs.append(values)
            advance(1)
    ours, other = of_all(found), of_all(theirs)
    largest = max(float(abs(a - b).max()) for a, b in zip(found, theirs, strict=True) if len(a))
    same = abs(ours - other) <= _TOLERANCE
    typer.echo(
        f"{library}: perplexity {other:.4f}, {'equal' if same else 'DIFFERS'} within {_TOLERANCE}; largest difference "
        f"of a residue's log-probability {largest:.1e}"
    )
    return same
