"""The part ``tests``: the tests marked ``gpu``, and how many of them passed.

Only the files that hold such tests are read, because the others want packages that a bare machine lacks. Warnings are
no errors here: the machine's versions are not those that the tests are kept clean with.

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="the first file alone, without its fixtures")
    given = parser.parse_args()
    if absent := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        print(f"no {' and no '.join(absent)} here: carry them in WHEELS")
        sys.exit(SKIPPED)
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    files = files[:1] if given.dry_run else files
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, f"--junitxml={report}", *files], cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    counts = {name: int(suite.get(name, 0)) if suite is not None else None for name in ("tests", "skipped")}
    broken = sum(int(suite.get(name, 0)) for name in ("failures", "errors")) if suite is not None else None
    passed = None if suite is None else (counts["tests"] or 0) - (counts["skipped"] or 0) - (broken or 0)
    failures = [
        case.get("name", "") for case in (suite if suite is not None else ()) if case.find("failure") is not None
    ]
    append(
        given.out,
        "tests",
        "tests",
        passed=passed,
        failed=broken,
        skipped=counts["skipped"],
        files=len(files),
        names_of_failed=failures,
    )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
