"""Measure residues per second from file to file, beside transformers, OpenVINO, ONNX Runtime, fair-esm and esm-cpp.

All programs get the same random weights and the same FASTA file: 200 sequences of log-normal lengths (mean about 345,
30 to 1,022). Each reads the file, computes the last hidden state of every residue, averages it over each sequence and
writes the averages; start-up does not count. Each program has its own process. In every round all programs run in
turn, so that changes in the machine's speed affect all of them. ``peers.py`` runs the other programs in their fastest
way, in every type that the hardware has:

    transformers            SDPA, padded batches of 8 sequences sorted by length
    transformers-compiled   the same, by torch.compile
    openvino                the same batches; int8: weights and activations quantized by NNCF
    onnxruntime             the same batches; int8: dynamic quantization
    fair-esm                its own batches of at most 4,096 tokens
    esm-cpp                 one sequence at a time, its only way; int8 weights; its outputs are logits

Few sequences of all lengths would make batches of much padding: 5 % more tokens than residues with 200 sequences, but
60 % with 16. For larger models, ``--every 5`` takes each fifth batch of the 200 sequences, sorted by length.

Before they are timed, their averages are compared with Protea's in float32: the norm of the difference, relative to
the norm. A program that is further away than its type explains ends the benchmark.

On a GPU (``--device cuda``) the programs are Protea in bf16-mixed (``--fast``) and in bfloat16, and transformers in
bfloat16 with SDPA. Model FLOP utilisation is printed too: residues/s · (2 · parameters + 4 · layers · L · width) /
peak. L is the sequence length, averaged over residues, and the peak is ``--peak-tflops`` (989 for H100 and H200).

The ceiling is measured in the same rounds: the residues per second of a model that consists only of its products, at
the rate of the fastest product of matrices with a million items each, and of attention's exponentials by PyTorch.
``roofline.py`` says what each part of Protea reaches of it.

Usage: python benchmarks/embed.py [--model esm2_t6_8M_UR50D] [--rounds 5] [--peers PYTHON] [--esm-cpp PYTHON]
       python benchmarks/embed.py --only protea,openvino --peers PYTHON
       python benchmarks/embed.py --device cuda --sequences 5000 --model esm2_t33_650M_UR50D
       where the first PYTHON is an interpreter with torch, transformers, openvino, nncf, onnx and onnxruntime, and the
       second one with esm-cpp, which needs an older NumPy than Protea's tests
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

import peers

CONTESTANTS = (
    "protea float32",
    "protea bf16-mixed",
    "protea bfloat16",
    "transformers float32",
    "transformers bfloat16",
    "transformers-compiled float32",
    "transformers-compiled bfloat16",
    "protea int8",
    "openvino float32",
    "openvino bfloat16",
    "openvino int8",
    "onnxruntime float32",
    "onnxruntime int8",
    "fair-esm float32",
    "esm-cpp int8",
)
ON_GPU = ("protea bf16-mixed", "protea bfloat16", "transformers bfloat16")
REFERENCE = "protea float32"
CEILINGS = ("ceiling float32", "ceiling bfloat16", "ceiling exponentials")
CEILING_SIDE = 1024
CEILING_ITEMS = 1 << 17  # two halves that fit a second-level cache each
REPEATED = 50
FARTHEST = {"float32": 1e-5, "bf16-mixed": 0.02, "bfloat16": 0.05, "int8": 0.2}
"""The largest difference of the averages that a type explains."""


def write_fasta(path: Path, count: int, seed: int = 0, mean: int = 345, every: int = 1) -> int:
    """Write random sequences, or the middle one of every so many batches of equal lengths; return their residues."""
    rng = random.Random(seed)
    lengths = [min(1022, max(30, int(rng.lognormvariate(5.66, 0.6) * mean / 345))) for _ in range(count)]
    if every > 1:
        lengths.sort()
        batches = [lengths[start : start + peers.BATCH] for start in range(0, count, peers.BATCH)]
        lengths = [length for batch in batches[every // 2 :: every] for length in batch]
        rng.shuffle(lengths)
    letters = "LAGVSERTIDPKQNFYMHWC"
    path.write_text("".join(f">s{n}\n{''.join(rng.choices(letters, k=length))}\n" for n, length in enumerate(lengths)))
    return sum(lengths)


def protea_job(model: Path, fasta: Path, out: Path, dtype: str, device: str) -> Callable[[], None]:
    from protea import load
    from protea.embed.run import EmbedRun
    from protea.embed.settings import EmbedSettings

    loaded = load(model, device=device, dtype=dtype)
    settings = EmbedSettings(inputs=(str(fasta),), sequences=out.with_suffix(".parquet"), model=str(model), long="full")

    def job() -> None:
        EmbedRun(settings, loaded.module, {}, overwrite=True)()

    return job


def ceiling_job(model: Path, fasta: Path, out: Path, kind: str, device: str) -> Callable[[], None]:
    """Large products, by PyTorch or by Protea's library, whichever is faster; or exponentials, by PyTorch."""
    import torch

    from protea.native import products

    if kind == "exponentials":
        x = torch.randn(CEILING_ITEMS)
        y = torch.empty_like(x)
        return lambda: [torch.exp(x, out=y) for _ in range(REPEATED)] and None
    dtype = getattr(torch, kind)
    a, b = (torch.randn(CEILING_SIDE, CEILING_SIDE).to(dtype) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: a @ b]
    if products.supports(dtype):
        packed = products.Packed.of(b)
        ways.append(lambda: products.linear(a, packed))
    fastest = min(ways, key=best_seconds)
    return lambda: [fastest() for _ in range(REPEATED)] and None


def best_seconds(job: Callable[[], object], tries: int = 30) -> float:
    job()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


JOBS = {"protea": protea_job, **peers.JOBS, "ceiling": ceiling_job}


def work(name: str, model: Path, fasta: Path, out: Path, device: str) -> None:
    """Be one program; each has its own process."""
    peer, dtype = name.split()
    repeat(JOBS[peer](model, fasta, out, dtype, device))


def repeat(job: Callable[[], None]) -> None:
    """Warm up, then run once for every line on standard input, and print the seconds."""
    job()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        job()
        print(time.perf_counter() - start, flush=True)


def start(name: str, python: str, folder: Path, device: str) -> subprocess.Popen[str]:
    """Start a program, which is ready when it has run once."""
    paths = [str(folder / part) for part in ("model", "in.fasta", out_name(name))]
    command = [python, __file__, "--work", name, *paths]
    with (folder / f"{out_name(name)}.log").open("w") as log:
        worker = subprocess.Popen(
            [*command, "--device", device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    line = worker.stdout.readline()
    while line and line.strip() != "ready":
        line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{name} did not start:\n{(folder / f'{out_name(name)}.log').read_text()[-2000:]}")
    return worker


def run_in_turn(workers: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, list[float]]:
    """Let all programs run in every round, one after another; return the seconds of each, and end the programs."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds


def out_name(name: str) -> str:
    return name.replace(" ", "-")


def averages(folder: Path, name: str) -> Any:
    """Read the averages that a program wrote, ``[N, D]``."""
    import numpy as np
    import pyarrow.parquet

    path = folder / out_name(name)
    if not name.startswith("protea"):
        return np.load(path.with_suffix(".npy"))
    return np.stack(pyarrow.parquet.read_table(path.with_suffix(".parquet"))["embedding"].to_numpy())


def difference(folder: Path, name: str) -> float | None:
    """How far a program is from Protea in float32; ends the benchmark if that is too far."""
    import numpy as np

    peer, dtype = name.split()
    if peer in (*peers.INCOMPARABLE, "ceiling"):
        return None
    expected = averages(folder, REFERENCE)
    found = float(np.linalg.norm(averages(folder, name) - expected) / np.linalg.norm(expected))
    if not found <= FARTHEST[dtype]:
        raise SystemExit(f"{name} differs from {REFERENCE} by {found:.1e}, more than {FARTHEST[dtype]}")
    return found


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The programs to run: those of ``--only`` whose interpreters are named, in types that the hardware has."""
    import torch

    from protea.device import native_bfloat16

    names = CONTESTANTS if arguments.device == "cpu" else ON_GPU
    if not native_bfloat16(torch.device(arguments.device)):
        names = tuple(name for name in names if not name.endswith(("bfloat16", "bf16-mixed")))
    interpreters = {"openvino": arguments.peers, "onnxruntime": arguments.peers, "esm-cpp": arguments.esm_cpp}
    names = tuple(name for name in names if interpreters.get(name.split()[0], sys.executable))
    if arguments.only:
        wanted = arguments.only.split(",")
        names = tuple(name for name in names if name in wanted or name.split()[0] in wanted or name == REFERENCE)
    return list(names)


def ceilings(device: str, names: list[str]) -> list[str]:
    """The rates of this CPU that bound what a model can reach, in the types of the programs that run."""
    if device != "cpu":
        return []
    narrow = any(name.endswith(("bfloat16", "bf16-mixed")) for name in names)
    return [name for name in CEILINGS if name != "ceiling bfloat16" or narrow]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm2_t6_8M_UR50D")
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="take one of so many batches, sorted by length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="NAMES", help="programs to run, by comma: openvino, or 'protea bf16-mixed'")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python interpreter with OpenVINO, NNCF and ONNX Runtime")
    parser.add_argument("--esm-cpp", metavar="PYTHON", help="a Python interpreter with esm-cpp")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peak-tflops", type=float, default=989, help="the GPU's peak for dense bfloat16 products")
    parser.add_argument("--work", nargs=4, metavar=("NAME", "MODEL", "FASTA", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, *paths = arguments.work
        work(name, *map(Path, paths), device=arguments.device)
        return
    names = chosen(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, fasta = folder / "model", folder / "in.fasta"
        init = [sys.executable, "-m", "protea", "init", arguments.model, "-o", str(model)]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        residues = write_fasta(fasta, arguments.sequences, every=arguments.every)
        workers, differences = {}, {}
        others = {"openvino": arguments.peers, "onnxruntime": arguments.peers, "esm-cpp": arguments.esm_cpp}
        for name in (*names, *ceilings(arguments.device, names)):
            python = others.get(name.split()[0], sys.executable)
            workers[name] = start(name, python, folder, arguments.device)
            if arguments.device == "cpu":
                differences[name] = difference(folder, name)
            print(f"{name} is ready", file=sys.stderr)
        seconds = run_in_turn(workers, arguments.rounds)
        parameters = (model / "model.safetensors").stat().st_size // 4
        config = json.loads((model / "config.json").read_text())
        lengths = [len(sequence) for _, sequence in peers.read_records(fasta)]
    report(arguments.model, residues, names, seconds, differences)
    met = sum(length**2 for length in lengths) / sum(lengths)  # residues that a residue attends to, on average
    flop = 2 * parameters + 4 * config["num_hidden_layers"] * met * config["hidden_size"]
    exponentials = config["num_hidden_layers"] * config["num_attention_heads"] * met
    for name in filter(seconds.get, CEILINGS[:2]):
        rate = REPEATED * 2 * CEILING_SIDE**3 / statistics.median(seconds[name])
        exponential = statistics.median(seconds["ceiling exponentials"]) / (REPEATED * CEILING_ITEMS)
        ceiling = 1 / (flop / rate + exponentials * exponential)
        print(f"| {name}: {rate / 1e9:,.0f} GFLOP/s, {1e-9 / exponential:.2f} G exp/s | {ceiling:,.0f} | | | |")
    for name in names if arguments.device == "cuda" else ():
        rate = residues / statistics.median(seconds[name])
        print(f"{name}: model FLOP utilisation {rate * flop / arguments.peak_tflops / 1e12:.1%}")


def report(
    model: str,
    residues: int,
    names: list[str],
    seconds: dict[str, list[float]],
    differences: dict[str, float | None],
) -> None:
    print(f"{model}: {residues:,} residues; median of {len(seconds[names[0]])} rounds (fastest, slowest)\n")
    print("| | residues/s | of the best peer in float32, round by round | of the best peer | difference |")
    print("|---|---|---|---|---|")
    rivals = [name for name in names if not name.startswith("protea")]
    for name in names:
        rates = sorted(residues / one for one in seconds[name])
        cells = [f"{statistics.median(rates):,.0f} ({rates[-1]:,.0f}, {rates[0]:,.0f})"]
        exact = [rival for rival in rivals if rival.endswith("float32")]
        cells += [
            "" if name in rivals or not compared else ratio(seconds, name, compared) for compared in (exact, rivals)
        ]
        found = differences.get(name)
        cells.append("" if found is None else f"{found:.0e}")
        print(f"| {name} | {' | '.join(cells)} |")


def ratio(seconds: dict[str, list[float]], name: str, rivals: list[str]) -> str:
    """How many times as fast as the fastest rival of each round: the median, the least and the most."""
    rounds = zip(*(seconds[rival] for rival in rivals), strict=True)
    ratios = [min(theirs) / ours for ours, theirs in zip(seconds[name], rounds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
