"""``protea pretrain``: train a model by a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protea.cli.interrupt import INTERRUPTED, interruptible
from protea.errors import UsageError

if TYPE_CHECKING:
    from protea.train.loop import Outcome
    from protea.train.recipe import Recipe


def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe's file, or a name from --list.", show_default=False),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, as in run.steps=100.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="RUN", help="Folder of the run, new or unfinished.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Continue although the recipe changed since the run began.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the complete recipe and what it costs.")
    ] = False,
    names: Annotated[bool, typer.Option("--list", help="List the recipes that come with Protea.")] = False,
) -> None:
    """Train a masked language model by a recipe, from the beginning or from where a run stopped.

    After a kill or an interrupt, the same command continues from the newest checkpoint. Ctrl-C and SIGTERM save one.

    \b
    Examples:
      protea pretrain esm2_8M data.store=store/ -o run/
      protea pretrain esm2_8M data.fasta=proteins.fasta.gz batch.tokens=65536 run.steps=2000 -o run/
      protea pretrain domain-adaptation init=esm2_t6_8M_UR50D data.fasta=antibodies.fasta -o run/
      protea pretrain my.yaml optimizer.name=muon optimizer.lr=1e-3 run.compile=true -o run/
      protea pretrain esm2_650M --dry-run
    """
    from protea.train.recipe import list_recipes, read_recipe

    if names:
        for name, title in list_recipes():
            typer.echo(f"{name:<20} {title}")
        return
    if recipe is None:
        raise UsageError("no recipe: give a file, or a name from `protea pretrain --list`")
    settings = read_recipe(recipe, changes or [])
    if dry_run:
        import yaml

        from protea.train.estimate import describe

        typer.echo(yaml.safe_dump(settings.shown(), sort_keys=False).rstrip())
        for line in describe(settings):
            typer.echo(f"# {line}")
        return
    if output is None:
        raise UsageError("no output: give a folder for the run with -o RUN; `--dry-run` needs none")
    outcome = _train(settings, output, accept_changes=accept_changes)
    if not outcome.finished:
        saved = "; a checkpoint is saved" if outcome.step else ""
        typer.echo(f"{output}: stopped after step {outcome.step:,} of {settings.run.steps:,}{saved}", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"{output}: {outcome.step:,} steps done; `protea export {output} -o FOLDER` makes a model of it")


def _train(recipe: Recipe, output: Path, *, accept_changes: bool) -> Outcome:
    with interruptible():
        from protea.cli.pretrain_view import TrainingView
        from protea.train.loop import pretrain as train

        view = TrainingView()
        try:
            with view.bar:
                return train(recipe, output, view, accept_changes=accept_changes)
        except KeyboardInterrupt:
            if view.stop():
                # A second signal: leave at once, before Python waits for the checkpoint that is being written.
                typer.echo(f"{output}: stopped; the same command continues from the newest checkpoint", err=True)
                os._exit(INTERRUPTED)
            raise
