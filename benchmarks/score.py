"""Compare a masked-marginal scan with transformers, and measure the memory of contact maps.

Usage: python benchmarks/score.py scan [--model 150M] [--length 300] [--sites 48] [--rounds 3] [--device cuda]
       python benchmarks/score.py contacts [--model 650M --length 1000]

``scan`` masks some sites of a protein, each in its own copy. Protea runs them through ``LanguageModel.score``, with the
model prepared as in ``protea score``, in float32 and, where the hardware multiplies bfloat16, with ``--fast``.
transformers runs them with its fastest attention, one copy per forward pass, as fair-esm's ``predict.py`` does, and in
batches of 16. All use the same random weights, have their own process, and run in turn in every round. The table also
shows the largest difference to Protea's float32 numbers.

``contacts`` measures the peak of anonymous memory for one contact map in float32, in addition to the loaded model, and
shows for comparison the memory that all attention maps together would take.
"""

from __future__ import annotations

import argparse
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

from memory import Peak, anonymous_bytes

CONTESTANTS = (
    "protea float32",
    "protea --fast",
    "transformers float32 one",
    "transformers float32 16",
    "transformers bf16 one",
    "transformers bf16 16",
)
LETTERS = "LAGVSERTIDPKQNFYMHWC"
LAYERS = {"8M": 6, "35M": 12, "150M": 30, "650M": 33}


def protein(length: int) -> str:
    return "".join(random.Random(0).choices(LETTERS, k=length))


Scan = Callable[[str, list[int]], list[float]]
"""Log-likelihood ratios of alanine against what stands at each site."""


def protea_scan(model: Path, variant: list[str], device: str) -> Scan:
    import protea
    from protea.infer.loading import computing_dtype

    dtype = computing_dtype(device, "float32", fast="--fast" in variant)
    loaded = protea.load(model, device=device, dtype=dtype)

    def scan(sequence: str, sites: list[int]) -> list[float]:
        return loaded.score(sequence, [f"{sequence[i]}{i + 1}A" for i in sites]).tolist()

    return scan


def transformers_scan(model: Path, variant: list[str], device: str) -> Scan:
    import torch
    from transformers import EsmForMaskedLM

    from protea.alphabet import ESM

    kind = torch.bfloat16 if "bf16" in variant else torch.float32
    loaded = EsmForMaskedLM.from_pretrained(model, dtype=kind, attn_implementation="sdpa").to(device).eval()
    size = 1 if variant[-1] == "one" else int(variant[-1])

    def scan(sequence: str, sites: list[int]) -> list[float]:
        ids = torch.tensor([0, *ESM.encode(sequence).tolist(), 2], device=device)
        found: list[float] = []
        with torch.inference_mode():
            for first in range(0, len(sites), size):
                some = torch.tensor(sites[first : first + size], device=device) + 1
                copies = ids.repeat(len(some), 1)
                rows = torch.arange(len(some), device=device)
                copies[rows, some] = ESM.mask
                logits = loaded(copies, attention_mask=torch.ones_like(copies)).logits[rows, some].float()
                values = logits.log_softmax(-1)
                found += (values[:, ESM.tokens.index("A")] - values[rows, ids[some]]).tolist()
        return found

    return scan


def work(name: str, model: Path, device: str) -> None:
    """Warm up, then scan once for every line on standard input; each program does this in its own process."""
    peer, *variant = name.split()
    scan = {"protea": protea_scan, "transformers": transformers_scan}[peer](model, variant, device)
    scan(protein(300), list(range(16)))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        found = scan(asked["sequence"], asked["sites"])
        print(json.dumps({"seconds": time.perf_counter() - began, "scores": found}), flush=True)


def compete(arguments: argparse.Namespace, model: Path) -> None:
    names = arguments.only or CONTESTANTS
    sequence = protein(arguments.length)
    sites = sorted(random.Random(1).sample(range(arguments.length), min(arguments.sites, arguments.length)))
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    workers = {}
    for name in names:
        command = [sys.executable, __file__, "work", "--contestant", name, "--folder", str(model)]
        command += ["--device", arguments.device]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if ask(workers[name]).strip() != "ready":
            raise SystemExit(f"{name} did not start")
    for _ in range(arguments.rounds):
        for name in names:
            told[name].append(json.loads(ask(workers[name], {"sequence": sequence, "sites": sites})))
    for worker in workers.values():
        worker.communicate()
    rates = {name: [len(sites) / one["seconds"] for one in rounds] for name, rounds in told.items()}
    loops = [name for name in names if name.startswith("transformers float32")]
    print(f"ESM-2 {arguments.model}, {len(sites)} sites of {arguments.length} residues, {arguments.rounds} rounds\n")
    print("| | sites/s: median (slowest, fastest) |", " | ".join(f"of {one}" for one in loops), "| difference |")
    print("|---|---|" + "---|" * (len(loops) + 1))
    exact = told[names[0]][0]["scores"]
    for name in names:
        cells = [f"{statistics.median(rates[name]):.2f} ({min(rates[name]):.2f}, {max(rates[name]):.2f})"]
        for loop in loops:
            ratios = sorted(a / b for a, b in zip(rates[name], rates[loop], strict=True))
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        apart = max(abs(a - b) for a, b in zip(told[name][0]["scores"], exact, strict=True))
        print(f"| {name} | {' | '.join(cells)} | {apart:.1e} |")


def ask(worker: subprocess.Popen[str], what: Any = None) -> str:
    assert worker.stdin is not None
    assert worker.stdout is not None
    if what is not None:
        worker.stdin.write(json.dumps(what) + "\n")
        worker.stdin.flush()
    return worker.stdout.readline()


def measure_contacts(arguments: argparse.Namespace, model: Path) -> None:
    import protea

    loaded = protea.load(model, device="cpu")
    loaded.contacts(protein(50))
    before = anonymous_bytes()
    with Peak() as peak:
        began = time.perf_counter()
        found = loaded.contacts(protein(arguments.length))
        seconds = time.perf_counter() - began
    config = loaded.config
    maps = 4 * config.num_hidden_layers * config.num_attention_heads * (arguments.length + 2) ** 2
    print(
        f"ESM-2 {arguments.model}, {arguments.length:,} residues: {(peak.bytes - before) / 1e9:.3f} GB above the "
        f"loaded model, {seconds:.1f} s; the map itself {found.nbytes / 1e9:.3f} GB, all attention {maps / 1e9:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scan", "contacts", "work"))
    parser.add_argument("--model", default="150M", choices=tuple(LAYERS))
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--sites", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="programs to run; all by default")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "work":
        work(arguments.contestant, arguments.folder, arguments.device)
        return
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        name = f"esm2_t{LAYERS[arguments.model]}_{arguments.model}_UR50D"
        init = [sys.executable, "-m", "protea", "init", name, "-o", str(model)]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        (compete if arguments.what == "scan" else measure_contacts)(arguments, model)


if __name__ == "__main__":
    main()
