"""Move the fragments in this folder to the "Unreleased" section of CHANGELOG.md: ``make changelog``.

A fragment is a file ``TOPIC.KIND.md`` with list items; README.md in this folder describes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")
UNRELEASED = "## Unreleased\n"


def fragments(folder: Path) -> dict[str, list[Path]]:
    """Return the fragments of each kind, by name; exits if a file is no fragment."""
    files: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for path in sorted(set(folder.glob("*.md")) - {folder / "README.md"}):
        kind = path.name.split(".")[-2]
        if kind not in KINDS or not path.read_text().startswith("- "):
            kinds = ", ".join(KINDS)
            sys.exit(f"{path}: not a fragment; name it TOPIC.KIND.md (KIND: {kinds}) and write list items")
        files[kind].append(path)
    return files


def merge(changelog: str, kind: str, items: str) -> str:
    """Append list items to one kind's part of the "Unreleased" section, and add that part if it is missing."""
    before, _, after = changelog.partition(UNRELEASED)
    section, heading, older = after.partition("\n## ")
    parts = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in section.split("### ")[1:]}
    parts[kind.title()] = f"{parts.get(kind.title(), '')}\n{items}".strip()
    names = [name for name in map(str.title, KINDS) if name in parts]
    return before + UNRELEASED + "".join(f"\n### {name}\n\n{parts[name]}\n" for name in names) + heading + older


def main() -> None:
    """Rewrite CHANGELOG.md and delete the fragments."""
    path = FOLDER.parent / "CHANGELOG.md"
    changelog = path.read_text()
    collected = fragments(FOLDER)
    for kind, files in collected.items():
        for file in files:
            changelog = merge(changelog, kind, file.read_text())
    path.write_text(changelog)
    for file in [file for files in collected.values() for file in files]:
        file.unlink()


if __name__ == "__main__":
    main()
