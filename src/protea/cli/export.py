"""``protea export`` and ``protea average``: make models from the checkpoints of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protea.cli.interrupt import interruptible
from protea.cli.options import Dtype

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of `protea pretrain`.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder to write; must be new.")]


def export(
    run: Run,
    output: Output,
    checkpoint: Annotated[
        str, typer.Option(metavar="WHICH", help="newest, best (lowest validation loss), or a step.")
    ] = "newest",
    dtype: Dtype = "float32",
) -> None:
    """Export a checkpoint of a training run as a Hugging Face folder, which Protea and transformers load.

    \b
    Examples:
      protea export run/ -o model/
      protea export run/ -o model/ --checkpoint best --dtype bfloat16
      protea export run/ -o model/ --checkpoint 20000
    """
    from protea.device import resolve_dtype
    from protea.train.average import export as write

    with interruptible():
        saved = write(run, output, which=checkpoint, dtype=resolve_dtype(dtype))
    loss = "" if saved.loss is None else f", validation loss {saved.loss:.4f}"
    typer.echo(f"{output}: the model after step {saved.step:,}{loss}")


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
    from protea.train.average import average as write

    with interruptible():
        saved = write(run, output, last=last, dtype=resolve_dtype(dtype))
    typer.echo(f"{output}: mean of {len(saved)} checkpoints, steps {saved[0].step:,} to {saved[-1].step:,}")
