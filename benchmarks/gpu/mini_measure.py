"""The part ``perplexity`` of mini.sh: the new weights compared with those in the package, on held-out sequences.

Runs ``benchmarks/mini.py perplexity``, which defines the measure, and records its table. A new model is better here if
its perplexity is lower under both maskings. That alone is not enough to replace the weights: see VERDICT.

Usage: python benchmarks/gpu/mini_measure.py OUT WORK MODEL CORPUS [--tokens N] [--dry-run]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from records import append, read
from sizes import store_folder

PROGRAM = Path(__file__).parents[1] / "mini.py"
OLD = "protea-mini"
MASKINGS = ("mask", "standard")
VERDICT = (
    "The weights in the package are replaced only if held-out perplexity, contacts and scans all improve. Contacts and "
    "scans are measured at home, for both models: protea fit-contacts STRUCTURES -m MODEL -o FITTED; "
    "protea evaluate contacts STRUCTURES -m FITTED; protea evaluate proteingym SCANS -m FITTED"
)


def cells(line: str) -> list[str]:
    """Return the cells of one row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("out", "work", "model", "corpus"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tokens", type=int, default=200_000, help="most tokens of the held-out sequences")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    command = [sys.executable, str(PROGRAM), "perplexity", str(store_folder(given.work))]
    command += ["--model", OLD, str(given.model), "--tokens", str(2_000 if given.dry_run else given.tokens)]
    if (near := given.corpus / "near.txt").exists():
        command += ["--without", str(near)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, dict[str, float]] = {}
    for line in done.stdout.splitlines():
        name, *values = cells(line)
        if not line.startswith("|") or not name or name.startswith("-"):
            continue
        name = name.replace(str(given.model), "new")
        found[name] = {masking: float(value.split()[0]) for masking, value in zip(MASKINGS, values, strict=True)}
        append(given.out, "perplexity", "held-out perplexity", model=name, **dict(zip(MASKINGS, values, strict=True)))
    better = all(found["new"][masking] < found[OLD][masking] for masking in MASKINGS)
    corpora = [row for row in read(given.out) if row["kind"] == "corpus"]
    apart = bool(corpora and corpora[-1]["held_out_is_apart"])
    append(
        given.out,
        "perplexity",
        "verdict",
        perplexity_improved=better and apart,
        held_out_is_apart=apart,
        contacts_improved=None,
        scans_improved=None,
        replace_the_weights=None if better and apart else False,
        rule=VERDICT,
    )
    print(VERDICT)


if __name__ == "__main__":
    main()
