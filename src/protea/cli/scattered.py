"""Commands that a Ray cluster computes in shards, each of which is the command as it was typed with ``--shard``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import typer

from protea.cli.options import is_given
from protea.errors import UsageError

if TYPE_CHECKING:
    from protea.progress import Progress
    from protea.shards import Shard

Told = TypeVar("Told")

_OF_RAY: Final = ("ray", "shards", "cpus_per_shard", "overwrite")
"""Options that a shard does not receive."""


def check_shares(ctx: typer.Context, output: Path | None) -> Shard | None:
    """The shard that ``--shard`` names; refuses options for shares of the work that exclude each other."""
    from protea.shards import read_shard

    shard, ray, shards = (ctx.params[name] for name in ("shard", "ray", "shards"))
    if ray is not None and shard is not None:
        raise UsageError("--ray makes the shards itself; leave out --shard")
    if ray is None and shards is not None:
        raise UsageError("--shards is for --ray; without it, --shard i/N computes one share")
    if output is None and (ray or shard):
        raise UsageError("shares of the work need an output; name one with -o")
    try:
        return None if shard is None else read_shard(shard)
    except ValueError as error:
        raise UsageError(f"--shard {shard!r}: {error}") from error


def command_line(ctx: typer.Context, changes: Mapping[str, Any]) -> list[str]:
    """The command with the options that were typed, some of them changed; ``None`` leaves one out."""
    options: list[str] = []
    arguments: list[str] = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        value = changes.get(name, ctx.params.get(name) if is_given(ctx, name) else None)
        flag = max(parameter.opts, key=len)
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is None or each is False:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(str(each))
            else:
                options.append(flag if each is True else f"{flag}={each}")
    return [str(ctx.info_name), *options, "--", *arguments]


def on_ray(
    ctx: typer.Context,
    output: Path,
    inputs: Sequence[str],
    progress: Progress,
    *,
    finished: Callable[[], Told],
    join: Callable[[Path, list[Path], bool], Told],
    title: str,
    done: Callable[[Path], int] | None = None,
) -> Told:
    """Run a command with the options of ``--ray``; see ``ShardedCommand`` for the arguments."""
    from protea.output import check_output
    from protea.scatter import ShardedCommand, run_on_ray

    values = ctx.params
    left_out = dict.fromkeys(_OF_RAY)

    def arguments(shard: Shard, hidden: Mapping[Path, Path]) -> list[str]:
        return command_line(ctx, {**left_out, "output": hidden[output], "shard": shard})

    command = ShardedCommand(
        outputs=[output],
        inputs=inputs,
        options={"typed": command_line(ctx, left_out)},
        arguments=arguments,
        check=lambda path, overwrite: check_output(path, overwrite=overwrite, beside=True),
        finished=finished,
        merge=join,
        title=title,
        done=done,
    )
    return run_on_ray(
        command,
        values["ray"],
        progress,
        shards=values["shards"],
        cpus=values["cpus_per_shard"],
        gpu=values["device"] != "cpu",
        overwrite=values["overwrite"],
    )
