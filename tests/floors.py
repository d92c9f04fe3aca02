"""The oldest versions of the dependencies that ``pyproject.toml`` allows, as constraints for pip: ``make test-floors``.

Usage: python tests/floors.py [EXTRA...]    (prints ``NAME==VERSION`` for every ``NAME>=VERSION``)
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"([\w.-]+)>=([\w.]+)[^;]*(;.*)?")


def floor(requirement: str) -> str:
    """Turn a requirement into a pin of its lowest version; a condition after ``;`` stays."""
    match = REQUIREMENT.fullmatch(requirement)
    if not match:
        sys.exit(f"pyproject.toml: {requirement!r} has no lowest version; write it as NAME>=VERSION")
    name, version, condition = match.groups()
    return f"{name}=={version}{f' {condition}' if condition else ''}"


def main() -> None:
    """Print the floors of the package and of the extras that the command line names."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = (requirement for extra in sys.argv[1:] for requirement in project["optional-dependencies"][extra])
    for requirement in [*project["dependencies"], *extras]:
        print(floor(requirement))


if __name__ == "__main__":
    main()
