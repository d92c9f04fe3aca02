"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from protea import bundled

Fasta = Annotated[
    list[str],
    typer.Argument(
        metavar="IN.fasta...",
        help="FASTA files, also .gz, .bz2, .xz, .zst; - is standard input.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A published name (`protea info --list`), a folder, or a Hugging Face repository.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, cuda:N.")
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; what weights are held in."),
]
Models = Annotated[
    list[str], typer.Option("-m", "--model", metavar="MODEL", help="Several are an ensemble, whose mean is taken.")
]
BUNDLED: Final = [bundled.NAME]
"""Of ``Models``, where none is named."""

Method = Annotated[str, typer.Option(metavar="NAME", help="masked-marginals, wildtype-marginals or pseudo-likelihood.")]
Offset = Annotated[int, typer.Option(metavar="N", help="The number of a protein's first residue.")]
Windows = Annotated[
    str,
    typer.Option(
        "--long", metavar="POLICY", help="A protein over 1,022 residues: window (as ProteinGym does), full, error."
    ),
]
Fast = Annotated[bool, typer.Option("--fast", help="Compute in bfloat16 where the hardware does so natively.")]
TokenBudget = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Tokens computed at a time; by default what the memory allows.")
]
Unknown = Annotated[
    str, typer.Option(metavar="POLICY", help="A letter outside the alphabet: x (becomes X), error, or skip.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
