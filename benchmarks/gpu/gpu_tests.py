"""The part ``tests``: the tests marked ``gpu``, and how many of them passed.

pytest reads only the files with such tests, one after the other, because other files need packages that a bare machine
lacks. Warnings are not errors here, because the machine has other package versions than those the tests are kept clean
with.

Usage: python benchmarks/gpu/gpu_tests.py OUT [--dry-run]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from records import append

ROOT = Path(__file__).parents[2]
SKIPPED = 77
"""The exit code that a part is recorded as skipped by."""


def run(out: Path, file: str) -> int:
    """Run the tests of one file, add a row, and return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-W", "default", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, f"--junitxml={report}", file], cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    values: dict[str, object] = {"passed": None, "failed": None, "skipped": None, "names_of_failed": None}
    if suite is not None:
        broken = sum(int(suite.get(name, 0)) for name in ("failures", "errors"))
        skipped = int(suite.get("skipped", 0))
        values |= {"passed": int(suite.get("tests", 0)) - broken - skipped, "failed": broken, "skipped": skipped}
        unwell = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
        values["names_of_failed"] = [case.get("name", "") for case in unwell]
    append(out, "tests", "tests", file=str(Path(file).relative_to(ROOT)), **values)
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="run only the first file")
    given = parser.parse_args()
    if absent := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        print(f"no {' and no '.join(absent)} here: carry them in WHEELS")
        sys.exit(SKIPPED)
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    files = files[:1] if given.dry_run else files
    codes = [run(given.out, file) for file in files]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
