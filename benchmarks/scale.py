"""Measure memory by the size of the input, and residues per second by the length of sequences.

Runs ``protea embed`` in separate processes and samples their anonymous memory, which does not include the file cache.

Usage: python benchmarks/scale.py memory [--sequences 10000 100000] [--gigabytes 2] [--seconds 120]
       python benchmarks/scale.py length [--model esm2_t6_8M_UR50D] [--fast]
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LETTERS = "LAGVSERTIDPKQNFYMHWC"


def write_fasta(path: Path, lengths: list[int]) -> None:
    rng = random.Random(0)
    pool = "".join(rng.choices(LETTERS, k=1_000_000))
    with path.open("w") as stream:
        for number, length in enumerate(lengths):
            start = rng.randrange(len(pool) - length)
            stream.write(f">s{number}\n{pool[start : start + length]}\n")


def anonymous_bytes(pid: int) -> int:
    try:
        match = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def watch(command: list[str], seconds: float) -> tuple[float, int, str]:
    """Run for at most ``seconds``; return wall seconds, peak anonymous memory and standard error."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None and time.monotonic() - start < seconds:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    wall = time.monotonic() - start
    if process.poll() is None:
        process.kill()
    return wall, peak, process.communicate()[1]


def embed(model: Path, fasta: Path, *options: str, residues: bool = False) -> list[str]:
    outputs = ["-o", str(fasta.with_suffix(".parquet"))] + ["-r", str(fasta.with_suffix(".h5"))] * residues
    return [sys.executable, "-m", "protea", "embed", str(fasta), "-m", str(model), *outputs, *options]


def memory(model: Path, folder: Path, counts: list[int], gigabytes: float, seconds: float) -> None:
    print("| input | wall, s | peak anonymous memory, MB |\n|---|---|---|")
    rng = random.Random(1)
    for count in counts:
        fasta = folder / f"{count}.fasta"
        write_fasta(fasta, [rng.randint(5, 15) for _ in range(count)])
        wall, peak, err = watch(embed(model, fasta, residues=True), 3600)
        assert "residues in" in err, err
        print(
            f"| {count:,} sequences, {fasta.stat().st_size / 1e6:.1f} MB | {wall:.0f} | {peak / 1e6:.0f} |", flush=True
        )
    if gigabytes:
        fasta = folder / "large.fasta"
        write_fasta(fasta, [345] * int(gigabytes * 1e9 / 355))
        wall, peak, _ = watch(embed(model, fasta, "--fast"), seconds)
        size = fasta.stat().st_size / 1e9
        journal = folder / ".large.parquet.partial" / "journal.json"
        done = re.search(r'"records": (\d+)', journal.read_text())[1] if journal.exists() else "0"
        print(
            f"| {size:.2f} GB, stopped in the middle ({int(done):,} sequences done) | {wall:.0f} | {peak / 1e6:.0f} |"
        )


def length(model: Path, folder: Path, *options: str) -> None:
    print("| residues a sequence | residues/s |\n|---|---|")
    for size in (20, 50, 100, 200, 400, 700, 1022):
        fasta = folder / f"{size}.fasta"
        write_fasta(fasta, [size] * (100_000 // size))
        _, _, err = watch(embed(model, fasta, *options), 600)
        match = re.search(r"([\d,]+) residues in ([\d.]+) s", err)
        assert match, err
        print(f"| {size:,} | {int(match[1].replace(',', '')) / float(match[2]):,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "length"))
    parser.add_argument("--model", default="esm2_t6_8M_UR50D")
    parser.add_argument("--sequences", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        init = [sys.executable, "-m", "protea", "init", arguments.model, "-o", str(folder / "model")]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        if arguments.what == "memory":
            memory(folder / "model", folder, arguments.sequences, arguments.gigabytes, arguments.seconds)
        else:
            length(folder / "model", folder, *(["--fast"] if arguments.fast else []))


if __name__ == "__main__":
    main()
