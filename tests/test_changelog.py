"""Changelog fragments: those in the repository are valid, and collecting them keeps every entry."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

COLLECT = runpy.run_path(str(Path(__file__).parents[1] / "changelog.d" / "collect.py"))

CHANGELOG = "# Changelog\n\n## Unreleased\n\n### Added\n\n- a\n\n### Fixed\n\n- f\n\n## 0.1.0\n\n### Added\n\n- old\n"


def test_fragments_of_the_repository_are_valid() -> None:
    COLLECT["fragments"](COLLECT["FOLDER"])


@pytest.mark.parametrize(("name", "text"), [("a.bug.md", "- a\n"), ("a.fixed.md", "no list item\n"), ("a.md", "- a\n")])
def test_a_file_that_is_no_fragment(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=name):
        COLLECT["fragments"](tmp_path)


def test_fragments_are_added_to_the_unreleased_section() -> None:
    merged = COLLECT["merge"](COLLECT["merge"](CHANGELOG, "added", "- b\n- c\n"), "removed", "- r\n")
    assert merged == CHANGELOG.replace("- a\n", "- a\n- b\n- c\n").replace(
        "### Fixed\n", "### Removed\n\n- r\n\n### Fixed\n"
    )


def test_the_first_fragment_after_a_release() -> None:
    changelog = "# Changelog\n\n## Unreleased\n\n## 0.1.0\n\n- old\n"
    assert COLLECT["merge"](changelog, "fixed", "- f\n") == changelog.replace(
        "## Unreleased\n", "## Unreleased\n\n### Fixed\n\n- f\n"
    )
