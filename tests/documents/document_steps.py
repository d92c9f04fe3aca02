"""What the documents tell a reader to run: commands in consoles, blocks of Python, code in lines, examples of help.

Documents are the pages (``*.md``), the comments of recipes, and the help of each command.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from test_named_options import LEAVES
from test_structure import ROOT

PROGRAMS: Final = ("protea", "python", "python3", "pip", "curl", "make", "torchrun", "sbatch", "docker", "snakemake")
FENCE: Final = re.compile(r"^( *)(```+|~~~+) *(\w*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
SPAN: Final = re.compile(r"`([^`\n]+)`")
COMMENT: Final = re.compile(r"\s{2,}#\s.*$")
SHELLS: Final = ("console", "bash", "sh", "shell")


@dataclass(frozen=True)
class Step:
    """Something to run: ``kind`` is ``console``, ``python``, ``synopsis`` or ``inline``."""

    place: str
    kind: str
    text: str


def pages() -> list[Path]:
    """Pages that tell users what to run; decisions and results tell what was."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
    return [*found, *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "decisions.md")]


def steps_of_page(path: Path) -> list[Step]:
    """The steps of a page in order; ``inline`` ones last."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    steps: list[Step] = []
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start(4)) + 1
        body = re.sub(rf"^{block[1]}", "", block[4], flags=re.MULTILINE)
        steps += steps_of_block(name, first, block[3], body)
    without = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in SPAN.finditer(without):
        words = span[1].split()
        if len(words) > 1 and words[0] in PROGRAMS:
            steps.append(Step(f"{name}:{without.count(chr(10), 0, span.start()) + 1}", "inline", span[1]))
    return steps


def steps_of_block(name: str, first: int, language: str, body: str) -> Iterator[Step]:
    if language in {"python", "py"}:
        yield Step(f"{name}:{first}", "python", body)
        return
    if language == "pycon":
        yield Step(f"{name}:{first}", "pycon", body)
        return
    if language not in {"", "text", *SHELLS}:
        return
    prompts = any(line.startswith("$ ") for line in body.splitlines())
    for number, line in joined(body):
        typed = line.removeprefix("$ ") if line.startswith("$ ") else None if prompts else line
        if typed is None or not typed.strip() or typed.startswith("#"):
            continue
        words = typed.split()
        if prompts or language in SHELLS:
            yield Step(f"{name}:{first + number}", "console", COMMENT.sub("", typed))
        elif words[0] in PROGRAMS:
            yield Step(f"{name}:{first + number}", kind_of(typed), COMMENT.sub("", typed))


def kind_of(typed: str) -> str:
    """A line without a prompt: a synopsis has brackets, dots or alternatives."""
    return "synopsis" if re.search(r"\[|\.\.\.| \| ", typed) else "console"


def joined(body: str) -> Iterator[tuple[int, str]]:
    """Numbered lines; a backslash at the end joins the next one."""
    waiting, begun = "", 0
    for number, line in enumerate(body.splitlines()):
        begun = begun if waiting else number
        whole = waiting + line.strip() if waiting else line
        if whole.endswith("\\"):
            waiting = whole[:-1].rstrip() + " "
        else:
            yield begun, whole
            waiting = ""


def steps_of_help(name: str) -> list[Step]:
    """The examples of a command's help, without line numbers."""
    text = inspect.cleandoc(LEAVES[name].callback.__doc__ or "")
    _, _, examples = text.partition("Examples:\n")
    body = inspect.cleandoc(examples)
    return [Step(f"protea {name} --help", "console", COMMENT.sub("", line)) for _, line in joined(body) if line]


def steps_of_recipe(path: Path) -> list[Step]:
    """Commands in the comments of a recipe."""
    name = path.relative_to(ROOT).as_posix()
    steps: list[Step] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        spans = (span for span in SPAN.findall(line.partition("#")[2]) if len(span.split()) > 1)
        steps += [Step(f"{name}:{number}", "inline", span) for span in spans if span.split()[0] in PROGRAMS]
    return steps


def is_script(text: str) -> bool:
    """Whether Python must run from a file of its own, because it starts processes."""
    return "__main__" in text
