"""``protea evaluate``: models beside what was measured."""

from __future__ import annotations

import typer

from protea.cli.evaluate_contacts import evaluate_contacts
from protea.cli.evaluate_proteingym import evaluate_proteingym

evaluate = typer.Typer(
    name="evaluate",
    help="Compare what models predict with what was measured.",
    rich_markup_mode=None,
)


@evaluate.callback(invoke_without_command=True)
def _options(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


evaluate.command("contacts")(evaluate_contacts)
evaluate.command("proteingym")(evaluate_proteingym)
