"""Options that several commands share, each declared once, and the loading of the model that they name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from protea import bundled
from protea.cli.terminal import bars, be_quiet, tell
from protea.supported import check_torch

if TYPE_CHECKING:
    from protea.infer.loading import ModelLoader

FASTA: Final[Any] = typer.Argument(
    metavar="IN.fasta...",
    help="FASTA files, also .gz, .bz2, .xz, .zst; - is standard input; or tables: .csv, .tsv, .parquet.",
    show_default=False,
)
Fasta = Annotated[list[str], FASTA]
Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A published name (see `protea info --list`), a folder, or a Hugging Face repository.",
    ),
]
Models = Annotated[
    list[str],
    typer.Option("-m", "--model", metavar="MODEL", help="Model; give several for the mean of an ensemble."),
]
BUNDLED: Final = [bundled.NAME]
"""Default of ``Models``."""

Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, cuda:N.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="TYPE", help="Type to compute in: float32, bf16-mixed, bfloat16, float16, or int8 on a CPU."
    ),
]
Fast = Annotated[bool, typer.Option("--fast", help="Multiply in bfloat16 (--dtype bf16-mixed) if the hardware can.")]


def _use_threads(count: int | None) -> None:
    if count is not None:
        from protea.limits import use_threads

        use_threads(count)


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Number of CPU threads to compute with; by default one for each core that this process may use.",
        callback=_use_threads,
        expose_value=False,
    ),
]
TokenBudget = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Number of tokens computed at a time; by default as memory allows."),
]
Unknown = Annotated[
    str,
    typer.Option(
        metavar="POLICY", help="What to do with a letter outside the alphabet: x (replace by X), error, skip."
    ),
]
Gaps = Annotated[
    str,
    typer.Option(metavar="POLICY", help="What to do with gaps (- and .) of an alignment: keep (as residues), drop."),
]
IdColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of ids in input tables; by default known by its name.")
]
SequenceColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of sequences in input tables; by default known by its name.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        help="Show no progress and no notes; results and errors remain.",
        callback=be_quiet,
        expose_value=False,
        is_eager=True,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]

Shard = Annotated[
    str | None,
    typer.Option(
        metavar="i/N", help="Compute share i of N equal shares, into OUT.shard-i-of-N; join them with protea merge."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Compute on a Ray cluster with a shared disk: auto, HOST:PORT, ray://HOST:PORT.",
    ),
]
Shards = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="With --ray: number of shards; by default 4 for each worker.")
]
CpusPerShard = Annotated[int, typer.Option(metavar="N", min=1, help="With --ray: cores of a shard without a GPU.")]

Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Scoring: masked-marginals, wildtype-marginals, pseudo-likelihood or pseudo-likelihood-sum.",
    ),
]
Offset = Annotated[int, typer.Option(metavar="N", help="Number of the protein's first residue.")]
Windows = Annotated[
    str,
    typer.Option(
        "--long",
        metavar="POLICY",
        help="What to do with a protein over 1,022 residues: window (as ProteinGym does), full, error.",
    ),
]
MapPlot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="PICTURE", help="Draw a contact map: .png, .svg, .html, or a folder with one map per protein."
    ),
]


class Commands(TyperGroup):
    """A group of commands whose help has the whole first sentence of each; Typer cuts it to one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        commands = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(commands)


def letters(*, unknown: Unknown = "x", gaps: Gaps = "keep") -> None:
    """The policies for letters. Their names, and those of ``columns``, are the ones of ``Reading``."""


def columns(*, id_column: IdColumn = None, sequence_column: SequenceColumn = None) -> None:
    """The columns of input tables."""


def computing(*, threads: Threads = None) -> None:
    """The threads of a command that computes. They are set when the option is read; commands do not receive it."""


def _every_command(*, quiet: Quiet = False) -> None:
    """The option of every command. Reading it sets it; commands do not receive it."""


_NOT_RECEIVED: Final[dict[Callable[..., None], str]] = {computing: "threads", _every_command: "quiet"}
"""Options that Typer passes on although they are not exposed."""


def options_of(*groups: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some groups, which it receives as keyword arguments, and those of all commands."""
    return partial(_Command, groups=(*groups, _every_command))


class _Command:
    """A command with its options, whose signature is made when it is asked for: the list of commands needs none."""

    def __init__(self, command: Callable[..., None], groups: tuple[Callable[..., None], ...]) -> None:
        update_wrapper(self, command)
        self._command, self._groups = command, groups

    def __call__(self, **values: Any) -> None:
        for group in _NOT_RECEIVED.keys() & self._groups:
            values.pop(_NOT_RECEIVED[group], None)
        check_torch()
        self._command(**values)

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = {
            parameter.name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for function in (self._command, *self._groups)
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        return inspect.Signature([*parameters.values()])


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    return getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"


def loader(*, device: str, dtype: str, fast: bool) -> ModelLoader:
    """What loads models as the options say; notes if ``--fast`` has no effect without native bfloat16."""
    from protea.infer.loading import ModelLoader, computing_dtype

    computed = computing_dtype(device, dtype, fast=fast)
    if fast and computed == "float32":
        tell("--fast: this hardware has no native bfloat16; computing in float32")
    return ModelLoader(device, computed, bars)
