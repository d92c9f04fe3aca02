"""The parts ``train-SIZE``: tokens per second of ``protea pretrain``, from its own ``metrics.jsonl``.

The command trains until there are enough lines of metrics and is then killed, because writing the last checkpoint of a
large model would take longer than the training. The recipe is ESM-2's except for the size of a step, and the initial
weights come from the part ``prepare``. docs/pretraining.md defines ``tokens_per_second``, ``utilisation`` and
``peak_memory``. The result is the median of the lines after the first WARM lines, during which kernels are compiled and
memory is allocated. If memory does not suffice, activations are computed twice; if the compiler fails, training runs
again without it. ``tried_before`` lists what failed.

With ``--processes N`` the part is ``ranks-SIZE-N``: the same with FSDP2 in N processes, one on each GPU, whose steps
have N times the tokens. ``share_of_plain`` is the rate of one of them divided by that of ``train-SIZE``, if that came
before.

Usage: python benchmarks/gpu/training.py OUT WORK SIZE [--pack TOKENS] [--processes N] [--seconds N] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import IO, Any

from records import append, last_line, read
from sizes import (
    Size,
    architecture,
    model_folder,
    parser_for_a_size,
    size_named,
    store_folder,
    training_memory,
    visible_memory,
    wait_for,
)

WARM = 3
LINES = 16
FEWEST = 3
ROOM = 0.95
ATTEMPTS = 3


def recipe(given: argparse.Namespace, size: Size, *, compiled: bool, recomputed: bool) -> dict[str, Any]:
    """Return the recipe of one run as plain values; missing keys have their defaults."""
    pack = given.pack or size.pack
    return {
        "name": f"ESM-2 {given.size}, timed",
        "init": str(model_folder(given.work, given.size)),
        "data": {"store": str(store_folder(given.work)), "max_tokens": min(1024, pack)},
        "batch": {"tokens": max(size.step, pack) * (given.processes or 1), "pack": pack},
        "optimizer": {"lr": 4.0e-4},
        "run": {
            "steps": 1_000_000,
            "precision": "float32" if given.dry_run else "bf16-mixed",
            "device": "cpu" if given.dry_run else "cuda",
            "compile": compiled,
            "recompute": recomputed,
            "workers": 1 if given.dry_run else 4,
        },
        "validation": {"every": None},
        "save": {"every": 1_000_000},
        "log": {"every": size.every, "tensorboard": False},
    }


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics so far."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def start(path: Path, run: Path, processes: int | None, stream: IO[str]) -> list[subprocess.Popen[bytes]]:
    """Start a run, in processes with FSDP2 if their number is given, with the environment that torchrun sets."""
    if processes is None:
        command = [sys.executable, "-m", "protea", "pretrain", str(path), "-o", str(run)]
        return [subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)]
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), str(path), str(run)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [
        subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | world | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        )
        for rank in range(processes)
    ]


def train(given: argparse.Namespace, told: dict[str, Any], number: int) -> tuple[list[dict[str, Any]], float, str]:
    """Train for a while.

    Returns:
        Lines of metrics, seconds to the first of them, and why there are none.
    """
    # JSON is valid YAML.
    path = given.work / f"train-{given.size}-{told['batch']['pack']}-{given.processes or 'plain'}-{number}.yaml"
    path.write_text(json.dumps(told, indent=1), encoding="utf-8")
    run = path.with_suffix("")
    log = path.with_suffix(".log")
    with log.open("w", encoding="utf-8") as stream:
        children = start(path, run, given.processes, stream)
        began, first = time.monotonic(), None
        try:
            while all(child.poll() is None for child in children):
                found = lines_of(run)
                if found and first is None:
                    first = time.monotonic()
                late = first is not None and time.monotonic() - first > given.seconds and len(found) > FEWEST
                if len(found) >= WARM + LINES or late:
                    break
                time.sleep(0.1)
        finally:
            for child in children:
                child.kill()
                child.wait()
            print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
    return lines_of(run), (first or time.monotonic()) - began, last_line(log)


def main() -> None:
    parser = parser_for_a_size(__doc__)
    parser.add_argument("--pack", type=int, help="tokens computed at a time; by default the value for SIZE")
    parser.add_argument("--processes", type=int, help="train with FSDP2 in so many processes")
    parser.add_argument("--seconds", type=float, default=15.0, help="most seconds after the first line of metrics")
    given = parser.parse_args()
    # If the part runs out of time, the log still shows the output of its command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    size = size_named(given.size, dry=given.dry_run)
    if given.dry_run:
        given.seconds, given.pack = 1.0, None
    for path in (model_folder(given.work, given.size), store_folder(given.work)):
        wait_for(path, given.work)
    memory = visible_memory()
    config, pack = architecture(model_folder(given.work, given.size)), given.pack or size.pack
    recomputed = memory is not None and training_memory(config, pack) > ROOM * memory
    compiled, reasons = not given.dry_run, []  # compiling on a CPU takes longer than a dry run may take
    for number in range(ATTEMPTS):
        told = recipe(given, size, compiled=compiled, recomputed=recomputed)
        lines, first, why = train(given, told, number)
        if len(lines) > WARM:
            break
        reasons.append(why)
        if "out of GPU memory" in why and not recomputed:
            recomputed = True
        else:
            compiled = False
    else:
        print(f"no metrics came: {reasons[-1]}")
        sys.exit(1)
    measured = lines[WARM:]

    def middle(name: str) -> float | None:
        values = [line[name] for line in measured if line.get(name) is not None]
        return median(values) if values else None

    plain, rate = f"train-{given.size}{f'-{given.pack}' if given.pack else ''}", middle("tokens_per_second")
    part = plain if given.processes is None else f"ranks-{given.size}-{given.processes}"
    rates = [row["tokens_per_second"] for row in read(given.out) if (row["part"], row["kind"]) == (plain, "training")]
    comparable = rates and rate is not None and given.processes is not None
    append(
        given.out,
        part,
        "training",
        size=given.size,
        processes=given.processes,
        share_of_plain=rate / given.processes / rates[-1] if comparable else None,
        precision=told["run"]["precision"],
        compiled=compiled,
        recomputed=told["run"]["recompute"],
        pack=told["batch"]["pack"],
        step_tokens=told["batch"]["tokens"],
        steps=measured[-1]["step"] - lines[WARM - 1]["step"],
        tokens_per_second=rate,
        utilisation=middle("utilisation"),
        peak_memory=max(line["peak_memory"] for line in lines),
        padding=middle("padding"),
        first_loss=lines[0]["loss"],
        last_loss=lines[-1]["loss"],
        seconds_to_first_line=first,
        tried_before=reasons,
    )


if __name__ == "__main__":
    main()
