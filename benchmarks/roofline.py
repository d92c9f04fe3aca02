"""Where the time of embedding on a CPU goes, and what share of the processor's measured ceiling each part reaches.

Embeds the sequences of ``embed.py`` with random weights, and prints one row for each part:

    products      the linear layers' products, measured alone: the same calls without what is fused into them
    attention     scores, softmax and sums
    token-wise    norms, rotations, activations, biases, residuals: what fused calls take longer than their products
    rest          everything else: reading, tokens, embedding, the last norm, averages, writing

The ceiling of products is the fastest product of two large matrices, by PyTorch or by the native library, in the same
type. That of attention is its two products at this rate and its exponentials at the rate of PyTorch's ``exp``, in turn.
The other parts have none, so that the share of all is what the ceilings of both take of the whole time.

Usage: python benchmarks/roofline.py [--model esm2_t6_8M_UR50D] [--dtype float32] [--sequences 100] [--rounds 3]
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from embed import best_seconds, protea_job, write_fasta
from protea.limits import limit_threads
from protea.native import instruction_set, packed_attention, products

SIDE = 1024
TYPES = {0: "float32", 1: "bfloat16"}  # as the native library numbers them


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large product."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    jobs: list[Callable[[], object]] = [lambda: a @ b]
    if products.supports(dtype):
        packed = products.Packed.of(b)
        jobs.append(lambda: products.linear(a, packed))
    return 2 * SIDE**3 / min(map(best_seconds, jobs))


def exponential_rate() -> float:
    """Exponentials per second, of numbers that lie in the second-level cache."""
    x = torch.randn(torch.get_num_threads() * 65536)
    y = torch.empty_like(x)
    return len(x) / best_seconds(lambda: torch.exp(x, out=y))


class Parts:
    """Seconds and work of each part, counted at the calls of the native library."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.repeated = 0.0
        self.flop: Counter[tuple[str, str]] = Counter()
        self.exponentials = 0
        self._run = products.run

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is computed meanwhile."""
        products.run = packed_attention.run = self._timed
        try:
            yield
        finally:
            products.run = packed_attention.run = self._run

    def _timed(self, name: str, call: Any) -> None:
        took = self._clock(name, call)
        if name != "protea_linear":
            offsets = (ctypes.c_int32 * (call.sequences + 1)).from_address(call.cu_q)
            scores = call.heads * sum((end - start) ** 2 for start, end in pairwise(offsets))
            self.seconds["attention"] += took
            self.flop["attention", TYPES[call.type]] += 4 * scores * call.width
            self.exponentials += scores
            return
        plain = type(call).from_buffer_copy(call)
        plain.norm_weight = plain.norm_bias = plain.bias = plain.cosine = plain.sine = plain.residual = None
        plain.activation = plain.rotated = 0
        scratch = torch.empty(call.rows, call.outputs, dtype=torch.float32)
        plain.y, plain.y_stride = scratch.data_ptr(), call.outputs
        alone = self._clock(name, plain)
        self.repeated += alone
        self.seconds["products"] += min(alone, took)
        self.seconds["token-wise"] += max(took - alone, 0.0)
        self.flop["products", TYPES[call.w_type]] += 2 * call.rows * call.inputs * call.outputs

    def _clock(self, name: str, call: Any) -> float:
        start = time.perf_counter()
        self._run(name, call)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="esm2_t6_8M_UR50D")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16-mixed", "bfloat16"))
    parser.add_argument("--sequences", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    limit_threads()
    if instruction_set() is None:
        raise SystemExit("the native library is not used; `protea doctor` tells why")
    parts, total = Parts(), 0.0
    types = ["float32"] if arguments.dtype == "float32" else list(TYPES.values())
    rates = {name: product_rate(getattr(torch, name)) for name in types}
    exponentials = exponential_rate()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        init = [sys.executable, "-m", "protea", "init", arguments.model, "-o", str(folder / "model")]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        residues = write_fasta(folder / "in.fasta", arguments.sequences)
        job = protea_job(folder / "model", folder / "in.fasta", folder / "out", arguments.dtype, "cpu")
        job()
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            with parts.counted():
                job()
            total += time.perf_counter() - start
    total -= parts.repeated
    rates = {name: max(rate, product_rate(getattr(torch, name))) for name, rate in rates.items()}
    if not parts.flop:
        raise SystemExit(f"{arguments.model} in {arguments.dtype} does not compute through the native library")
    ideal: Counter[str] = Counter()
    for (part, dtype), flop in parts.flop.items():
        ideal[part] += flop / rates[dtype]
    ideal["attention"] += parts.exponentials / exponentials
    parts.seconds["rest"] = total - sum(parts.seconds.values())
    print(f"{arguments.model}, {arguments.dtype}, {instruction_set()}, {torch.get_num_threads()} threads: ", end="")
    print(f"{arguments.rounds * residues / total:,.0f} residues/s; products at most ", end="")
    print(", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items()), end="; ")
    print(f"{exponentials / 1e9:.2f} billion exponentials/s\n")
    print("| part | share of the time | share of its ceiling |\n|---|---|---|")
    for part in ("products", "attention", "token-wise", "rest"):
        reached = f"{ideal[part] / parts.seconds[part]:.0%}" if ideal[part] else ""
        print(f"| {part} | {parts.seconds[part] / total:.1%} | {reached} |")
    print(f"| all | 100 % | {sum(ideal.values()) / total:.0%} |")


if __name__ == "__main__":
    main()
