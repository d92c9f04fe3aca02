"""``protea evaluate contacts``: precision of contacts against structures."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli.interrupt import interruptible
from protea.cli.load import circumstances, load_to_compute
from protea.cli.options import Device, Dtype, Fast, Model, Overwrite
from protea.cli.pictures import MapPlot, map_places
from protea.cli.structures import Structures, echo_means, one_bar, tell_notes
from protea.cli.terminal import counted
from protea.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from protea.cli.structures import Progress
    from protea.contacts.precision import ChainPrecision
    from protea.contacts.structures import Chain, Note
    from protea.models.encoder import Encoder


def evaluate_contacts(
    structures: Structures,
    model: Model = bundled.NAME,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="A row a chain: .csv, .tsv or .parquet; printed by default."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="Chains to leave out: a contact-head.json, or a name; may be repeated."),
    ] = None,
    include_fitted: Annotated[
        bool, typer.Option("--include-fitted", help="Keep chains that the model's contact head was fitted on.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the intervals.", min=0)] = 0,
    plot: MapPlot = None,
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure a model's contacts against structures: precision of the L, L/2 and L/5 surest pairs.

    Means over chains come with 95 % intervals, by bootstrap over chains. Chains named in the model's contact-head.json
    are left out. What was skipped, altered or is missing is in OUT.report.tsv. Pictures show predictions above the
    diagonal and the structure's contacts below.

    \b
    Examples:
      protea evaluate contacts structures/ -m esm2_t6_8M_UR50D
      protea evaluate contacts 1abc.cif.gz 2xyz.pdb -m my-model/ -o precision.csv --plot maps
      protea evaluate contacts structures/ -m my-model/ --exclude 1abc:A --exclude other/contact-head.json
    """
    from protea.checkpoints.hub import locate
    from protea.tables import check_output

    if output is not None:
        check_output(output, overwrite=overwrite)
    with interruptible():
        with one_bar() as progress:
            loaded = load_to_compute(model, device=device, dtype=dtype, fast=fast)
            loaded.module.require("contacts")
            exclusions = _Exclusions(exclude or [], None if include_fitted else locate(model))
            chains, notes = _chains(structures, loaded.module, exclusions, progress)
            names = [chain.name for chain in chains]
            pictures = {} if plot is None else map_places(plot, names, overwrite=overwrite)
            rows = _measure(loaded.module, chains, pictures, progress)
        if output is not None:
            settings = {
                "command": "evaluate contacts",
                "structures": [str(one) for one in structures],
                "exclude": exclude or [],
                "include_fitted": include_fitted,
                "seed": seed,
            }
            _write(output, rows, notes, settings | {"models": {model: circumstances(loaded)}})
    if output is None:
        _echo_rows(rows)
    else:
        typer.echo(f"{output}: {counted(len(rows), 'chain')}")
    if plot is not None and rows:
        typer.echo(f"{plot}: their maps")
    if rows:
        echo_means(rows, seed)
    skipped = tell_notes(notes, "-o OUT.csv writes a report of them" if output is None else f"see {output}.report.tsv")
    if skipped or not rows:
        raise typer.Exit(1)


def _chains(
    structures: list[Path], module: Encoder, exclusions: _Exclusions, progress: Progress
) -> tuple[list[Chain], list[Note]]:
    """Chains that can be measured, and notes on all."""
    from protea.contacts.precision import unfit
    from protea.contacts.structures import Note, read_structures, structure_files

    chains, notes = read_structures(structure_files(structures), progress)
    kept, left_out = exclusions.apply(chains)
    notes += left_out
    reasons = {chain.name: unfit(module, chain) for chain in kept}
    notes += [Note(name, "skipped", reason) for name, reason in reasons.items() if reason is not None]
    kept = [chain for chain in kept if reasons[chain.name] is None]
    first: dict[str, str] = {}
    for chain in kept:
        if first.setdefault(chain.sequence, chain.name) != chain.name:
            notes.append(Note(chain.name, "odd", f"has the sequence of {first[chain.sequence]}; both count"))
    return kept, notes


def _measure(
    module: Encoder, chains: Sequence[Chain], pictures: dict[str, Path], progress: Progress
) -> list[ChainPrecision]:
    from protea.contacts.precision import predict, score
    from protea.contacts.structures import contact_map
    from protea.plot import contact_map as draw

    rows = []
    for chain in chains:
        found = predict(module, chain)
        rows.append(score(chain, found))
        if chain.name in pictures:
            true = contact_map(chain)
            draw(pictures[chain.name], found, truth=true.contacts, missing=true.missing, title=chain.name)
        progress("precision", len(rows), len(chains))
    return rows


class _Exclusions:
    """Chains to leave out.

    Args:
        given: names of chains or files, and paths of ``contact-head.json``.
        model: whose own ``contact-head.json`` counts too, if it has one; ``None`` for none.
    """

    def __init__(self, given: Sequence[str], model: Path | None) -> None:
        self._names = [one for one in given if not one.endswith(".json")]
        self._files = [Path(one) for one in given if one.endswith(".json")]
        self._model = model

    def apply(self, chains: Sequence[Chain]) -> tuple[list[Chain], list[Note]]:
        """The chains that are left, and notes on the others.

        Raises:
            UsageError: a name is no chain's and no file's.
            CheckpointError: a file is no ``contact-head.json``.
        """
        from protea.checkpoints.sidecar import head_record_path
        from protea.contacts.fitted_heads import fitted_on
        from protea.contacts.structures import Note

        others = {"--exclude": [fitted_on(path) for path in self._files]}
        if self._model is not None and (own := head_record_path(self._model)).exists():
            others[f"the contact head was fitted on them ({own}); --include-fitted keeps them"] = [fitted_on(own)]
        named = {name for chain in chains for name in _names(chain)}
        if unknown := [name for name in self._names if name not in named]:
            raise UsageError(f"--exclude {unknown[0]}: no chain and no structure has this name")
        kept, notes = [], []
        for chain in chains:
            why = [reason for reason, fitted in others.items() if any(one.covers(chain) for one in fitted)]
            if _names(chain) & set(self._names):
                why = ["--exclude"]
            if why:
                notes.append(Note(chain.name, "left out", why[0]))
            else:
                kept.append(chain)
        return kept, notes


def _names(chain: Chain) -> set[str]:
    """What ``--exclude`` may call a chain: by its name, or its file's."""
    return {chain.name, chain.name.rpartition(":")[0] or chain.name}


def _columns(row: ChainPrecision) -> dict[str, object]:
    values: dict[str, object] = {"name": row.name, "residues": row.residues, "resolved": row.resolved}
    for name, one in row.ranges.items():
        values |= {f"{name}_pairs": one.pairs, f"{name}_contacts": one.contacts}
        values |= {
            f"{name}_{part}": None if isnan(value) else round(value, 6) for part, value in one.precisions.items()
        }
    return values


def _schema() -> pa.Schema:
    """The columns, which a table without rows has too."""
    import pyarrow as pa

    from protea.contacts.precision import PARTS, RANGES

    columns = {"name": pa.string(), "residues": pa.int64(), "resolved": pa.int64()}
    for name in RANGES:
        columns |= {f"{name}_pairs": pa.int64(), f"{name}_contacts": pa.int64()}
        columns |= {f"{name}_{part}": pa.float64() for part in PARTS}
    return pa.schema(list(columns.items()))


def _write(output: Path, rows: Sequence[ChainPrecision], notes: Sequence[Note], settings: dict[str, Any]) -> None:
    import pyarrow as pa

    from protea.tables import Beside, write_table

    table = pa.Table.from_pylist([_columns(row) for row in rows], schema=_schema())
    write_table(output, table, Beside("name\twhat\tdetail", notes, settings))


def _echo_rows(rows: Sequence[ChainPrecision]) -> None:
    if not rows:
        return
    width = max(len("chain"), *(len(row.name) for row in rows))
    heads = [f"{name} {part}" for name, one in rows[0].ranges.items() for part in one.precisions]
    typer.echo("  ".join([f"{'chain':<{width}}", f"{'L':>5}", *heads]))
    for row in rows:
        values = [value for one in row.ranges.values() for value in one.precisions.values()]
        cells = ["-" if isnan(value) else f"{value:.3f}" for value in values]
        aligned = [f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)]
        typer.echo("  ".join([f"{row.name:<{width}}", f"{row.resolved:>5}", *aligned]))
    typer.echo()
