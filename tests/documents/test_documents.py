"""Every command and every block of Python in the documents runs, with small stand-ins for files and models.

What a page tells a reader to type runs in order in an empty folder. ``not_run.py`` lists what cannot run here, with
reasons; that is parsed by the real parser, as are synopses and commands within sentences. Tutorials run, with what they
print, in ``tests/test_tutorials.py``. A step that fails names its page and line.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import document_steps
import huggingface_hub.constants
import pytest
from commands import parse, protea_words, without_placeholders
from document_steps import Step, pages, steps_of_help, steps_of_page, steps_of_recipe
from not_run import NOT_RUN, SLOW
from run_document import Document, StepError
from stand_in_models import Models

from test_named_options import LEAVES
from test_structure import ROOT

DOCUMENTS = {
    **{path.relative_to(ROOT).as_posix(): steps_of_page(path) for path in pages()},
    **{f"recipes/{path.name}": steps_of_recipe(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))},
    **{f"protea {name} --help": steps_of_help(name) for name in LEAVES},
}
RUN = {
    name: steps
    for name, steps in DOCUMENTS.items()
    if not name.startswith("docs/tutorials/") and any(step.kind in {"console", "python"} for step in steps)
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("stand-ins"), Document.call)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``protea`` and ``python`` of this environment."""
    folder = tmp_path_factory.mktemp("programs")
    for name, call in (("protea", f"{sys.executable} -m protea"), ("python", sys.executable)):
        (folder / name).write_text(f'#!/bin/sh\nexec {call} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def document(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    models: Models,
    programs: Path,
    one_thread: None,
) -> Iterator[Document]:
    """An empty folder with the examples, for the document that the test names."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(models.cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    parameters = getattr(request.node, "callspec", None)
    steps = DOCUMENTS[parameters.params["name"]] if parameters is not None else []
    made = Document(tmp_path, models, programs, steps)
    yield made
    made.close()


def why_not(step: Step) -> str:
    """Why a step is not run here; empty if it is."""
    reasons = [reason for pattern, reason in NOT_RUN.items() if re.search(pattern, step.text)]
    if step.kind in {"console", "python"} and not reasons:
        serves = re.search(r"protea serve|\bcurl |protea\.Client", step.text)
        if serves and not all(find_spec(package) for package in ("fastapi", "prometheus_client", "uvicorn")):
            return "the packages of protea[serve] are not installed"
        clusters = re.search(r"\bdata (fasta|uniref)(?!.*--no-filter)|data\.fasta=(?!.*data\.cluster=false)", step.text)
        if clusters and shutil.which("mmseqs") is None:
            return "MMseqs2 is not installed"
    return reasons[0] if reasons else ""


@pytest.mark.parametrize("name", RUN)
def test_quick_commands_run(name: str, document: Document) -> None:
    for step in RUN[name]:
        if step.kind == "console" and not why_not(step) and not re.search(SLOW, step.text):
            document.run(step)


@pytest.mark.long
@pytest.mark.parametrize("name", RUN)
def test_all_commands_and_python_run(name: str, document: Document) -> None:
    for step in RUN[name]:
        if step.kind in {"console", "python"} and not why_not(step):
            document.run(step)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_accepted(name: str) -> None:
    """Every command is one that its program has: of ``protea`` by its parser, of others as far as they are ours."""
    for step in DOCUMENTS[name]:
        if step.kind not in {"python", "pycon"}:
            try:
                accept(step)
            except AssertionError as error:
                raise AssertionError(f"{step.place}: {step.text}\n{error}") from error


def accept(step: Step) -> None:
    text = re.sub(r"\$\w+/", "1/", step.text.replace("$SMALL", ""))
    if step.kind in {"inline", "synopsis"}:
        text = without_placeholders(text)
    words = text.split()
    for command in protea_words(text):
        if len(command) > 1 or step.kind == "console":
            parse(command, complete=step.kind == "console")
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and word.islower()]
        done = subprocess.run(
            ["make", "--dry-run", "--question", *targets], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert "No rule" not in done.stderr, done.stderr
    elif words[0] in {"python", "python3"} and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
    for extras in re.findall(r"(?:\.|protea)\[([a-z,]+)\]", text):
        known = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        assert set(extras.split(",")) <= known, f"no such extra: {extras}"


def test_nothing_is_left_out() -> None:
    """Every line in a block is a program's that is known here, output, or one that a reason excludes."""
    kinds = {step.kind for steps in DOCUMENTS.values() for step in steps}
    assert kinds <= {"console", "python", "pycon", "synopsis", "inline"}
    assert sum(len(steps) for steps in RUN.values()) > 200
    for name, steps in DOCUMENTS.items():
        for step in steps:
            assert step.kind != "pycon" or name.startswith("docs/tutorials/"), f"{step.place}: use a block of python"


PAGE = """# A page
```console
$ protea embed a.fasta -o a.h5    # a remark
a line that it prints
$ protea data fasta a.fasta \\
    -o store/
```

1. In a list, `protea info MODEL [--json]` and `protea`:
    ```python title="a name"
    import protea
    ```

```
protea merge OUT...   joins
protea merge a.h5
not a command
```
~~~bash
make test
~~~
"""


def test_what_is_found_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_steps, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    assert steps_of_page(tmp_path / "page.md") == [
        Step("page.md:3", "console", "protea embed a.fasta -o a.h5"),
        Step("page.md:5", "console", "protea data fasta a.fasta -o store/"),
        Step("page.md:11", "python", "import protea\n"),
        Step("page.md:15", "synopsis", "protea merge OUT...   joins"),
        Step("page.md:16", "console", "protea merge a.h5"),
        Step("page.md:20", "console", "make test"),
        Step("page.md:9", "inline", "protea info MODEL [--json]"),
    ]


@pytest.mark.parametrize(
    "text",
    ["protea embed a.fasta --no-such", "protea embd a.fasta", "protea average run/ --last many -o m/", "make nothing"],
)
def test_a_wrong_command_is_seen(text: str) -> None:
    with pytest.raises(AssertionError):
        accept(Step("page.md:1", "console", text))
    with pytest.raises(AssertionError):
        accept(Step("page.md:1", "inline", text))


def test_a_command_that_fails_names_its_place(document: Document) -> None:
    with pytest.raises(StepError, match=r"page\.md:7: \$ protea embed a\.fasta --pool none"):
        document.run(Step("page.md:7", "console", "protea embed a.fasta --pool none -o a.h5"))
    with pytest.raises(StepError, match=r"page\.md:8: NameError"):
        document.run(Step("page.md:8", "python", "unknown_name"))
