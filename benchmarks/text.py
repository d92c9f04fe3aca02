"""Measure encoding, decoding and reading FASTA in megabytes per second on one core.

Usage: python benchmarks/text.py
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from protea.alphabet import ESM
from protea.fasta import read_fasta

RECORDS, LENGTH = 100_000, 345


def rate(function: Callable[[], object], size: int) -> str:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return f"{size / statistics.median(times) / 1e6:,.0f}"


def main() -> None:
    rng = random.Random(0)
    sequences = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=LENGTH)) for _ in range(2_000)] * (RECORDS // 2_000)
    joined = "".join(sequences)
    ids = ESM.encode(joined)
    lines = "".join(
        f">r{number} a description\n" + "".join(f"{s[i : i + 60]}\n" for i in range(0, LENGTH, 60))
        for number, s in enumerate(sequences)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.fasta"
        path.write_text(lines)
        rows = {
            "encode, one long sequence": rate(lambda: ESM.encode(joined), len(joined)),
            f"encode, sequences of {LENGTH}": rate(lambda: [ESM.encode(s) for s in sequences], len(joined)),
            "decode, one long sequence": rate(lambda: ESM.decode(ids), len(joined)),
            "read FASTA": rate(lambda: sum(1 for _ in read_fasta([path])), len(lines)),
        }
    print("| | MB/s |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
