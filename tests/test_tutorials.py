"""Tutorials: every command and line of Python in them runs, in order, and prints what the page shows.

Numbers with decimals may differ by two units of their last digit or by a ten-thousandth, because processors differ.
Precisions, which have three decimals, may differ by two of a hundred pairs. After an intended change,
``PROTEA_WRITE_TUTORIALS=1 python -m pytest tests/test_tutorials.py`` writes the printed output into the pages.
"""

from __future__ import annotations

import doctest
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import protea

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(console|pycon)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAIRS = 0.02
"""Tolerance of a precision, a number with three decimals: two of a hundred pairs may change places."""
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")


class Step(NamedTuple):
    """The typed text as on the page, the output that the page shows, and the output that was printed."""

    typed: str
    shown: str
    printed: str


def alike(printed: str, shown: str) -> bool:
    """Return whether texts are equal except for spaces and differences between processors."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", shown).split():
        return False
    return all(near(ours, theirs) for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True))


def near(printed: str, shown: str) -> bool:
    """Return whether numbers agree: integers exactly, rounding errors by their size, others to the last digits."""
    ours, theirs = (float(number.replace(",", "")) for number in (printed, shown))
    if "e" in shown:
        return theirs / 5 < ours < theirs * 5
    decimals = len(shown.partition(".")[2])
    if not decimals:
        return ours == theirs
    return abs(ours - theirs) <= max(2.5 * 10.0**-decimals, 1e-4 * abs(theirs), PAIRS if decimals == 3 else 0)


def console(block: str, folder: Path) -> Iterator[Step]:
    # The commands run the same Protea as the pages' Python, on the CPU: a GPU gives other last digits.
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(protea.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout}"
        yield Step(f"$ {line}\n", shown, done.stdout)


def python(block: str, names: dict[str, Any]) -> Iterator[Step]:
    for example in doctest.DocTestParser().get_examples(block):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(example.source, "<tutorial>", "single"), names)
        first, *others = example.source.splitlines()
        typed = "".join(f"{line}\n" for line in [f">>> {first}", *(f"... {line}".rstrip() for line in others)])
        yield Step(typed, example.want, printed.getvalue())


QUICK = "variants"
TOOLS = ("bash", "cat", "cut", "grep", "head")


def tools(folder: Path) -> Path:
    """Return a folder with the programs of the pages, and without MMseqs2, which changes numbers where it is."""
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=() if page.stem == QUICK else pytest.mark.long) for page in PAGES]
)
def test_tutorials_print_what_they_show(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tools(tmp_path / "tools")))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {}
    steps: list[Step] = []

    def run(block: re.Match[str]) -> str:
        kind, text = block.groups()
        done = list(console(text, tmp_path) if kind == "console" else python(text, names))
        steps.extend(done)
        return f"```{kind}\n" + "".join(step.typed + step.printed for step in done) + "```"

    text = page.read_text()
    as_printed = BLOCK.sub(run, text)
    assert len(steps) > 3
    if "PROTEA_WRITE_TUTORIALS" in os.environ:
        page.write_text(as_printed)
    else:
        for step in steps:
            assert alike(step.printed, step.shown), f"{step.typed}shown:\n{step.shown}\nprinted:\n{step.printed}"


def test_list_of_tutorials() -> None:
    assert [page.stem for page in PAGES] == ["contacts", "labels", "perplexity", "residues", "scan", "variants"]


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("p 14.9246: 2,395", "p  14.9245: 2,395", True),
        ("p 14.9246: 2,395", "p 14.9246: 2,396", False),
        ("p 14.95", "p 14.92", False),
        ("-5.5597802847623825", "-5.559781", True),
        ("-5.5597802847623825", "-5.56112", False),
        ("1.2e-06", "3.1e-06", True),
        ("1.2e-06", "1.2e-05", False),
        ("a 1", "b 1", False),
        ("1 2", "1", False),
    ],
)
def test_only_last_digits_may_differ(printed: str, shown: str, same: bool) -> None:
    assert alike(printed, shown) == same
