"""Tutorials: every command and line of Python in them is run, in order, and prints what stands there.

Numbers with decimals may differ by two units of their last digit or a ten-thousandth, as they do between processors,
precisions, which have three decimals, by two pairs of a hundred.
Where one is meant to change, ``PROTEA_WRITE_TUTORIALS=1 python -m pytest tests/test_tutorials.py`` writes what is
printed into the pages.
"""

from __future__ import annotations

import doctest
import io
import os
import re
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
"""Precisions are told to three decimals: two pairs of a hundred may change places."""
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")


class Step(NamedTuple):
    """What is typed, as it stands on the page; what the page says is printed; what is."""

    typed: str
    told: str
    printed: str


def alike(printed: str, told: str) -> bool:
    """Whether texts are equal but for spaces and what processors differ in."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", told).split():
        return False
    return all(near(ours, theirs) for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(told), strict=True))


def near(printed: str, told: str) -> bool:
    """Whether a number is the other: whole ones exactly, rounding errors by their size, others to the last digits."""
    ours, theirs = (float(one.replace(",", "")) for one in (printed, told))
    if "e" in told:
        return theirs / 5 < ours < theirs * 5
    decimals = len(told.partition(".")[2])
    if not decimals:
        return ours == theirs
    return abs(ours - theirs) <= max(2.5 * 10.0**-decimals, 1e-4 * abs(theirs), PAIRS if decimals == 3 else 0)


def console(block: str, folder: Path) -> Iterator[Step]:
    # The same Protea as the pages' Python runs, on a processor: a GPU's last digits are others.
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(protea.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, told = part.partition("\n")
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
        yield Step(f"$ {line}\n", told, done.stdout)


def python(block: str, names: dict[str, Any]) -> Iterator[Step]:
    for example in doctest.DocTestParser().get_examples(block):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(example.source, "<tutorial>", "single"), names)
        first, *others = example.source.splitlines()
        typed = "".join(f"{line}\n" for line in [f">>> {first}", *(f"... {line}".rstrip() for line in others)])
        yield Step(typed, example.want, printed.getvalue())


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_what_a_tutorial_shows_is_what_happens(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
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
            assert alike(step.printed, step.told), f"{step.typed}told:\n{step.told}\nprinted:\n{step.printed}"


def test_there_is_one_for_each_job() -> None:
    assert [page.stem for page in PAGES] == ["contacts", "perplexity", "variants"]


@pytest.mark.parametrize(
    ("printed", "told", "same"),
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
def test_numbers_may_differ_in_their_last_digit_and_nothing_else(printed: str, told: str, same: bool) -> None:
    assert alike(printed, told) == same
