"""Compare attention kernels by shape: which is fastest, and what grouping equal lengths gains.

Every pack holds about 4,096 tokens and 20 heads. The kernels alternate within a round. Each figure is the median over
rounds, in milliseconds for the whole pack.

Usage: python benchmarks/attention.py [--dtype bfloat16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from protea.models.attention import NATIVE, SDPA, AttentionCall, Kernel
from protea.native.products import supports
from protea.packing import CuSeqlens

HEADS = 20
WIDTHS = (16, 24, 32, 64, 128)
PACKS = {
    "128 x 32": [32] * 128,
    "73 x 56": [56] * 73,
    "32 x 128": [128] * 32,
    "12 x 345": [345] * 12,
    "4 x 1,024": [1024] * 4,
    "1 x 4,096": [4096],
    "10 to 60, mixed": [10 + (37 * i) % 51 for i in range(117)],
    "30 to 1,022, mixed": [345, 210, 411, 97, 660, 290, 150, 520, 77, 980, 240, 116],
}


def together(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    cu = CuSeqlens.from_lengths(lengths)
    return kernel.run(AttentionCall(q, k, v, cu, cu, 1.0))


def one_by_one(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), lengths, strict=True)
    return torch.cat([together(kernel, *qkv, [length]) for *qkv, length in parts])


def milliseconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    ways: dict[str, tuple[Callable[..., Tensor], Kernel]] = {
        "sdpa, a call a sequence": (one_by_one, SDPA),
        "sdpa, equal lengths together": (together, SDPA),
    }
    if supports(dtype):
        ways["native"] = (together, NATIVE)
    print(f"| head width | lengths | {' | '.join(ways)} |")
    print("|---" * (len(ways) + 2) + "|")
    for width in WIDTHS:
        for name, lengths in PACKS.items():
            q, k, v = (torch.randn(sum(lengths), HEADS, width).to(dtype) * 0.5 for _ in range(3))
            times: dict[str, list[float]] = {way: [] for way in ways}
            with torch.inference_mode():
                for round_number in range(arguments.rounds + 1):
                    for way, (call, kernel) in ways.items():
                        taken = milliseconds(lambda call=call, kernel=kernel: call(kernel, q, k, v, lengths))  # type: ignore[misc]  # noqa: B023
                        if round_number:
                            times[way].append(taken)
            cells = " | ".join(f"{statistics.median(values):.1f}" for values in times.values())
            print(f"| {width} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
