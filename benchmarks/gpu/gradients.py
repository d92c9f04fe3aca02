"""The part ``gradients``: attention of packed sequences, forwards and backwards, beside SDPA and the exact result.

Ours is ``protea.models.attention.attend``, which picks the kernel that training and inference get: FlashAttention for
packed sequences on a GPU. SDPA is PyTorch's, a call a sequence. Both get the same half-precision numbers; exact is the
definition in float64 on those same numbers. Errors are ‖found - exact‖ / ‖exact‖ over the whole pack, and the largest
difference of a number. The mixed lengths include one of a single token, whose output is its value and whose gradients
of query and key are zero: what is not zero there is told by itself.

A row is right if each of its errors is below LIMITS, or below three times SDPA's; the part fails if one is not.

Usage: python benchmarks/gpu/gradients.py OUT [--dry-run]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from records import append
from torch import Tensor
from torch.nn import functional as F

from protea.models.attention import AttentionCall, attend
from protea.packing import CuSeqlens

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16)
LENGTHS = [1, 7, 64, 64, 129, 345, 1024]
DRY_LENGTHS = [1, 7, 20, 20]
HEADS = 4
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES = ("output", "dq", "dk", "dv")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Results = dict[str, Tensor]


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The definition, a sequence at a time."""
    found = []
    for queries, keys, values in zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhk,shk->hqs", queries, keys) * scale
        found.append(torch.einsum("hqs,shk->qhk", scores.softmax(-1), values))
    return torch.cat(found)


def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """PyTorch's, a call a sequence."""
    found = []
    for part in zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True):
        queries, keys, values = (x.transpose(0, 1)[None] for x in part)
        found.append(F.scaled_dot_product_attention(queries, keys, values, scale=scale)[0].transpose(0, 1))
    return torch.cat(found)


def differentiated(attention: Attention, inputs: list[Tensor], above: Tensor) -> Results:
    """The output and the gradients of the inputs, of ``(output · above).sum()``."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves)
    torch.autograd.backward(out, above.to(out.dtype))
    gradients = [x.grad if x.grad is not None else torch.full_like(x, torch.nan) for x in leaves]
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def largest(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max())


def picked(q: Tensor) -> str:
    """The name of the kernel that serves a call with gradients."""
    try:
        from protea.models.attention import pick_kernel

        cu = CuSeqlens.from_lengths([len(q)]).to(q.device)
        return str(pick_kernel(AttentionCall(q, q, q, cu, cu)).name)
    except (ImportError, AttributeError):
        return "unknown"


def compare(out: Path, device: str, dtype: torch.dtype, width: int, lengths: list[int]) -> list[str]:
    """One row; what is wrong with it."""
    generator = torch.Generator(device).manual_seed(width)
    shape = (sum(lengths), HEADS, width)
    q, k, v, above = (torch.empty(shape, device=device).normal_(generator=generator).to(dtype) for _ in range(4))
    cu, scale = CuSeqlens.from_lengths(lengths).to(device), width**-0.5
    wide = [x.double() for x in (q, k, v)]
    truth = differentiated(lambda a, b, c: exact(a, b, c, lengths, scale), wide, above.double())
    ours = differentiated(lambda a, b, c: attend(AttentionCall(a, b, c, cu, cu, scale)), [q, k, v], above)
    theirs = differentiated(lambda a, b, c: sdpa(a, b, c, lengths, scale), [q, k, v], above)
    with torch.inference_mode():
        quiet = attend(
            AttentionCall(q, k, v, cu, cu, scale)
        )  # without gradients the kernel may be called in another way
    values: dict[str, float] = {}
    wrong = []
    for name in NAMES:
        error, beside = relative(ours[name], truth[name]), relative(theirs[name], truth[name])
        values |= {f"{name}_error": error, f"{name}_error_sdpa": beside}
        values |= {f"{name}_largest": largest(ours[name], truth[name])}
        values |= {f"{name}_largest_sdpa": largest(theirs[name], truth[name])}
        if not error <= max(LIMITS[dtype], 3 * beside):
            wrong.append(f"{str(dtype).removeprefix('torch.')}, width {width}: {name} is off by {error:.2g}")
    values["inference_error"] = relative(quiet, truth["output"])
    if not values["inference_error"] <= LIMITS[dtype]:
        wrong.append(f"{dtype}, width {width}: the output without gradients is off by {values['inference_error']:.2g}")
    alone = lengths.index(1)
    values["single_token_gradient"] = float(max(ours[name][alone].abs().max() for name in ("dq", "dk")))
    kernel = picked(q.detach().requires_grad_())
    kind = str(dtype).removeprefix("torch.")
    append(out, "gradients", "gradients", kernel=kernel, dtype=kind, width=width, right=not wrong, **values)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    device = "cpu" if given.dry_run else "cuda"
    lengths = DRY_LENGTHS if given.dry_run else LENGTHS
    wrong = [line for dtype in DTYPES for width in WIDTHS for line in compare(given.out, device, dtype, width, lengths)]
    print("; ".join(wrong) or "all gradients are right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
