"""What the package declares and what lies beside it: versions, parts, licences, recipes, reports, completion."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import protea
from conftest import Run
from protea import cli

ROOT = Path(__file__).parents[1]
SOURCE = Path(protea.__file__).parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NOT_OF_ALL = {"all", "test", "docs"}


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def requirement(text: str) -> tuple[str, str]:
    """Return the name of a requirement as pip compares it, and its versions."""
    found = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)", text)
    assert found, text
    return re.sub(r"[-_.]+", "-", found[1]).lower(), found[2].strip()


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", protea.__version__)
    assert read_yaml("CITATION.cff")["version"] == protea.__version__
    assert read_yaml("packaging/conda/recipe.yaml")["context"]["version"] == protea.__version__


def test_all_is_every_part() -> None:
    (everything,) = PARTS["all"]
    named = everything.removeprefix("protea[").removesuffix("]").split(",")
    assert set(named) == PARTS.keys() - NOT_OF_ALL
    assert len(named) == len(set(named))


def test_the_citation() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "license", "version"}
    assert citation["license"] == PROJECT["license"]


def test_the_conda_recipe() -> None:
    """The same dependencies and program as the package's own; conda's name of PyTorch is another."""
    recipe = read_yaml("packaging/conda/recipe.yaml")
    assert recipe.keys() == {
        "schema_version",
        "context",
        "package",
        "source",
        "build",
        "requirements",
        "tests",
        "about",
    }
    needed = dict(requirement(one) for one in recipe["requirements"]["run"])
    python = needed.pop("python")
    assert python == ">=${{ python_min }}"
    assert f">={recipe['context']['python_min']}" == PROJECT["requires-python"]
    needed["torch"] = needed.pop("pytorch")
    assert needed == dict(requirement(one) for one in PROJECT["dependencies"])
    programs = [f"{name} = {place}" for name, place in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == programs
    for path in recipe["about"]["license_file"]:
        assert (ROOT / path).is_file()


OF_DOCKER = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "RUN",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
}


@pytest.mark.parametrize("path", ["packaging/Dockerfile", "examples/serve/Dockerfile"])
def test_dockerfiles(path: str) -> None:
    """Known instructions, shell that parses, parts that exist, and the program as the entry point."""
    text = re.sub(r"^#.*\n", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    assert {words[0] for words in lines} <= OF_DOCKER
    for name, rest in lines:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
    parts = re.findall(r"ARG EXTRAS=(\S+)", text) + re.findall(r"/src\[(\w[\w,]*)\]", text)
    assert parts
    assert {name for part in parts for name in part.split(",")} <= PARTS.keys()
    entry = next(rest for name, rest in lines if name == "ENTRYPOINT")
    assert yaml.safe_load(entry)[0].rpartition("/")[2] == "protea"


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_templates(path: Path) -> None:
    template = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert template["blank_issues_enabled"] is False
        # GitHub shows no link that is relative.
        assert all(link["url"].startswith("https://") for link in template.get("contact_links", []))
        return
    assert template.keys() >= {"name", "description", "body"}
    fields = {one["id"]: one for one in template["body"] if one["type"] != "markdown"}
    assert "`protea doctor`" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"].get("validations", {}).get("required", False) == (path.stem != "idea")


def test_the_origin_of_every_file_that_is_no_code() -> None:
    """``NOTICE`` names each file, its kind, or its folder; a new one needs a line there."""
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    named = [part for line in notice.splitlines() if line.startswith("protea/") for part in line.split(", ")]
    folders = {name for name in named if name.endswith("/")}
    for path in SOURCE.rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc", ".cpp", ".h", ".typed") or path.match("native/library-*"):
            continue
        place = path.relative_to(SOURCE.parent)
        kinds = (str(place), f"{place.parent}/*{place.suffix}")
        assert any(str(place).startswith(folder) for folder in folders) or {*kinds} & {*named}, place


def test_licences_are_part_of_the_package() -> None:
    assert set(PROJECT["license-files"]) == {"LICENSE", "NOTICE"}
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"][
        "include"
    ]
    assert all((ROOT / name.lstrip("/")).exists() for name in included)


# ---- completion ----
def complete(run: Run, monkeypatch: pytest.MonkeyPatch, shell: str, line: str) -> list[str]:
    """What a shell is told when the line is completed at its end."""
    monkeypatch.setenv("_PROTEA_COMPLETE", f"complete_{shell}")
    if shell == "bash":
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (not line.endswith(" "))))
    else:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    return re.findall(r'^(?:_arguments .*\(\(|)"?([\w-]+)', run().out, flags=re.M)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    assert "embed" in complete(run, monkeypatch, shell, "protea em")
    assert "--dtype" in complete(run, monkeypatch, shell, "protea embed --dt")
    assert "flip" in complete(run, monkeypatch, shell, "protea evaluate fl")


def test_completion_imports_one_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str | None] = []

    def application(name: str | None, **options: bool) -> Any:
        named.append(name)
        return real(name, **options)

    real = cli.application
    monkeypatch.setattr(cli, "application", application)
    complete(run, monkeypatch, "bash", "protea embed --dt")
    complete(run, monkeypatch, "zsh", "protea embed --dt")
    assert named == ["embed", "embed"]
