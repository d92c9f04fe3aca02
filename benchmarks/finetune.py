"""Measure training with LoRA, compared with transformers and peft on the same model, adapters, head and proteins.

``curves`` trains both on the same 50 updates in float32, in one process, and prints the largest relative difference of
their losses. ``speed`` measures tokens per second over whole updates of 8 proteins: forward, backward, clipping and
AdamW; tokens are real ones, BOS and EOS included. Every variant of transformers gets the proteins sorted by length, so
that the 8 proteins of a batch have nearly the same length and hardly any padding; Protea packs them in random order.
Each program has its own process; in every round all run in turn, and the table has medians of rounds. ``ratio`` is the
median over the rounds of the program's speed, divided by that of transformers' fastest variant in the same round.

The task is a random class for each residue, with a linear head on the hidden states: only the work counts here.

Usage: python benchmarks/finetune.py curves [--model FOLDER] [--fasta FILE]
       python benchmarks/finetune.py speed [--model FOLDER] [--fasta FILE] [--rounds 3] [--updates 12] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

PROGRAMS = (
    "protea float32",
    "protea bf16-mixed",
    "transformers float32 sdpa",
    "transformers float32 eager",
    "transformers bfloat16 sdpa",
    "transformers bfloat16 eager",
)
LETTERS = "LAGVSERTIDPKQNFYMHWC"
CLASSES = 3
WARM = 3  # updates that are not counted


def proteins(fasta: Path | None, count: int, longest: int) -> list[str]:
    """Sequences of a file, or random ones of log-normal lengths (mean about 250); cut to so many residues."""
    rng = random.Random(0)
    if fasta is None:
        lengths = [min(longest, max(30, int(rng.lognormvariate(5.35, 0.6)))) for _ in range(count)]
        return ["".join(rng.choices(LETTERS, k=length)) for length in lengths]
    from protea.records import read_records

    found = [record.sequence.upper()[:longest] for record in read_records([fasta])]
    return rng.sample(found, count)


def prepared(folder: Path, sequences: list[str]) -> Any:
    """The proteins with random classes; the last two are for validation."""
    import numpy as np

    import protea
    from protea.finetune.examples import prepare
    from protea.finetune.tasks import TASKS, Labelled, LabelledExample

    generator = np.random.default_rng(0)
    last = len(sequences) - 2
    examples = [
        LabelledExample(f"p{i}", (sequence,), "train" if i < last else "validation", f"protein {i}")
        for i, sequence in enumerate(sequences)
    ]
    targets = [generator.integers(0, CLASSES, len(sequence)) for sequence in sequences]
    labelled = Labelled(TASKS["residue-class"], tuple("HEC"), examples, list(targets))
    return prepare(labelled, protea.load(folder, device="cpu", trainable=True).module, "truncate", [])


def parts(arguments: argparse.Namespace, updates: int) -> tuple[Any, Any, Any, Any]:
    """The data, the head, the settings, and the examples of every update."""
    import protea
    from protea.finetune.heads import HeadConfig
    from protea.finetune.tuning import TuneSettings
    from protea.finetune.updates import Updates

    data = prepared(arguments.model, proteins(arguments.fasta, updates * 8 + 2, arguments.longest))
    width = protea.load(arguments.model, device="cpu").module.config.hidden_size
    head = HeadConfig(kind="linear", task="residue-class", width=width, outputs=CLASSES)
    settings = TuneSettings(steps=updates, validations=1, patience=1000, precision="float32")
    train = data.places("train")
    schedule = Updates(len(train), settings.batch, updates, 1, 1, 0)
    return data, head, settings, [train[schedule[step]] for step in range(1, updates + 1)]


def ours(arguments: argparse.Namespace, data: Any, head: Any, settings: Any, done: Any = int) -> Any:
    """Train with Protea; ``done`` is called after each update."""
    import protea
    from protea.finetune.tuning import tune
    from protea.progress import Progress

    class Watch(Progress):
        def advance(self, amount: int = 1) -> None:
            done()

    def load() -> Any:
        return protea.load(arguments.model, device="cpu", trainable=True).module

    with tempfile.TemporaryDirectory() as work:
        return tune(load, data, head, settings, Path(work), identity={}, seed=0, progress=Watch())


def curves(arguments: argparse.Namespace) -> None:
    """Print how far the losses of 50 updates are apart."""
    import numpy as np

    from plain_tuning import PlainLoop

    data, head, settings, groups = parts(arguments, 50)
    tuned = ours(arguments, data, head, replace(settings, validations=1000, apart=1))
    with tempfile.TemporaryDirectory() as folder:
        loop = PlainLoop(arguments.model, data, Path(folder), settings, head, "sdpa")
        loop.scales = tuned.head.centre.clone(), tuned.head.spread.clone()
        theirs = np.array(loop.train(settings, groups))
    mine = np.array([row[1] for row in tuned.curve])
    print(f"first loss {mine[0]:.6f}, last {mine[-1]:.6f}; transformers and peft {theirs[0]:.6f}, {theirs[-1]:.6f}")
    print(f"largest relative difference of {len(mine)} losses: {np.abs(mine / theirs - 1).max():.2e}")


def measure(arguments: argparse.Namespace, program: str) -> dict[str, float]:
    """Tokens per second and peak memory of one program, in this process."""
    import torch

    data, head, settings, groups = parts(arguments, arguments.updates + WARM)
    tokens = [sum(data.sequences[data.which[i, 0]].tokens for i in group) for group in groups]
    name, precision, *attention = program.split()
    ends: list[float] = []

    def done() -> None:
        ends.append(time.perf_counter())

    if name == "protea":
        ours(arguments, data, head, replace(settings, precision=precision), done)
    else:
        from plain_tuning import PlainLoop

        order = sorted((i for group in groups for i in group), key=lambda i: data.sequences[data.which[i, 0]].tokens)
        groups = [order[place : place + 8] for place in range(0, len(order), 8)]
        random.Random(1).shuffle(groups)
        tokens = [sum(data.sequences[data.which[i, 0]].tokens for i in group) for group in groups]
        with tempfile.TemporaryDirectory() as folder:
            loop = PlainLoop(
                arguments.model, data, Path(folder), settings, head, attention[0], getattr(torch, precision)
            )
            loop.scale(groups[0])
            loop.train(settings, groups, fused=True, done=done)
    rate = sum(tokens[WARM:]) / (ends[len(tokens) - 1] - ends[WARM - 1])
    return {"rate": rate, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def speed(arguments: argparse.Namespace) -> None:
    """Run all programs in turn, and print medians."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only or PROGRAMS}
    for number in range(arguments.rounds):
        for name, measured in results.items():
            words = [sys.executable, __file__, *sys.argv[1:], "--model", str(arguments.model), "--program", name]
            out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            measured.append(json.loads(out.splitlines()[-1]))
            print(f"round {number + 1}: {name}: {measured[-1]['rate']:,.0f}", file=sys.stderr, flush=True)
    theirs = {name: rows for name, rows in results.items() if name.startswith("transformers")}
    fastest = max(theirs, key=lambda name: statistics.median(row["rate"] for row in theirs[name]))
    print("| program | tokens/s | ratio | peak memory, GB |\n|---|---:|---:|---:|")
    for name, rows in results.items():
        pairs = zip(rows, theirs[fastest], strict=True)
        ratio = statistics.median(mine["rate"] / other["rate"] for mine, other in pairs)
        rate, memory = (statistics.median(row[kind] for row in rows) for kind in ("rate", "memory"))
        print(f"| {name} | {rate:,.0f} | {ratio:.2f} | {memory:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("curves", "speed"))
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; by default random weights of ESM-2 8M")
    parser.add_argument("--fasta", type=Path)
    parser.add_argument("--longest", type=int, default=1022, help="residues of a protein, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--only", nargs="*", choices=PROGRAMS)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            import torch

            from protea.checkpoints import hf
            from protea.models.esm2 import SIZES
            from protea.models.registry import build

            arguments.model = Path(folder, "model")
            hf.write_random(arguments.model, build(SIZES["8M"]), seed=0, dtype=torch.float32)
        if arguments.program:
            print(json.dumps(measure(arguments, arguments.program)))
        else:
            {"curves": curves, "speed": speed}[arguments.what](arguments)


if __name__ == "__main__":
    main()
