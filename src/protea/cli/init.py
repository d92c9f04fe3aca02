"""``protea init``: a model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protea.cli.options import Dtype


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name from `protea info --list`.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write; must be new.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights, on any machine.")] = 0,
    dtype: Dtype = "float32",
) -> None:
    """Write a model of a published architecture with random weights, by its family's own initialisation.

    \b
    Examples:
      protea init esm2_t6_8M_UR50D -o model/ --seed 1
      protea init esm1nv -o nv/
    """
    from protea.checkpoints import hf
    from protea.checkpoints.hub import architecture, published
    from protea.device import resolve_dtype

    known = published(model)
    hf.write_random(output, architecture(known), seed=seed, dtype=resolve_dtype(dtype))
    typer.echo(f"{output}: {known.name} with random weights (seed {seed}); it knows nothing of proteins yet")
