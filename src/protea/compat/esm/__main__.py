"""``python -m protea.compat.esm SCRIPT.py ARGUMENTS...`` runs a script that was written for fair-esm."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Final, NoReturn

from protea.errors import ProteaError, UsageError
from protea.text import printable

_USAGE: Final = """\
Usage: python -m protea.compat.esm SCRIPT.py [ARGUMENTS]...
       python -m protea.compat.esm -m MODULE [ARGUMENTS]...

Runs a script or a module that was written for fair-esm: `import esm` and
torch.hub.load("facebookresearch/esm:main", NAME) give Protea's models.
python -m protea.compat.esm.extract does what esm-extract does."""


def main() -> None:
    """Run what the command line names. A ``ProteaError`` becomes one line, with the script's line that led to it."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    if not arguments or arguments == ["-m"]:
        print(_USAGE, file=sys.stderr)
        sys.exit(UsageError.exit_code)
    try:
        _run(arguments)
    except ProteaError as error:
        fail(error)


def fail(error: ProteaError) -> NoReturn:
    """End with an error in one line."""
    print(f"protea: error: {printable(_place(error) + str(error))}", file=sys.stderr)
    sys.exit(error.exit_code)


def _run(arguments: list[str]) -> None:
    from protea.compat.esm import install

    as_module = arguments[0] == "-m"
    sys.argv = arguments[as_module:]
    script = Path(sys.argv[0])
    if not as_module and not script.is_file():
        raise UsageError(f"{script}: no such script")
    sys.path[0] = str(Path.cwd() if as_module else script.resolve().parent)
    install()
    if as_module:
        runpy.run_module(str(script), run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(script), run_name="__main__")


def _place(error: ProteaError) -> str:
    """The script's line that led to an error, for its message: the last one outside this package and libraries."""
    others = (str(Path(__file__).parents[2]), sys.base_prefix, "site-packages", "dist-packages", "<frozen")
    frames = reversed(traceback.extract_tb(error.__traceback__))
    theirs = (frame for frame in frames if not any(part in frame.filename for part in others))
    return next((f"{frame.filename}, line {frame.lineno}: " for frame in theirs), "")


if __name__ == "__main__":
    main()
