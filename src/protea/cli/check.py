"""``protea check``: whether a checkpoint gives the published numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from protea import bundled

_NOTHING_TO_COMPARE = 3


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A published name, or a checkpoint of any format.")
    ] = bundled.NAME,
) -> None:
    """Compare what a checkpoint computes with the numbers that were published for it.

    It is compared with the published model it is named after, else with the one whose architecture it has; a
    checkpoint in one file is also recognised by its SHA-256, where its publisher states that.

    Exit code: 0 all agree, 1 some differ, 3 nothing is known to compare with.

    \b
    Examples:
      protea check
      protea check esm2_t6_8M_UR50D
      protea check converted/esm2_t6_8M_UR50D.nemo
    """
    import torch

    from protea.checkpoints.formats import open_checkpoint, recognised
    from protea.checkpoints.golden import TOLERANCE, compare, meant
    from protea.checkpoints.hub import by_sha256, locate
    from protea.disk import sha256

    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        name = meant(model, checkpoint.model)
        typer.echo(f"{path}: {recognised(path).TITLE}, {checkpoint.model.config.family}")
        findings = (
            [] if name is None else compare(checkpoint.load(dtype=torch.float32, device=torch.device("cpu")), name)
        )
    file = path if path.is_file() else None
    published_as = None if file is None else by_sha256(sha256(file))
    if published_as is not None:
        typer.echo(f"pass  the file's SHA-256 is the one published for {published_as}")
    for finding in findings:
        golden = finding.golden
        verdict = "pass" if finding.passed else "fail"
        typer.echo(
            f"{verdict}  {golden.what} of {golden.model}, from {golden.source}: largest difference "
            f"{finding.difference:.1e}, allowed {TOLERANCE:g}"
        )
    if not findings and published_as is None:
        which = "this architecture" if name is None else name
        typer.echo(f"nothing could be checked: no published numbers are known for {which}")
        raise typer.Exit(_NOTHING_TO_COMPARE)
    if not all(finding.passed for finding in findings):
        typer.echo(f"these are not {name}'s weights: others of its architecture, or a damaged copy")
        raise typer.Exit(1)
