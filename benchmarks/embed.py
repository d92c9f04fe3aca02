"""Measure residues per second from file to file, compared with transformers, fair-esm and esm-cpp.

All programs get the same random weights and the same FASTA file: 200 sequences of log-normal lengths (mean about 345,
30 to 1,022). Each reads the file, computes the last hidden state of every residue, averages it over each sequence and
writes the averages; start-up does not count. Each program has its own process. In every round all programs run in
turn, so that changes in the machine's speed affect all of them. The other programs run in their fastest way:

    transformers   SDPA, padded batches of 8 sequences sorted by length
    fair-esm       its own batches of at most 4,096 tokens
    esm-cpp        one sequence at a time, its only way; int8 weights; its outputs are logits

On a GPU (``--device cuda``) the programs are Protea in bf16-mixed (``--fast``) and in bfloat16, and transformers in
bfloat16 with SDPA. Model FLOP
utilisation is printed too: residues/s · (2 · parameters + 4 · layers · L · width) / peak. L is the sequence length,
averaged over residues, and the peak is ``--peak-tflops`` (989 for H100 and H200).

The ceiling is a product of matrices with a million weights each, measured in the same rounds: the residues per second
of a model that consists only of linear layers at that rate (2 FLOP per parameter and residue).

Usage: python benchmarks/embed.py [--model esm2_t6_8M_UR50D] [--rounds 5] [--esm-cpp PYTHON]
       python benchmarks/embed.py --device cuda --sequences 5000 --model esm2_t33_650M_UR50D
       where PYTHON is an interpreter with esm-cpp, which needs an older NumPy than Protea's tests
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

CONTESTANTS = (
    "protea float32",
    "protea bf16-mixed",
    "protea bfloat16",
    "transformers float32",
    "transformers bfloat16",
    "fair-esm float32",
    "esm-cpp int8",
)
ON_GPU = ("protea bf16-mixed", "protea bfloat16", "transformers bfloat16")
CEILINGS = ("ceiling float32", "ceiling bfloat16")
CEILING_SIDE = 1024


def write_fasta(path: Path, count: int, seed: int = 0) -> int:
    """Write random sequences; return the number of residues."""
    rng = random.Random(seed)
    lengths = [min(1022, max(30, int(rng.lognormvariate(5.66, 0.6)))) for _ in range(count)]
    letters = "LAGVSERTIDPKQNFYMHWC"
    path.write_text("".join(f">s{n}\n{''.join(rng.choices(letters, k=length))}\n" for n, length in enumerate(lengths)))
    return sum(lengths)


def protea_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Callable[[], None]:
    from protea import load
    from protea.embed.run import EmbedRun
    from protea.embed.settings import EmbedSettings

    loaded = load(model, device=device, dtype=dtype)
    settings = EmbedSettings(inputs=(str(fasta),), sequences=out.with_suffix(".parquet"), model=str(model))

    def job() -> None:
        EmbedRun(settings, loaded.module, {}, overwrite=True)()

    return job


def ceiling_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Callable[[], None]:
    import torch

    kind = getattr(torch, dtype)
    a, b = (torch.randn(CEILING_SIDE, CEILING_SIDE).to(kind) for _ in range(2))

    def job() -> None:
        for _ in range(200):
            a @ b

    return job


JOBS = {"protea": protea_job, **peers.JOBS, "ceiling": ceiling_job}


def work(name: str, model: Path, fasta: Path, out: Path, device: str) -> None:
    """Warm up, then run once for every line on standard input; each program does this in its own process."""
    peer, dtype = name.split()
    job = JOBS[peer](model, fasta, out, dtype, device)
    job()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        job()
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm2_t6_8M_UR50D")
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--esm-cpp", metavar="PYTHON", help="a Python interpreter with esm-cpp")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peak-tflops", type=float, default=989, help="the GPU's peak for dense bfloat16 products")
    parser.add_argument("--work", nargs=4, metavar=("NAME", "MODEL", "FASTA", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, *paths = arguments.work
        work(name, *map(Path, paths), device=arguments.device)
        return
    names = list(CONTESTANTS if arguments.device == "cpu" else ON_GPU)
    if not arguments.esm_cpp:
        names = [name for name in names if not name.startswith("esm-cpp")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, fasta = folder / "model", folder / "in.fasta"
        init = [sys.executable, "-m", "protea", "init", arguments.model, "-o", str(model)]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        residues = write_fasta(fasta, arguments.sequences)
        workers = {}
        for name in (*names, *(CEILINGS if arguments.device == "cpu" else ())):
            python = arguments.esm_cpp if name.startswith("esm-cpp") else sys.executable
            command = [python, __file__, "--work", name, str(model), str(fasta), str(folder / name.replace(" ", "-"))]
            command += ["--device", arguments.device]
            workers[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            line = workers[name].stdout.readline()
            while line and line.strip() != "ready":
                line = workers[name].stdout.readline()
            if not line:
                raise SystemExit(f"{name} did not start")
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(arguments.rounds):
            for name, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                seconds[name].append(float(worker.stdout.readline()))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        parameters = (model / "model.safetensors").stat().st_size // 4
        config = json.loads((model / "config.json").read_text())
        lengths = [len(sequence) for _, sequence in read_records(fasta)]
    report(arguments.model, residues, names, seconds, parameters)
    if arguments.device == "cuda":
        met = sum(length**2 for length in lengths) / sum(lengths)
        flop = 2 * parameters + 4 * config["num_hidden_layers"] * met * config["hidden_size"]
        for name in names:
            rate = residues / statistics.median(seconds[name])
            print(f"{name}: model FLOP utilisation {rate * flop / arguments.peak_tflops / 1e12:.1%}")


def report(model: str, residues: int, names: list[str], seconds: dict[str, list[float]], parameters: int) -> None:
    print(f"{model}: {residues:,} residues; median of {len(seconds[names[0]])} rounds (fastest, slowest)\n")
    print("| | residues/s | of the best peer, round by round |\n|---|---|---|")
    peers = [name for name in names if not name.startswith("protea")]
    for name in names:
        rates = sorted(residues / one for one in seconds[name])
        rivals = [peer for peer in peers if "float32" in peer or name != "protea float32"]
        ratio = ""
        if name not in peers and rivals:
            rounds = zip(*(seconds[peer] for peer in rivals), strict=True)
            ratios = [min(theirs) / ours for ours, theirs in zip(seconds[name], rounds, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(rates):,.0f} ({rates[-1]:,.0f}, {rates[0]:,.0f}) | {ratio} |")
    for name in filter(seconds.get, CEILINGS):
        rate = 200 * 2 * CEILING_SIDE**3 / statistics.median(seconds[name])
        print(f"| {name}: {rate / 1e9:,.0f} GFLOP/s | {rate / (2 * parameters):,.0f} | |")


if __name__ == "__main__":
    main()
