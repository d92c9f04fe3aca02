"""``protea pretrain``: a recipe in, a run out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protea.cli.interrupt import INTERRUPTED, interruptible
from protea.errors import UsageError

if TYPE_CHECKING:
    from protea.train.recipe import Recipe


def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe's file, or a name from --list.", show_default=False),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of it to change, as in run.steps=100.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="RUN", help="Folder of the run; an earlier one goes on.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the recipe changed since the run began.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the whole recipe and what it takes; no more.")
    ] = False,
    names: Annotated[bool, typer.Option("--list", help="Name the recipes that come along.")] = False,
) -> None:
    """Train a masked language model by a recipe, from the beginning or from where a run stopped.

    Killed or interrupted, the same command goes on from the newest checkpoint; Ctrl-C and SIGTERM save one first.

    \b
    Examples:
      protea pretrain esm2_8M data.store=store/ -o run/
      protea pretrain esm2_8M data.fasta=proteins.fasta.gz batch.tokens=65536 run.steps=2000 -o run/
      protea pretrain domain-adaptation init=esm2_t6_8M_UR50D data.fasta=antibodies.fasta -o run/
      protea pretrain my.yaml optimizer.name=muon optimizer.lr=1e-3 run.compile=true -o run/
      protea pretrain esm2_650M --dry-run
    """
    from protea.train.reading import list_recipes, read_recipe

    if names:
        for name, title in list_recipes():
            typer.echo(f"{name:<20} {title}")
        return
    if recipe is None:
        raise UsageError("no recipe named: give a file, or a name from `protea pretrain --list`")
    known = read_recipe(recipe, changes or [])
    if dry_run:
        _show(known)
        return
    if output is None:
        raise UsageError("no folder named: give -o RUN; `--dry-run` shows what a recipe takes without one")
    with interruptible():
        from protea.cli.pretrain_view import View
        from protea.train.loop import pretrain as run

        view = View()
        try:
            with view:
                outcome = run(known, output, view, accept_changes=accept_changes)
        except KeyboardInterrupt:
            if view.stop():
                # Once more: Python would still wait for the checkpoint that is being written.
                typer.echo(f"{output}: broken off; the same command goes on from the newest checkpoint", err=True)
                os._exit(INTERRUPTED)
            raise
    if not outcome.finished:
        saved = ", which is saved" if outcome.step else ""
        typer.echo(f"{output}: stopped after step {outcome.step:,} of {known.run.steps:,}{saved}", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"{output}: {outcome.step:,} steps done; `protea export {output} -o FOLDER` makes a model of it")


def _show(recipe: Recipe) -> None:
    import yaml

    from protea.cli.pretrain_view import cost
    from protea.train.estimate import estimate
    from protea.train.model import architecture

    typer.echo(yaml.safe_dump(recipe.shown(), sort_keys=False).rstrip())
    # What a sequence of full length costs: the data, which would tell, may not be at hand.
    for line in cost(estimate(architecture(recipe), recipe, recipe.data.max_tokens), recipe):
        typer.echo(f"# {line}")
