"""Measure tokens per second of pre-training, compared with transformers on the same model, crops and masks.

All programs get the same random weights and learn from the same steps: packs of log-normal lengths (mean about 345, 30
to 1,022) from a store, masked by the loader. The rate counts real tokens, BOS and EOS included, over whole steps:
forward, backward, clipping and AdamW. The variants of transformers sort a step's sequences by length and pad them in
groups of 8; ``pure`` is a model held entirely in bfloat16, without master weights. Each program has its own process. In
every round all programs run in turn, so that changes in the machine's speed affect all of them.

The table also shows the loss of the last step, which confirms that all programs did the same work, utilisation
(``docs/pretraining.md``) of the peak of the type that computes, and peak memory. A processor without bfloat16 products
computes in float32 in every program.

Usage: python benchmarks/train.py [--model 8M] [--rounds 5] [--step-tokens 16384] [--only NAME ...]
       python benchmarks/train.py --device cuda --model 650M --step-tokens 131072 --pack 32768
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ON_CPU = (
    "protea bf16",
    "protea bf16 compiled",
    "protea float32",
    "protea float32 compiled",
    "transformers float32 eager",
    "transformers float32 sdpa",
    "transformers bf16 eager",
    "transformers bf16 sdpa",
    "transformers pure eager",
    "transformers pure sdpa",
)
ON_GPU = ("protea bf16", "protea bf16 compiled", "transformers bf16 sdpa", "transformers pure sdpa")
LETTERS = "LAGVSERTIDPKQNFYMHWC"
GROUP = 8


def make_store(folder: Path, count: int, seed: int = 0) -> Path:
    """Build a store of random sequences through the importer of BioNeMo 1's files, which does not need MMseqs2."""
    from protea.data.build_settings import BuildSettings
    from protea.data.importers import import_csv
    from protea.progress import SILENT

    rng = random.Random(seed)
    shards = folder / "uf50"
    for split, number in (("train", count), ("val", 10), ("test", 10)):
        (shards / split).mkdir(parents=True)
        with (shards / split / "x000.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["record_id", "record_name", "sequence_length", "sequence"])
            for row in range(number):
                length = min(1022, max(30, int(rng.lognormvariate(5.66, 0.6))))
                writer.writerow([row, f"{split}{row}", length, "".join(rng.choices(LETTERS, k=length))])
    settings = BuildSettings(output=folder / "store", valid="0", filtered=False)
    import_csv(settings, shards, None, None, None, SILENT)
    return folder / "store"


def steps_of(store: Path, pack: int, packs: int) -> Any:
    """Yield steps without end, each a list of masked packs."""
    from protea.alphabet import ESM
    from protea.data.loader import Loader, Packing
    from protea.data.sampler import Sampler
    from protea.data.training_store import TrainingStore

    loader = Loader(Sampler(TrainingStore(store, ESM).split("train")), packing=Packing(tokens=pack))
    batches = loader.batches()
    while True:
        yield [next(batches) for _ in range(packs)]


Step = Callable[[list[Any]], float]


def protea_step(model: Path, variant: list[str], device: str) -> Step:
    import torch

    from protea.settings_errors import validate
    from protea.train.loop import train_step
    from protea.train.metrics import TrainingProgress
    from protea.train.model import architecture, prepare
    from protea.train.recipe import Recipe

    where = torch.device(device)
    precision = "float32" if "float32" in variant else "bf16-mixed"
    run = {"precision": precision, "compile": "compiled" in variant}
    recipe = validate(Recipe, {"init": str(model), "run": run}, "benchmark")
    trained = prepare(architecture(recipe), recipe, where, TrainingProgress())
    number = 0

    def step(packs: list[Any]) -> float:
        nonlocal number
        number += 1
        clip = recipe.optimizer.clip
        result = train_step(trained, packs, step=number, rate=1e-4, seed=recipe.run.seed, clip=clip)
        assert result is not None
        return result[0].item()

    return step


def transformers_step(model: Path, variant: list[str], device: str) -> Step:
    import torch
    from torch.nn import functional as F
    from transformers import EsmForMaskedLM

    pure = "pure" in variant
    kind = torch.bfloat16 if pure else torch.float32
    loaded = EsmForMaskedLM.from_pretrained(model, dtype=kind, attn_implementation=variant[-1]).to(device).train()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def step(packs: list[Any]) -> float:
        masked = sum(len(pack.rows) for pack in packs)
        total = 0.0
        for ids, attention, labels in padded(packs):
            with torch.autocast(device, torch.bfloat16, enabled="bf16" in variant):
                logits = loaded(input_ids=ids.to(device), attention_mask=attention.to(device)).logits
            flat, wanted = logits.flatten(0, 1).float(), labels.to(device).flatten()
            loss = F.cross_entropy(flat, wanted, ignore_index=-100, reduction="sum") / masked
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def padded(packs: list[Any]) -> Any:
    """Return a step's sequences, sorted by length and padded in groups."""
    import torch

    found = []
    for pack in packs:
        labels = torch.full_like(pack.targets, -100)
        labels[pack.rows] = pack.targets[pack.rows]
        found += [(pack.inputs.input_ids[a:b], labels[a:b]) for a, b in pack.inputs.cu_seqlens.spans()]
    found.sort(key=lambda pair: len(pair[0]))
    pad = torch.nn.utils.rnn.pad_sequence
    for first in range(0, len(found), GROUP):
        some = found[first : first + GROUP]
        ids = pad([one for one, _ in some], batch_first=True, padding_value=1)
        labels = pad([one for _, one in some], batch_first=True, padding_value=-100)
        yield ids, (ids != 1).long(), labels


def work(name: str, model: Path, store: Path, pack: int, packs: int, device: str) -> None:
    """Warm up, then train a step for every line on standard input; each program does this in its own process."""
    from protea.train.metrics import peak_memory

    peer, *variant = name.split()
    steps = steps_of(store, pack, packs)
    step = {"protea": protea_step, "transformers": transformers_step}[peer](model, variant, device)
    for _ in range(2):
        step(next(steps))
    print("ready", flush=True)
    for _ in sys.stdin:
        found = next(steps)
        tokens = sum(one.inputs.input_ids.numel() for one in found)
        lengths = [b - a for one in found for a, b in one.inputs.cu_seqlens.spans()]
        began = time.perf_counter()
        loss = step(found)
        seconds = time.perf_counter() - began
        import torch

        told = {"tokens": tokens, "seconds": seconds, "loss": loss, "memory": peak_memory(torch.device(device))}
        squares = sum(length**2 for length in lengths) / tokens
        print(
            json.dumps(told | {"length": squares, "masked": sum(len(one.rows) for one in found) / tokens}), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8M", choices=("8M", "35M", "150M", "650M", "3B"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-tokens", type=int, default=16384)
    parser.add_argument("--pack", type=int, default=16384)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="programs to run; all by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--work", nargs=3, metavar=("NAME", "MODEL", "STORE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pack = min(arguments.pack, arguments.step_tokens)
    packs = arguments.step_tokens // pack
    if arguments.work:
        name, model, store = arguments.work
        work(name, Path(model), Path(store), pack, packs, arguments.device)
        return
    names = arguments.only or (ON_CPU if arguments.device == "cpu" else ON_GPU)
    layers = {"8M": 6, "35M": 12, "150M": 30, "650M": 33, "3B": 36}[arguments.model]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        init = [sys.executable, "-m", "protea", "init", f"esm2_t{layers}_{arguments.model}_UR50D"]
        subprocess.run([*init, "-o", str(folder / "model")], check=True, stdout=subprocess.DEVNULL)
        store = make_store(folder, max(2000, arguments.step_tokens * (arguments.rounds + 3) // 300))
        told = compete(names, folder / "model", store, arguments)
    report(arguments, names, told)


def compete(names: list[str], model: Path, store: Path, arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the values that each program reported in each round."""
    options = ["--step-tokens", str(arguments.step_tokens), "--pack", str(arguments.pack), "--device", arguments.device]
    told: dict[str, list[Any]] = {name: [] for name in names}
    workers = {}
    # One program at a time on a GPU, because several would share its memory.
    waves = [names] if arguments.device == "cpu" else [[name] for name in names]
    for wave in waves:
        for name in wave:
            command = [sys.executable, __file__, "--work", name, str(model), str(store), *options]
            workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert workers[name].stdout is not None
            if workers[name].stdout.readline().strip() != "ready":
                raise SystemExit(f"{name} did not start")
        for _ in range(arguments.rounds):
            for name in wave:
                stdin, stdout = workers[name].stdin, workers[name].stdout
                assert stdin is not None
                assert stdout is not None
                stdin.write("\n")
                stdin.flush()
                told[name].append(json.loads(stdout.readline()))
        for name in wave:
            workers[name].communicate()
    return told


def report(arguments: argparse.Namespace, names: list[str], told: dict[str, list[Any]]) -> None:
    import torch

    from protea.models.esm2 import SIZES
    from protea.train.metrics import peak_flops
    from protea.train.recipe import LogSettings

    device, log = torch.device(arguments.device), LogSettings()
    peaks = {name: peak_flops(log, device, torch.float32 if "float32" in name else torch.bfloat16) for name in names}
    print(f"ESM-2 {arguments.model}, {arguments.step_tokens:,} tokens a step, packs of {arguments.pack:,}; ", end="")
    print(f"median of {arguments.rounds} rounds (slowest, fastest)\n")
    print(
        "| | tokens/s | of transformers' fastest, round by round | utilisation | of TFLOP/s | peak memory | last loss |"
    )
    print("|---|---|---|---|---|---|---|")
    rivals = [name for name in names if name.startswith("transformers")]
    best = max(rivals, key=lambda name: statistics.median(_rates(told[name]))) if rivals else None
    for name in names:
        rates = _rates(told[name])
        middle = statistics.median(rates)
        ratio = ""
        if best is not None and name != best:
            ratios = sorted(mine / theirs for mine, theirs in zip(rates, _rates(told[best]), strict=True))
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        last = told[name][-1]
        flops = SIZES[arguments.model].training_flops(last["length"], last["masked"])
        peak = peaks[name]
        used = f"{middle * flops / peak:.1%} | {peak / 1e12:.3f}" if peak else " | "
        print(
            f"| {name} | {middle:,.0f} ({min(rates):,.0f}, {max(rates):,.0f}) | {ratio} | {used} | "
            f"{last['memory'] / 1e9:.2f} GB | {last['loss']:.4f} |"
        )


def _rates(rounds: list[Any]) -> list[float]:
    return [one["tokens"] / one["seconds"] for one in rounds]


if __name__ == "__main__":
    main()
