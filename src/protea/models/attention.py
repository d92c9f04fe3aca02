"""Attention over packed sequences: the kernels, what each supports, and the one function that picks.

All kernels share one signature and one layout: ``q`` is ``[Tq, H, K]``, ``k`` and ``v`` are ``[Tk, H, K]``, and
sequence ``b`` attends to itself alone, rows ``cu_q[b]:cu_q[b+1]`` against rows ``cu_k[b]:cu_k[b+1]``. To add a
kernel, write the function and its entry in ``KERNELS``, or hand it to ``add_kernel`` where it must be asked for;
nothing else in the package changes. Which kernel wins for which shape was measured by ``benchmarks/attention.py``.

Shapes: T tokens, H heads, K head width, L length of one sequence, n sequences of equal length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from protea.device import native_bfloat16
from protea.packing import CuSeqlens

_SCORE_BLOCK_BYTES: Final = 4 << 20
"""Scores the product kernel computes at once: a few megabytes stay in the caches of current CPUs."""

_MIN_BLOCK_ROWS: Final = 32
"""Query rows a block has at least, however long the keys: fewer waste the product's rate."""


_LEAST_TOTAL, _MOST_TOTAL = 1e-30, 1e35
"""Sums of exponentials between which none of them has left the range of bfloat16 unnoticed."""


class KernelFunction(Protocol):
    """The signature all kernels share."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        scale: float,
        bias: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """The arguments of ``attend``, which documents them, all by position."""


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it can do; ``None`` means no restriction.

    Attributes:
        name: what reports and benchmarks call it.
        run: the function.
        device: device type it runs on.
        dtypes: element types it takes.
        head_widths: head widths it takes.
        bias: takes an additive bias.
        dropout: can drop attention probabilities.
        gradients: can be differentiated.
        inference: serves calls without gradients too.
        available: whether this machine has what the kernel needs.
    """

    name: str
    run: KernelFunction
    device: str | None = None
    dtypes: frozenset[torch.dtype] | None = None
    head_widths: range | None = None
    bias: bool = False
    dropout: bool = False
    gradients: bool = False
    inference: bool = True
    available: Callable[[torch.device], bool] = lambda device: True

    def supports(self, q: Tensor, *, bias: bool, dropout: bool, gradients: bool) -> bool:
        """Whether the kernel can serve this call."""
        return (
            (self.device is None or self.device == q.device.type)
            and (self.dtypes is None or q.dtype in self.dtypes)
            and (self.head_widths is None or q.shape[-1] in self.head_widths)
            and (self.bias or not bias)
            and (self.dropout or not dropout)
            and (self.gradients if gradients else self.inference)
            and self.available(q.device)
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention within each sequence of a packed batch, by the best kernel for the call.

    Args:
        q: ``[Tq, H, K]``.
        k: ``[Tk, H, K]``.
        v: ``[Tk, H, K]``.
        cu_q: boundaries of the queries.
        cu_k: boundaries of the keys; as many sequences as ``cu_q``.
        scale: factor on ``q·k`` before the softmax.
        bias: ``[H, >=max Lq, >=max Lk]``, added to the scaled scores of every sequence, from its first token on.
        dropout: share of probabilities dropped.

    Returns:
        ``[Tq, H, K]``.
    """
    kernel = pick_kernel(q, k, v, bias=bias is not None, dropout=dropout > 0)
    return kernel.run(q, k, v, cu_q, cu_k, scale, bias, dropout)


def pick_kernel(q: Tensor, k: Tensor, v: Tensor, *, bias: bool = False, dropout: bool = False) -> Kernel:
    """The first kernel of ``KERNELS`` that supports the call."""
    gradients = _needs_gradients(q, k, v)
    return next(kernel for kernel in KERNELS if kernel.supports(q, bias=bias, dropout=dropout, gradients=gradients))


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _spans(cu_q: CuSeqlens, cu_k: CuSeqlens) -> Iterator[tuple[slice, slice]]:
    for (q0, q1), (k0, k1) in zip(cu_q.spans(), cu_k.spans(), strict=True):
        yield slice(q0, q1), slice(k0, k1)


def _runs(cu_q: CuSeqlens, cu_k: CuSeqlens) -> list[tuple[slice, slice, int]]:
    """Neighbouring sequences of equal lengths together: their rows, and how many they are."""
    runs: list[tuple[slice, slice, int]] = []
    previous: tuple[int, int] | None = None
    for rows_q, rows_k in _spans(cu_q, cu_k):
        lengths = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        if lengths == previous:
            first_q, first_k, count = runs[-1]
            runs[-1] = slice(first_q.start, rows_q.stop), slice(first_k.start, rows_k.stop), count + 1
        else:
            runs.append((rows_q, rows_k, 1))
        previous = lengths
    return runs


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """The definition, a sequence at a time, in float32 or better."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    outputs: list[Tensor] = []
    for rows_q, rows_k in _spans(cu_q, cu_k):
        queries, keys, values = (x.to(dtype).transpose(0, 1) for x in (q[rows_q], k[rows_k], v[rows_k]))
        scores = queries @ keys.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[:, : scores.shape[1], : scores.shape[2]]
        probs = scores.softmax(-1)
        outputs.append((F.dropout(probs, dropout) @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """PyTorch's scaled dot product attention, one call for each run of equal lengths."""
    dtype = q.dtype
    widened = dtype == torch.bfloat16 and q.device.type == "cpu" and _needs_gradients(q, k, v)
    if widened:
        q, k, v = q.float(), k.float(), v.float()  # whose backward pass takes a quarter of bfloat16's
    runs = _runs(cu_q, cu_k)
    # Split, not sliced: the gradient of a slice is a tensor as long as the pack, for every sequence.
    queries = torch.split(q, [rows_q.stop - rows_q.start for rows_q, _, _ in runs])
    keys, values = (torch.split(x, [rows_k.stop - rows_k.start for _, rows_k, _ in runs]) for x in (k, v))
    # Autocast would narrow them again.
    with torch.autocast("cpu", enabled=False) if widened else nullcontext():
        outputs = [_fused(queries[i], keys[i], values[i], n, scale, bias, dropout) for i, (_, _, n) in enumerate(runs)]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, n: int, scale: float, bias: Tensor | None, dropout: float) -> Tensor:
    """One fused call for ``n`` sequences of equal length: ``[n * L, H, K]`` in and out."""
    queries, keys, values = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias[:, : queries.shape[2], : keys.shape[2]].to(q.dtype)
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
    return y.transpose(1, 2).flatten(0, 1)


def _product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """Two batched products with a softmax between, in blocks whose scores stay in cache.

    On CPUs that multiply bfloat16 this beats the fused kernel, which gains nothing from that type. Short
    sequences of equal length share a block; long ones are cut into blocks of query rows.
    """
    if scale != 1.0:
        q = q * scale
    heads, width = q.shape[1:]
    out = torch.empty_like(q)
    limit = _SCORE_BLOCK_BYTES // q.element_size()
    # One buffer a call: fresh megabytes for every block would be page faults for every block.
    buffer = torch.empty(max(limit, heads * cu_k.max_length * _MIN_BLOCK_ROWS), dtype=q.dtype)
    for rows_q, rows_k, n in _runs(cu_q, cu_k):
        length_q, length_k = (rows_q.stop - rows_q.start) // n, (rows_k.stop - rows_k.start) // n
        if _fused_is_faster(n, length_k, width):
            out[rows_q] = _fused(q[rows_q], k[rows_k], v[rows_k], n, 1.0, None, 0.0)
            continue
        # Sequences side by side are copied into order; a quarter of the limit keeps the copies in cache too.
        together = max(1, min(n, limit // (4 * heads * length_q * max(length_k, width))))
        step = min(length_q, max(_MIN_BLOCK_ROWS, limit // (heads * length_k)))
        for first in range(0, n, together):
            last = min(first + together, n)
            some_q = slice(rows_q.start + first * length_q, rows_q.start + last * length_q)
            some_k = slice(rows_k.start + first * length_k, rows_k.start + last * length_k)
            _product_of_equals(q[some_q], k[some_k], v[some_k], out[some_q], last - first, step, buffer)
    return out


def _product_of_equals(q: Tensor, k: Tensor, v: Tensor, out: Tensor, count: int, step: int, buffer: Tensor) -> None:
    """``count`` sequences of equal length, ``step`` query rows of each at a time, into ``out``."""
    queries, keys, values = _heads_first(q, count), _heads_first(k, count), _heads_first(v, count)
    if step < queries.shape[1]:
        keys, values = keys.contiguous(), values.contiguous()
    keys = keys.transpose(1, 2)
    target = out.view(count, -1, *out.shape[1:]).transpose(1, 2)
    for row in range(0, queries.shape[1], step):
        part = queries[:, row : row + step]
        shape = (len(part), part.shape[1], keys.shape[2])
        scores = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        mean = _weighted_mean(torch.bmm(part, keys, out=scores), values)
        if mean is None:
            mean = torch.bmm(torch.bmm(part, keys, out=scores).softmax(-1), values)
        target[:, :, row : row + step] = mean.view(count, -1, *part.shape[1:])


def _weighted_mean(scores: Tensor, values: Tensor) -> Tensor | None:
    """Softmax of the scores times the values, the scores overwritten; ``None`` where they are too large or small.

    Without subtracting the largest score first and without normalising the probabilities, which doubles the rate. No
    precision is lost: bfloat16 has float32's range, and scores of trained models stay far within it.
    """
    weights = scores.exp_()
    total = weights.sum(-1, keepdim=True)
    least, most = total.aminmax()
    if not _LEAST_TOTAL < least.item() <= most.item() < _MOST_TOTAL:
        return None
    return torch.bmm(weights, values).div_(total)


def _fused_is_faster(count: int, length: int, width: int) -> bool:
    """Where the product loses, as measured: a short sequence that shares no call, and narrow heads on many keys."""
    lone_and_short = count == 1 and length < (64 if width <= 32 else 32)
    return lone_and_short or (width < 32 and length >= 2048)


def _heads_first(x: Tensor, count: int) -> Tensor:
    """``[count * L, H, K]`` to ``[count * H, L, K]``; a view when ``count`` is 1."""
    if count == 1:
        return x.transpose(0, 1)
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2).flatten(0, 1)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """PyTorch's FlashAttention for packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    # One split of the keys, where PyTorch lets us say so: the same bits for a sequence in any pack.
    invariant: dict[str, Any] = {"num_splits": 1} if "num_splits" in _varlen_parameters() else {}
    longest = (cu_q.max_length, cu_k.max_length)
    out = varlen_attn(q, k, v, cu_q.offsets, cu_k.offsets, *longest, scale=scale, **invariant)
    assert isinstance(out, Tensor)
    return out


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


_HALF: Final = frozenset({torch.float16, torch.bfloat16})

VARLEN: Final = Kernel(
    "varlen",
    _varlen,
    device="cuda",
    dtypes=_HALF,
    head_widths=range(8, 257, 8),
    gradients=True,
    available=_has_flash,
)
PRODUCT: Final = Kernel(
    "product", _product, device="cpu", dtypes=frozenset({torch.bfloat16}), available=native_bfloat16
)
SDPA: Final = Kernel("sdpa", _sdpa, bias=True, dropout=True, gradients=True)
REFERENCE: Final = Kernel("reference", _reference, bias=True, dropout=True, gradients=True)
"""What the others are compared with; never picked."""

KERNELS: Final = [VARLEN, PRODUCT, SDPA]
"""In order of preference; the last supports everything. These are always there."""


def add_kernel(kernel: Kernel) -> None:
    """Have one more kernel considered in this process, before ``PRODUCT``; adding it twice changes nothing."""
    if kernel not in KERNELS:
        KERNELS.insert(KERNELS.index(PRODUCT), kernel)


def remove_kernel(kernel: Kernel) -> None:
    """Have a kernel that was added considered no longer; removing it twice changes nothing."""
    if kernel in KERNELS:
        KERNELS.remove(kernel)
