"""``protea doctor``: this machine, what Protea uses of it, and what is missing."""

from __future__ import annotations

import typer

from protea.cli.options import AsJson, options_of
from protea.cli.terminal import show_json


@options_of()
def doctor(as_json: AsJson = False) -> None:
    """Show this machine, what Protea uses of it, what is missing, and the commands that mend it.

    It shows processor, cores, memory, GPUs, compute kernels, the types it multiplies, compilers, and optional packages.
    It changes nothing. Put its output into reports of bugs.

    \b
    Examples:
      protea doctor
      protea doctor --json
    """
    from protea.doctor import examine, summarise

    report = examine()
    if as_json:
        show_json(report)
        return
    for label, value in summarise(report):
        typer.echo(f"{label:<16}{value}")
    for advice in report["advice"]:
        typer.echo(f"\n{advice['what']}:\n  {advice['command']}")
