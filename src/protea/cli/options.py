"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
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
