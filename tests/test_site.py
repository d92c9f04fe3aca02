"""The documentation: its links, its navigation, what it makes from the program, and the site that Sphinx builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import protea
from test_named_options import OPTIONS

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "changelog.d/README.md")),
    *(path for folder in ("benchmarks", "docs", "examples") for path in sorted((ROOT / folder).rglob("*.md"))),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NEEDED = ["sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton"]


# ---- the Markdown files ----
@cache
def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(text: str, page: Path) -> Iterator[str]:
    """The links of a page to a file or an anchor that does not exist."""
    for target in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", target):
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken(page.read_text(encoding="utf-8"), page))


@pytest.mark.parametrize("link", ["[a](nothing.md)", "[a](README.md#nothing)", "[a](#nothing)"])
def test_a_broken_link_is_seen(link: str) -> None:
    assert list(broken(link, ROOT / "README.md"))


def test_right_links_are_accepted() -> None:
    text = "[a](docs/embedding.md#long-sequences) [b](#install) [c](https://a.example) [d](docs)\n```\n[e](f.md)\n```"
    assert not list(broken(text, ROOT / "README.md"))


def test_the_readme_is_an_entrance() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# ---- the source of the site ----
@pytest.fixture
def build_site(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SITE)
    import build_site

    return build_site


def test_every_page_is_in_the_navigation_once(build_site: ModuleType, tmp_path: Path) -> None:
    build_site.write_source(tmp_path)
    pages = {str(path.relative_to(tmp_path).with_suffix("")) for path in tmp_path.rglob("*.md")}
    named = [name for groups in build_site.navigation(pages).values() for _, names in groups for name in names]
    assert len(named) == len(set(named))
    assert set(named) | {"index"} == pages, "add the page to docs/site/navigation.yaml"


def test_new_tutorials_find_their_place(build_site: ModuleType) -> None:
    groups = build_site.navigation({"tutorials/perplexity", "tutorials/new", "tutorials/older"})["tutorials"]
    names = [name for _, names in groups for name in names]
    assert names[0] == "tutorials/perplexity"
    assert names[-2:] == ["tutorials/new", "tutorials/older"]


def test_commands_have_all_their_options(build_site: ModuleType) -> None:
    pages = build_site.command_pages()
    for name, options in OPTIONS.items():
        page = pages[f"reference/commands/{name.split()[0]}"]
        section = page.partition(f" protea {name}\n")[2].partition("\n#")[0]
        shown = {
            option for line in re.findall(r"^```\{option\} (.*)$", section, re.MULTILINE) for option in line.split()
        }
        named = {option for option in options - {"--help", "-h"} if option.startswith("-")}
        assert named <= {option.rstrip(",") for option in shown}, name


def test_python_has_all_public_names(build_site: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(f"protea.{name}" in "".join(build_site.python_pages().values()) for name in ("load", "Client"))
    monkeypatch.setattr(protea, "__all__", [*protea.__all__, "added"])
    with pytest.raises(SystemExit, match="added"):
        build_site.python_pages()


# ---- the built site ----
class Loaded(HTMLParser):
    """Collects the addresses that a browser loads for a page: not those that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag != "a" and (tag != "link" or given.get("rel") not in {"next", "prev", "search", "index", "author"}):
            self.addresses += [
                given[name] or "" for name in ("src", "href", "srcset", "data", "poster") if name in given
            ]
        if "style" in given:
            self.addresses += re.findall(r"url\(([^)]*)\)", given["style"] or "")


def loaded(html: str) -> list[str]:
    parser = Loaded()
    parser.feed(html)
    return parser.addresses


def elsewhere(address: str) -> bool:
    return re.match(r"""["']?(https?:)?//""", address) is not None


def test_what_a_browser_loads_is_seen() -> None:
    html = '<link rel="stylesheet" href="//x.example/a.css"><img src="https://x.example/b.png"><a href="https://x.example">'
    assert [elsewhere(address) for address in loaded(html)] == [True, True]
    assert not any(map(elsewhere, loaded('<script src="_static/a.js"></script><img src="a.svg">')))


@pytest.mark.long
@pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason="needs pip install '.[docs]'")
def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    """Every warning is an error, broken links and anchors included."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(protea.__file__).parents[1]), *sys.path])}
    command = [sys.executable, str(SITE / "build_site.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "html").rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        assert not [address for address in loaded(page.read_text(encoding="utf-8")) if elsewhere(address)], page
    for sheet in (tmp_path / "html").rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not [address for address in re.findall(r"url\(([^)]*)\)", text) if elsewhere(address)], sheet
        assert not re.search(r"@import\s+(url\()?[\"']?(https?:)?//", text), sheet
    index = (tmp_path / "html" / "searchindex.js").read_text(encoding="utf-8")
    assert "howto/no-network" in index
