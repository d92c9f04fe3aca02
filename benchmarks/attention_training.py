"""Compare the native library's attention with PyTorch's, forward and backward on the CPU, by head width and length.

One sequence with 20 heads. The kernels alternate within a round. Each figure is the median over rounds in milliseconds.
The rate in GFLOP/s counts two products of 2·L²·H·K operations forward and five backward.

Usage: python benchmarks/attention_training.py [--rounds 15] [--widths 16 32 64] [--lengths 128 345 1000]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from protea import native
from protea.models.attention import NATIVE, SDPA, AttentionCall
from protea.native.products import supports
from protea.packing import CuSeqlens

HEADS = 20

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(length: int, scale: float) -> dict[str, tuple[Call, torch.dtype]]:
    cu = CuSeqlens.from_lengths([length])

    def pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in (q, k, v)), scale=scale)
        return y[0].transpose(0, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return NATIVE.run(AttentionCall(q, k, v, cu, cu, scale))

    found: dict[str, tuple[Call, torch.dtype]] = {"native, float32": (ours, torch.float32)}
    if supports(torch.bfloat16):
        found["native, bfloat16"] = (ours, torch.bfloat16)
    found["sdpa, float32"] = (lambda q, k, v: SDPA.run(AttentionCall(q, k, v, cu, cu, scale)), torch.float32)
    return found | {"sdpa, bfloat16": (pytorch, torch.bfloat16)}


def milliseconds(call: Call, tensors: list[Tensor]) -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    start = time.perf_counter()
    out = call(q, k, v)
    middle = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), tensors[3])
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 345, 1000])
    arguments = parser.parse_args()
    if native.library() is None:
        raise SystemExit(native.reason())
    print(f"{torch.get_num_threads()} threads, {native.instruction_set()}; forward / backward\n")
    rated = [name for name in ways(1, 1.0) if name.startswith("native")]
    print(f"| head width | length | {' | '.join(ways(1, 1.0))} | {' | '.join(f'{name}, GFLOP/s' for name in rated)} |")
    print("|---" * (2 + len(ways(1, 1.0)) + len(rated)) + "|")
    for width in arguments.widths:
        for length in arguments.lengths:
            tensors = [torch.randn(length, HEADS, width) for _ in range(4)]
            times: dict[str, list[tuple[float, float]]] = {}
            for round_number in range(arguments.rounds + 1):
                for name, (call, dtype) in ways(length, width**-0.5).items():
                    taken = milliseconds(call, [x.to(dtype) for x in tensors])
                    if round_number:
                        times.setdefault(name, []).append(taken)
            medians = {name: tuple(map(statistics.median, zip(*taken, strict=True))) for name, taken in times.items()}
            cells = " | ".join(f"{forward:.2f} / {backward:.2f}" for forward, backward in medians.values())
            product = 2e-6 * length**2 * HEADS * width
            rates = " | ".join(
                f"{2 * product / medians[name][0]:.0f} / {5 * product / medians[name][1]:.0f}" for name in rated
            )
            print(f"| {width} | {length} | {cells} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
