"""``protea pretrain``, ``export`` and ``average``: train a model by a recipe, and make models of its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protea.cli.interrupt import INTERRUPTED, interruptible
from protea.cli.options import Dtype, computing, options_of
from protea.cli.terminal import bars, is_quiet, tell
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.train.loop import Outcome
    from protea.train.world import World

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of `protea pretrain`.")]
AnyRun = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of `protea pretrain` or `finetune`.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder to write; must be new.")]


@options_of(computing)
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
        bool,
        typer.Option("--dry-run", help="Only show the complete recipe, its costs, and whether it fits into memory."),
    ] = False,
    names: Annotated[
        bool, typer.Option("--list", help="List the recipes that come with Protea, with their sizes.")
    ] = False,
) -> None:
    """Train a masked language model by a recipe, from the beginning or from where a run stopped.

    After a kill or an interrupt, the same command continues from the newest checkpoint. Ctrl-C and SIGTERM save one.
    data.fasta needs MMseqs2, unless data.cluster=false.

    \b
    Examples:
      protea pretrain esm2_8M data.store=store/ -o run/
      protea pretrain esm2_8M data.fasta=proteins.fasta.gz batch.tokens=65536 run.steps=2000 -o run/
      protea pretrain domain-adaptation init=esm2_t6_8M_UR50D data.fasta=antibodies.fasta -o run/
      protea pretrain domain-adaptation init=my-model/ data.fasta=family.fasta data.cluster=false -o run/
      protea pretrain my.yaml optimizer.name=muon optimizer.lr=1e-3 run.compile=true -o run/
      protea pretrain esm2_650M --dry-run
    """
    if names:
        from protea.train.preview import listing

        for line in listing():
            typer.echo(line)
        return
    if recipe is None:
        raise UsageError("no recipe: give a file, or a name from `protea pretrain --list`")
    if dry_run:
        import yaml

        from protea.train.preview import dry_run as costs_of
        from protea.train.recipe import read_recipe

        settings = read_recipe(recipe, changes or [])
        costs = costs_of(settings)
        typer.echo(yaml.safe_dump(settings.shown(), sort_keys=False).rstrip())
        for line in costs:
            typer.echo(f"# {line}")
        return
    with interruptible():
        from protea.train.world import join

        world = join()
        with world.together():
            outcome = _train(world, recipe, changes or [], output, accept_changes=accept_changes)
    if not outcome.finished:
        raise typer.Exit(INTERRUPTED)


def _train(world: World, recipe: str, changes: list[str], output: Path | None, *, accept_changes: bool) -> Outcome:
    """Train as one process of a world, the first of which tells how it goes."""
    from protea.cli.pretrain_view import TrainingView
    from protea.train.loop import pretrain as train
    from protea.train.recipe import read_recipe

    settings = read_recipe(recipe, changes)
    if output is None:
        raise UsageError("no output: give a folder for the run with -o RUN; `--dry-run` needs none")
    view = TrainingView(quiet=is_quiet() or not world.is_first)
    try:
        with view.bar:
            outcome = train(settings, output, view, accept_changes=accept_changes, world=world)
    except KeyboardInterrupt:
        if view.stop():
            # A second signal: leave at once, before Python waits for the checkpoint that is being written.
            typer.echo(f"{output}: stopped; the same command continues from the newest checkpoint", err=True)
            os._exit(INTERRUPTED)
        raise
    steps = settings.run.steps
    if not world.is_first:
        return outcome
    if outcome.finished:
        typer.echo(
            f"{output}: {counted(outcome.step, 'step')} done; `protea export {output} -o FOLDER` makes a model of it"
        )
    else:
        saved = "; a checkpoint is saved" if outcome.step else ""
        typer.echo(f"{output}: stopped after step {outcome.step:,} of {steps:,}{saved}", err=True)
    return outcome


@options_of()
def export(
    run: AnyRun,
    output: Output,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf: a Hugging Face folder.")] = "hf",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="newest, best (lowest validation loss), or a step, of a pre-training run; newest by default.",
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the LoRA adapter of a fine-tuned run, in peft's layout.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", metavar="MODEL", help="The base model of a fine-tuned run, if it is not where it was."
        ),
    ] = None,
    dtype: Dtype = "float32",
) -> None:
    """Export a training run as a Hugging Face folder, which Protea and transformers load.

    Of a pre-training run, one checkpoint becomes a model. Of a run of `protea finetune`, the trained encoder does, with
    its head if that is one of transformers' (`protea finetune --head hf`).

    \b
    Examples:
      protea export run/ -o model/
      protea export run/ -o model/ --checkpoint best --dtype bfloat16
      protea export stability/ -o classifier/
      protea export stability/ -o adapter/ --adapter
    """
    from protea.device import resolve_dtype
    from protea.finetune.export import is_tuned
    from protea.train.run_export import export as write

    if to != "hf":
        raise UsageError(f"--to {to}: a run is exported as hf; `protea convert` writes other formats of it")
    if is_tuned(run):
        from protea.finetune.export import export as write_tuned

        if checkpoint is not None:
            raise UsageError(f"--checkpoint is for runs of `protea pretrain`; {run} holds one model")
        with interruptible(), bars() as progress:
            exported = write_tuned(
                run, output, dtype=resolve_dtype(dtype), adapter=adapter, base=model, progress=progress
            )
        for note in exported.notes:
            tell(note)
        typer.echo(f"{output}: {exported.what}")
        return
    if adapter or model is not None:
        raise UsageError(f"{run}: {'--adapter' if adapter else '-m'} is for runs of `protea finetune`")
    with interruptible(), bars() as progress:
        saved = write(run, output, which=checkpoint or "newest", dtype=resolve_dtype(dtype), progress=progress)
    loss = "" if saved.loss is None else f", validation loss {saved.loss:.4f}"
    typer.echo(f"{output}: the model after step {saved.step:,}{loss}")


@options_of()
def average(
    run: Run,
    output: Output,
    last: Annotated[int, typer.Option("--last", metavar="N", min=1, help="Number of checkpoints, the newest ones.")],
    dtype: Dtype = "float32",
) -> None:
    """Export the mean of the weights of a training run's newest checkpoints.

    \b
    Examples:
      protea average run/ --last 47 -o model/
    """
    from protea.device import resolve_dtype
    from protea.train.run_export import average as write

    with interruptible(), bars() as progress:
        saved = write(run, output, last=last, dtype=resolve_dtype(dtype), progress=progress)
    typer.echo(f"{output}: mean of {counted(len(saved), 'checkpoint')}, steps {saved[0].step:,} to {saved[-1].step:,}")
