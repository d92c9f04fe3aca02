"""Build the documentation site: ``python docs/site/build_site.py FOLDER``, which ``make docs`` calls.

The pages are plain Markdown in ``docs/``. This program copies them, follows their links to other files of the
repository, adds the navigation, writes the reference from the docstrings and from ``--help``, and calls Sphinx, for
which every warning is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from commands_reference import command_pages
from python_reference import python_pages

SITE = Path(__file__).resolve().parent
ROOT = SITE.parents[1]
BESIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/*.md", "examples/README.md"]
"""Pages outside ``docs/``."""

LINK = re.compile(r"(\]\()([^)#\s]+)([^)\s]*\))")
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)


def place(path: Path) -> Path:
    """Where a file of the repository lies in the site's source."""
    inside = path.relative_to(ROOT)
    return inside.relative_to("docs") if inside.parts[0] == "docs" else inside


def repository_pages() -> list[Path]:
    """Every Markdown file that becomes a page."""
    return sorted({*(ROOT / "docs").rglob("*.md"), *(path for part in BESIDE for path in ROOT.glob(part))})


def with_links(text: str, page: Path, source: Path) -> str:
    """The text with its links to files as they lie in the source; linked files that are no pages are copied there."""

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        linked = (page.parent / target).resolve()
        if not linked.is_file():
            raise SystemExit(f"{page.relative_to(ROOT)}: the link {target} leads to no file")
        if linked.suffix != ".md":
            copy = source / place(linked)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(linked, copy)
        return match[1] + os.path.relpath(place(linked), place(page).parent) + match[3]

    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in FENCE.split(text))


def navigation(names: set[str]) -> dict[str, list[tuple[str, list[str]]]]:
    """For each page with pages below it, groups of names, with ``*`` replaced by the names that stand nowhere."""
    read: dict[str, list[Any]] = yaml.safe_load((SITE / "navigation.yaml").read_text())
    groups = {
        page: [next(iter(entry.items())) if isinstance(entry, dict) else ("", [entry]) for entry in entries]
        for page, entries in read.items()
    }
    named = {name for below in groups.values() for _, group in below for name in group} | {"index"}

    def expanded(entry: str) -> Iterator[str]:
        folder, star, _ = entry.partition("*")
        yield from sorted(n for n in names - named if n.rpartition("/")[0] == folder[:-1]) if star else [entry]

    return {
        page: [(title, [name for entry in group for name in expanded(entry)]) for title, group in below]
        for page, below in groups.items()
    }


def toctrees(groups: list[tuple[str, list[str]]]) -> str:
    """The groups of pages below a page, for Sphinx. Neighbours without a title become one group."""
    parts: list[tuple[str, list[str]]] = []
    for title, names in groups:
        if parts and parts[-1][0] == title:
            parts[-1][1].extend(names)
        elif names:
            parts.append((title, [*names]))
    return "".join(
        "\n```{toctree}\n:hidden:\n"
        + (f":caption: {title}\n" if title else "")
        + "\n"
        + "".join(f"/{name}\n" for name in names)
        + "```\n"
        for title, names in parts
    )


def write_source(source: Path) -> None:
    """Write everything that Sphinx reads."""
    shutil.rmtree(source, ignore_errors=True)
    pages = {str(place(path).with_suffix("")): path for path in repository_pages()}
    texts = {name: with_links(path.read_text(encoding="utf-8"), path, source) for name, path in pages.items()}
    texts |= command_pages() | python_pages()
    for name, groups in navigation(set(texts)).items():
        texts[name] += toctrees(groups)
    for name, text in texts.items():
        path = source / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in ("conf.py", "static"):
        copy = shutil.copytree if (SITE / name).is_dir() else shutil.copy
        copy(SITE / name, source / name)


def main(out: Path) -> int:
    """Write the site into ``out/html``; 0 if there was no warning."""
    try:
        from sphinx.cmd.build import build_main
    except ModuleNotFoundError:
        sys.exit("docs: needs Sphinx; use `make docs`, or pip install '.[docs,plot,sklearn]'")
    write_source(out / "source")
    shutil.rmtree(out / "html", ignore_errors=True)
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-j", "2", "-d", str(out / "doctrees")]
    return build_main([*options, str(out / "source"), str(out / "html")])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
