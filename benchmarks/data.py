"""Measure training data: building a store, reading batches, and the filter compared with an independent alignment.

``build`` runs ``protea data uniref --no-filter`` on one core, in a separate process, on random sequences with UniRef's
lengths, a third of them representatives. It samples the anonymous memory of that process, which does not include the
file cache. ``batches`` reads a store as training does. ``filter`` aligns some validation sequences of a store with many
training sequences: those with the longest diagonals of shared words, and some at random.

Usage: python benchmarks/data.py build [--megabytes 100 1000]
       python benchmarks/data.py batches STORE [--tokens 16384 65536]
       python benchmarks/data.py filter SOURCE.fasta... STORE [--valid 200] [--train 400]
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

LETTERS = "LAGVSERTIDPKQNFYMHWC"
WORD = 5


def write_uniref(folder: Path, megabytes: int) -> tuple[int, int]:
    """Write the files of a random UniRef; return the numbers of clusters and members."""
    rng = random.Random(0)
    pool = "".join(rng.choices(LETTERS, k=2_000_000))
    clusters = members = 0
    left = megabytes * 1_000_000

    def record(name: str, text: str) -> str:
        lines = "\n".join(text[i : i + 60] for i in range(0, len(text), 60))
        return f">{name} Uncharacterized protein n=1 Tax=Bacteria TaxID=2 RepID=A0A000\n{lines}\n"

    def draw() -> str:
        length = min(2000, max(30, int(rng.lognormvariate(5.6, 0.6))))
        start = rng.randrange(len(pool) - length)
        return pool[start : start + length]

    with (
        (folder / "u50.fasta").open("w") as u50,
        (folder / "u90.fasta").open("w") as u90,
        (folder / "map.tsv").open("w") as mapping,
    ):
        while left > 0:
            names = [f"UniRef90_M{members + n:09}" for n in range(rng.choice((1, 1, 2, 4)))]
            left -= u50.write(record(f"UniRef50_C{clusters:09}", draw()))
            for name in names:
                left -= u90.write(record(name, draw()))
            mapping.write(f"UniRef50_C{clusters:09}\t{','.join(names)}\n")
            clusters, members = clusters + 1, members + len(names)
    return clusters, members


def watch(command: list[str], folder: Path) -> tuple[float, float, int, int]:
    """Run on one core; return wall and processor seconds, peak anonymous memory and the peak size of a folder."""
    start = time.monotonic()
    before = os.times()
    process = subprocess.Popen(["taskset", "-c", "0", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = disk = 0
    looked = start
    while process.poll() is None:
        try:
            match = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        except OSError:
            match = None
        peak = max(peak, int(match[1]) * 1024 if match else 0)
        if time.monotonic() - looked > 0.5:
            looked = time.monotonic()
            disk = max(disk, size(folder))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(process.returncode)
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return time.monotonic() - start, used, peak, disk


def size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def build(megabytes: list[int], folder: Path | None) -> None:
    titles = ("FASTA, MB", "clusters", "members", "wall, s", "processor, s", "MB/s of processor time")
    titles += ("peak anonymous memory, MB", "peak disk, MB", "store, MB")
    print("|", " | ".join(titles), "|\n|", "---|" * len(titles), sep="")
    for amount in megabytes:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            data, output = Path(temporary, "in"), Path(temporary, "out")
            data.mkdir()
            output.mkdir()
            clusters, members = write_uniref(data, amount)
            fasta = sum((data / name).stat().st_size for name in ("u50.fasta", "u90.fasta"))
            command = [sys.executable, "-m", "protea", "data", "uniref", "--uniref50", str(data / "u50.fasta")]
            command += ["--uniref90", str(data / "u90.fasta"), "--members", str(data / "map.tsv")]
            command += ["--no-filter", "-o", str(output / "store")]
            wall, used, peak, disk = watch(command, output)
            cells = [f"{fasta / 1e6:,.0f}", f"{clusters:,}", f"{members:,}", f"{wall:.1f}", f"{used:.1f}"]
            cells += [f"{fasta / used / 1e6:.1f}", *(f"{n / 1e6:,.0f}" for n in (peak, disk, size(output)))]
            print("|", " | ".join(cells), "|", flush=True)


def batches(store: Path, tokens: list[int]) -> None:
    from protea.alphabet import ESM
    from protea.data.loader import Loader, Packing
    from protea.data.sampler import Sampler
    from protea.data.training_store import TrainingStore

    start = time.perf_counter()
    split = TrainingStore(store, ESM).split("train")
    print(
        f"opened in {time.perf_counter() - start:.3f} s: {split.clusters:,} clusters, {split.sequences:,} sequences\n"
    )
    print("| tokens a pack | masking | threads | million tokens/s | padding |")
    print("|---|---|---|---|---|")
    for count in tokens:
        for masking, workers in (("standard", 0), ("standard", 1), ("bionemo1-esm1nv", 0), ("bionemo2", 0)):
            rates = []
            for seed in range(3):
                work = Loader(
                    Sampler(split, seed=seed), masking=masking, packing=Packing(tokens=count), workers=workers
                )
                done, start = 0, time.perf_counter()
                for batch in work.batches(epochs=1):
                    done += len(batch.targets)
                    if done > 60_000_000:
                        break
                rates.append(done / (time.perf_counter() - start) / 1e6)
            print(f"| {count:,} | {masking} | {workers} | {sorted(rates)[1]:.1f} | {work.padding:.2%} |", flush=True)


def aligned(one: str, other: str) -> tuple[float, float]:
    """Return the identity over the columns of a local alignment, and the smaller of the two coverages."""
    import parasail

    trace = parasail.sw_trace_striped_16(one, other, 11, 1, parasail.blosum62).traceback
    same = sum(a == b for a, b in zip(trace.query, trace.ref, strict=True))
    lengths = [len(text.replace("-", "")) for text in (trace.query, trace.ref)]
    return same / max(1, len(trace.query)), min(lengths[0] / len(one), lengths[1] / len(other))


def check_filter(sources: list[str], store: Path, valid: int, train: int) -> None:
    """Align removed clusters with the sequence that caused the removal, and kept ones with their most similar one."""
    from protea.alphabet import ESM
    from protea.data.training_store import TrainingStore
    from protea.fasta import read_fasta

    opened = TrainingStore(store, ESM)
    held, kept = opened.split("valid"), opened.split("train")
    everywhere = np.arange(held.sequences)
    texts = dict(zip(held.ids(everywhere), (held.text(row) for row in everywhere), strict=True))
    chosen = sorted(random.Random(0).sample(sorted(texts), min(valid, len(texts))))
    removed = dict(line.split("\t")[:2] for line in (store / "removed.tsv").read_text().splitlines()[1:])
    clusters = set(kept.cluster_ids(np.arange(kept.clusters)))
    words: dict[str, list[str]] = defaultdict(list)
    for name in chosen:
        for word in {texts[name][i : i + WORD] for i in range(len(texts[name]) - WORD + 1)}:
            words[word].append(name)
    best: dict[str, list[tuple[int, str]]] = defaultdict(list)
    table: Counter[tuple[str, str]] = Counter()
    for record in read_fasta(sources):
        text = record.sequence
        if record.id in removed:
            table[kind(text, texts[removed[record.id]]), "removed"] += 1
        elif record.id in clusters:
            counts = Counter(name for i in range(len(text) - WORD + 1) for name in words.get(text[i : i + WORD], ()))
            for name, count in counts.items():
                if count >= 4:
                    best[name].append((count, text))
    for name in chosen:
        for _, other in sorted(best[name], key=lambda item: -item[0])[:train]:
            table[kind(texts[name], other), "kept"] += 1
    print("| by parasail | removed, beside the sequence noted | kept, beside those most like them |")
    print("|---|---|---|")
    for label in ("above by 3 points or more", "within 3 points", "below by 3 points or more"):
        print(f"| {label} | {table[label, 'removed']:,} | {table[label, 'kept']:,} |")


def kind(one: str, other: str) -> str:
    """Classify an alignment by an identity of 0.5 and a coverage of 0.8."""
    identity, cover = aligned(one, other)
    if identity >= 0.53 and cover >= 0.83:
        return "above by 3 points or more"
    return "within 3 points" if identity >= 0.47 and cover >= 0.77 else "below by 3 points or more"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build")
    one.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    one.add_argument("--folder", type=Path, default=None, help="folder for temporary files")
    two = commands.add_parser("batches")
    two.add_argument("store", type=Path)
    two.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    three = commands.add_parser("filter")
    three.add_argument("sources", nargs="+")
    three.add_argument("store", type=Path)
    three.add_argument("--valid", type=int, default=200)
    three.add_argument("--train", type=int, default=400)
    arguments = parser.parse_args()
    if arguments.command == "build":
        build(arguments.megabytes, arguments.folder)
    elif arguments.command == "batches":
        batches(arguments.store, arguments.tokens)
    else:
        check_filter(arguments.sources, arguments.store, arguments.valid, arguments.train)


if __name__ == "__main__":
    main()
