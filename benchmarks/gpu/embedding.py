"""The parts ``embed-SIZE``: residues and tokens per second, from file to file and for the computation alone.

The computation alone is ``LanguageModel.embed`` from sequences in memory to means in memory, after a warm-up; a short
computation runs twice and the faster run counts. File to file is the command ``protea embed IN.fasta -m MODEL -o
OUT.parquet``, run in this process, which saves the start of Python. Its time is that for all sequences minus that for
one sequence, which is the time to load the model and hash its file; ``overhead_seconds`` reports the latter. Both run
in bf16-mixed (``--fast``), and in float32 on fewer sequences, with random weights and random sequences of UniRef50's
lengths.

Usage: python benchmarks/gpu/embedding.py OUT WORK SIZE [--dry-run]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from typing import Any
from unittest import mock

import torch
from records import append
from sizes import (
    TOY,
    Size,
    architecture,
    forward_flops,
    model_folder,
    parser_for_a_size,
    size_named,
    utilisation,
    wait_for,
)
from synthetic import sequences, write_fasta

import protea
from protea.cli import main as protea_main

ENDS = 2
LONG = 4.0
"""Seconds after which a computation is not done once more."""


def command(*arguments: object) -> float:
    """Run a Protea command in this process and return its seconds.

    Raises:
        SystemExit: the command failed and printed the reason.
    """
    began = time.perf_counter()
    with mock.patch.object(sys, "argv", ["protea", *map(str, arguments)]):
        try:
            protea_main()
        except SystemExit as ended:
            if ended.code:
                raise
    return time.perf_counter() - began


def computed(model: protea.LanguageModel, found: list[str]) -> float:
    """Return the seconds of the computation alone, with results in main memory at its end."""
    model.embed(found[: max(1, len(found) // 10)], pool="mean")
    times: list[float] = []
    while len(times) < 2 and sum(times) < LONG:
        began = time.perf_counter()
        model.embed(found, pool="mean")
        times.append(time.perf_counter() - began)
    return min(times)


def drawn(size: Size, count: int) -> list[str]:
    """Return the sequences that every program gets; short ones in a dry run."""
    return sequences(count, seed=1, median=40, longest=60) if size is TOY else sequences(count, seed=1)


def report(
    given: argparse.Namespace,
    program: str,
    dtype: str,
    found: list[str],
    alone: float,
    files: float | None,
    **more: Any,
) -> None:
    """Add a row.

    Args:
        given: the part's arguments.
        program: that was measured.
        dtype: that it computed in.
        found: the sequences.
        alone: seconds of the computation.
        files: seconds from file to file, if that could be told.
        more: what else goes into the row.
    """
    residues, lengths = sum(map(len, found)), [len(one) + ENDS for one in found]
    tokens = sum(lengths)
    flops = tokens * forward_flops(architecture(model_folder(given.work, given.size)), lengths)
    name = None if given.dry_run else torch.cuda.get_device_name()
    append(
        given.out,
        given.part,
        "embedding",
        size=given.size,
        program=program,
        dtype=dtype,
        sequences=len(found),
        residues=residues,
        residues_per_second_files=files and residues / files,
        tokens_per_second_files=files and tokens / files,
        residues_per_second=residues / alone,
        tokens_per_second=tokens / alone,
        utilisation_files=files and utilisation(flops / files, dtype, name),
        utilisation=utilisation(flops / alone, dtype, name),
        peak_memory=None if given.dry_run else torch.cuda.max_memory_allocated(),
        **more,
    )


def measure(given: argparse.Namespace, dtype: str, found: list[str]) -> None:
    """Measure one number type and add its row."""
    device = "cpu" if given.dry_run else "cuda"
    folder = model_folder(given.work, given.size)
    if not given.dry_run:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model = protea.load(folder, device=device, dtype=dtype)
    loaded = time.perf_counter() - began
    alone = computed(model, found)
    del model
    gc.collect()
    if not given.dry_run:
        torch.cuda.empty_cache()
    inputs = [given.work / f"{name}-{given.size}-{dtype}.fasta" for name in ("one", "all")]
    for path, some in zip(inputs, (found[:1], found), strict=True):
        write_fasta(path, some)
    rest = ["-m", folder, "-o", given.work / f"out-{given.size}.parquet", "--device", device, "--overwrite"]
    rest += ["--dtype", dtype]
    overhead, whole = (command("embed", path, *rest) for path in inputs)
    # For a very small input the difference is only noise.
    files = whole - overhead if whole > overhead else None
    times = {"load_seconds": loaded, "overhead_seconds": overhead, "whole_seconds": whole}
    report(given, "protea", dtype, found, alone, files, **times)


def main() -> None:
    given = parser_for_a_size(__doc__).parse_args()
    given.part = f"embed-{given.size}"
    size = size_named(given.size, dry=given.dry_run)
    wait_for(model_folder(given.work, given.size), given.work)
    first = given.work / f"first-{given.size}"
    write_fasta(first.with_suffix(".fasta"), drawn(size, 1))
    # Run the smallest model first, so that later commands have nothing to import.
    command("embed", first.with_suffix(".fasta"), "-o", first.with_suffix(".parquet"), "--device", "cpu")
    for dtype, count in (("bf16-mixed", size.embedded), ("float32", size.exact)):
        measure(given, dtype, drawn(size, count))


if __name__ == "__main__":
    main()
