"""Writes tutorials as notebooks beside their pages: ``python docs/notebooks.py``, or ``make notebooks``.

The page is the source: its text becomes cells of text, each command a cell for bash, each part of a Python session up
to its output a cell of Python, and what the page shows their output. Nothing runs here.
"""

from __future__ import annotations

import doctest
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent / "tutorials"
NAMES: Final = ("embed", "variants", "contacts")
BLOCK: Final = re.compile(r"^```(console|pycon)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
START: Final = """import os

if not os.path.isdir("examples"):
    os.chdir("../..")  # to the root of the repository, where the examples are"""
METADATA: Final = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def text_cell(text: str) -> dict[str, Any]:
    """A cell of text."""
    return {"cell_type": "markdown", "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}


def code_cell(code: str, printed: str = "") -> dict[str, Any]:
    """A cell of code with what it prints."""
    stream = {"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [stream] if printed else [],
        "source": code.rstrip("\n").splitlines(keepends=True),
    }


def console_cells(block: str) -> Iterator[dict[str, Any]]:
    """A cell for each command."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        yield code_cell(f"%%bash\n{line}", shown)


def python_cells(block: str) -> Iterator[dict[str, Any]]:
    """A cell for the lines up to each output."""
    waiting = ""
    for example in doctest.DocTestParser().get_examples(block):
        waiting += example.source
        if example.want:
            yield code_cell(waiting, example.want)
            waiting = ""
    if waiting:
        yield code_cell(waiting)


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page."""
    cells, end = [], 0
    for block in BLOCK.finditer(page):
        before = page[end : block.start()]
        cells += [text_cell(before)] if before.strip() else []
        cells += list((console_cells if block[1] == "console" else python_cells)(block[2]))
        end = block.end()
    cells.append(text_cell(page[end:]))
    cells.insert(1, code_cell(START))
    numbered = [{"id": f"cell-{number}"} | cell for number, cell in enumerate(cells)]
    return {"cells": numbered, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def as_file(page: Path) -> str:
    """The text of a page's notebook file."""
    return json.dumps(notebook(page.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        (FOLDER / f"{name}.ipynb").write_text(as_file(FOLDER / f"{name}.md"), encoding="utf-8")
        print(f"docs/tutorials/{name}.ipynb")
