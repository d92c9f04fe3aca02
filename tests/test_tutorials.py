"""Tutorials: every command and line of Python in them runs, in order, and prints what the page shows.

Numbers with decimals may differ by two units of their last digit or by a ten-thousandth, because processors differ.
Precisions, which have three decimals, may differ by two of a hundred pairs. After an intended change,
``PROTEA_WRITE_TUTORIALS=1 python -m pytest tests/test_tutorials.py`` writes the printed output into the pages, and
``make notebooks`` writes the notebooks from the pages. A page's port 8000 is a free one here.
"""

from __future__ import annotations

import doctest
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
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


def shell(line: str, folder: Path) -> str:
    """Run a line in bash and return all that it printed."""
    # The commands run the same Protea as the pages' Python, on the CPU: a GPU gives other last digits.
    source = [str(Path(protea.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, source)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
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
    return done.stdout


def console(block: str, folder: Path, port: int) -> Iterator[Step]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        typed = line.replace(PORT, f":{port}").replace("protea serve", f"protea serve --port {port}")
        yield Step(f"$ {line}\n", shown, shell(typed, folder).replace(f":{port}", PORT))


def python(block: str, names: dict[str, Any], port: int) -> Iterator[Step]:
    for example in doctest.DocTestParser().get_examples(block):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(example.source.replace(PORT, f":{port}"), "<tutorial>", "single"), names)
        first, *others = example.source.splitlines()
        typed = "".join(f"{line}\n" for line in [f">>> {first}", *(f"... {line}".rstrip() for line in others)])
        yield Step(typed, example.want, printed.getvalue().replace(f":{port}", PORT))


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A free port; a service whose page failed before its end is stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    yield number
    pid = tmp_path / "service.pid"
    if pid.exists():
        with suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


QUICK = "variants"
PORT = ":8000"
TOOLS = ("bash", "cat", "curl", "cut", "grep", "head")


def tools(folder: Path) -> Path:
    """Return a folder with the programs of the pages, and without MMseqs2, which changes numbers where it is."""
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=() if page.stem == QUICK else pytest.mark.long) for page in PAGES]
)
def test_tutorials_print_what_they_show(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    if "protea serve" in page.read_text():
        pytest.importorskip("uvicorn")
        pytest.importorskip("fastapi")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tools(tmp_path / "tools")))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {}
    steps: list[Step] = []

    def run(block: re.Match[str]) -> str:
        kind, text = block.groups()
        done = list(console(text, tmp_path, port) if kind == "console" else python(text, names, port))
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
    names = ["contacts", "embed", "family", "labels", "perplexity", "residues", "scan", "serve", "variants"]
    assert [page.stem for page in PAGES] == names
    for page in PAGES:
        assert set(re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)) <= {"console", "pycon"}, page


# ---- notebooks ----
def generator() -> Any:
    """The program that writes notebooks."""
    path = ROOT / "docs" / "notebooks.py"
    specification = importlib.util.spec_from_file_location("notebooks", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


NOTEBOOKS = generator()


@pytest.mark.parametrize("name", NOTEBOOKS.NAMES)
def test_a_notebook_is_its_page(name: str) -> None:
    """Its code is all of the page's code and nothing else, its text the page's; `make notebooks` writes it."""
    page, file = (ROOT / "docs" / "tutorials" / f"{name}{suffix}" for suffix in (".md", ".ipynb"))
    assert file.read_text(encoding="utf-8") == NOTEBOOKS.as_file(page)
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    start, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert start == NOTEBOOKS.START
    typed = [line for block in BLOCK.findall(page.read_text()) for line in block[1].splitlines()]
    lines = [line[2:] for line in typed if line.startswith("$ ")]
    lines += [line[4:] for line in typed if line.startswith((">>> ", "... "))]
    ours = [line for cell in code for line in cell.removeprefix("%%bash\n").splitlines()]
    assert sorted(lines) == sorted(ours)


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS.NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads((ROOT / "docs" / "tutorials" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("%%bash\n"):
            shell(source.removeprefix("%%bash\n"), tmp_path)
        elif cell["cell_type"] == "code":
            with redirect_stdout(io.StringIO()):
                exec(compile(source, f"{name}.ipynb", "exec"), names)


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
