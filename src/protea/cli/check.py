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

    A checkpoint is compared with the published model that it is named after, else with the one whose architecture it
    has. A checkpoint in one file is also recognised by its SHA-256, where its publisher states that.

    Exit code: 0 all agree, 1 some differ, 3 nothing is known to compare with.

    \b
    Examples:
      protea check
      protea check esm2_t6_8M_UR50D
      protea check converted/esm2_t6_8M_UR50D.nemo
    """
    from protea.checkpoints import golden

    findings = golden.check(model)
    typer.echo(f"{findings.path}: {findings.title}, {findings.family}")
    if findings.recognised_as is not None:
        typer.echo(f"pass  the file's SHA-256 is the one published for {findings.recognised_as}")
    for published, difference in findings.differences:
        typer.echo(
            f"{'pass' if difference <= golden.TOLERANCE else 'fail'}  {published.what} of {published.model}, from "
            f"{published.source}: largest difference {difference:.1e}, allowed {golden.TOLERANCE:g}"
        )
    if findings.passed is None:
        which = findings.compared_with or "this architecture"
        typer.echo(f"nothing could be checked: no published numbers are known for {which}")
        raise typer.Exit(_NOTHING_TO_COMPARE)
    if not findings.passed:
        typer.echo(f"these are not {findings.compared_with}'s weights: another training, or a damaged copy")
        raise typer.Exit(1)
