"""Attention over packed sequences: the kernels, what each supports, and the function that picks one.

Every kernel takes an ``AttentionCall`` and returns ``[Tq, H, K]``. To add a kernel, write the function and its entry in
``KERNELS``. ``benchmarks/attention.py`` measures which kernel is fastest for which shape.

Shapes: T tokens, H heads, K head width, L length of one sequence, n sequences of equal length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from protea.device import native_bfloat16
from protea.native.packed_attention import HEAD_WIDTHS, attention
from protea.native.products import supports
from protea.packing import CuSeqlens, PackedRows


@dataclass(frozen=True)
class HeadMaps:
    """The maps ``[L, L]`` of one sequence in one layer, computed head by head on access, in float32 or better.

    Rows attend to columns. Keys that a layer adds behind a sequence take part in the softmax but are not in the map, so
    rows then sum to less than 1. ``q`` is ``[L, H, K]``, scaled, and ``k`` is ``[>=L, H, K]``; ``bias`` covers both.
    ``relative`` is as in ``AttentionCall``.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    relative: Tensor | None = None

    def __len__(self) -> int:
        return self.q.shape[1]

    def __getitem__(self, head: int) -> Tensor:
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        scores = self.q[:, head].to(dtype) @ self.k[:, head].to(dtype).T
        if self.bias is not None:
            scores = scores + self.bias[head].to(dtype)
        if self.relative is not None:
            scores = scores + by_distance(self.relative[head : head + 1], len(self.q))[0].flip(-1).to(dtype)
        return scores.softmax(-1)[:, : len(self.q)]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[head] for head in range(len(self)))


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of attention: ``q`` ``[Tq, H, K]``, ``k`` and ``v`` ``[Tk, H, K]``.

    Sequence ``b`` attends only to itself: rows ``cu_q[b]:cu_q[b+1]`` to rows ``cu_k[b]:cu_k[b+1]``. It may have no
    queries.

    Attributes:
        scale: factor on ``q·k`` before the softmax.
        bias: ``[H, >=max Lq, >=max Lk]``, added to the scaled scores of every sequence, from its first token on.
        relative: ``[H, 2M-1]``, added to the scaled scores of every sequence of at most M tokens, whose queries are
            its keys: column M-1 + i - j is added for query i and key j.
        dropout: share of probabilities to drop.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: CuSeqlens
    cu_k: CuSeqlens
    scale: float = 1.0
    bias: Tensor | None = None
    relative: Tensor | None = None
    dropout: float = 0.0

    @property
    def needs_gradients(self) -> bool:
        """Whether PyTorch records this call for a backward pass."""
        return torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (self.q, self.k, self.v, self.bias, self.relative)
        )

    def maps(self, sequence: int) -> HeadMaps:
        """The attention maps of one sequence, for observers; no kernel holds those of all heads at once."""
        (q0, q1), (k0, k1) = self.cu_q.spans()[sequence], self.cu_k.spans()[sequence]
        bias = None if self.bias is None else self.bias[:, : q1 - q0, : k1 - k0]
        q = self.q[q0:q1]
        return HeadMaps(q if self.scale == 1.0 else q * self.scale, self.k[k0:k1], bias, self.relative)

    def runs(self) -> list[tuple[slice, slice, int]]:
        """Rows of queries, rows of keys and number of sequences for each run of neighbours of equal lengths."""
        runs = []
        spans = zip(self.cu_q.spans(), self.cu_k.spans(), strict=True)
        for _, neighbours in groupby(spans, key=lambda pair: [end - start for start, end in pair]):
            first, *rest = neighbours
            last = rest[-1] if rest else first
            runs.append((slice(first[0][0], last[0][1]), slice(first[1][0], last[1][1]), 1 + len(rest)))
        return runs


@dataclass(frozen=True)
class Kernel:
    """A kernel and the calls it supports; ``None`` means no restriction.

    ``available`` says whether the machine can run it, and whatever else a call must be like.
    """

    name: str
    run: Callable[[AttentionCall], Tensor]
    device: str | None = None
    dtypes: frozenset[torch.dtype] | None = None
    head_widths: range | None = None
    bias: bool = False
    relative: bool = False
    dropout: bool = False
    gradients: bool = False
    available: Callable[[AttentionCall], bool] = lambda call: True

    def supports(self, call: AttentionCall) -> bool:
        """Whether the kernel can serve this call."""
        q = call.q
        return (
            (self.device is None or self.device == q.device.type)
            and (self.dtypes is None or q.dtype in self.dtypes)
            and (self.head_widths is None or q.shape[-1] in self.head_widths)
            and (self.bias or call.bias is None)
            and (self.relative or call.relative is None)
            and (self.dropout or not call.dropout)
            and (self.gradients or not call.needs_gradients)
            and self.available(call)
        )


def attend(call: AttentionCall, rows: PackedRows | None = None) -> Tensor:
    """Softmax attention within each sequence, ``[Tq, H, K]``, or of some queries, by the best kernel for the call."""
    if rows is None:
        return pick_kernel(call).run(call)
    if call.bias is None and call.relative is None:
        fewer = replace(call, q=call.q.index_select(0, rows.index), cu_q=rows.cu_seqlens)
        if call.needs_gradients or call.q.device.type != "cpu" or pick_kernel(fewer) is not SDPA:
            return attend(fewer)
    # What is added depends on the place of a query in its sequence. And on a CPU, PyTorch computes another number of
    # queries in another order: a query would not have the same bits in every choice.
    return attend(call).index_select(0, rows.index)


def pick_kernel(call: AttentionCall) -> Kernel:
    """The first kernel of ``KERNELS`` that supports the call."""
    return next(kernel for kernel in KERNELS if kernel.supports(call))


def _sdpa(call: AttentionCall) -> Tensor:
    """PyTorch's scaled dot product attention, once for each run of equal lengths."""
    q, k, v = call.q, call.k, call.v
    dtype = q.dtype
    widened = dtype == torch.bfloat16 and q.device.type == "cpu" and call.needs_gradients
    if widened:
        # On CPUs the backward pass in float32 takes a quarter of the time that it takes in bfloat16.
        q, k, v = q.float(), k.float(), v.float()
    runs = call.runs()
    # Split instead of slice: the gradient of every slice would be as long as the whole pack.
    queries = torch.split(q, [rows_q.stop - rows_q.start for rows_q, _, _ in runs])
    keys, values = (torch.split(x, [rows_k.stop - rows_k.start for _, rows_k, _ in runs]) for x in (k, v))
    # Autocast would convert the widened tensors back to bfloat16.
    with torch.autocast("cpu", enabled=False) if widened else nullcontext():
        outputs = [
            _fused(call, queries[i], keys[i], values[i], n) for i, (_, _, n) in enumerate(runs) if len(queries[i])
        ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)


def _fused(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    """One fused call for ``n`` sequences of equal length: ``[n * L, H, K]`` in and out."""
    queries, keys, values = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    length = queries.shape[2]
    mask = None if call.bias is None else call.bias[:, :length, : keys.shape[2]].to(q.dtype)
    if call.relative is not None:
        # The order of keys has no meaning to the kernel.
        keys, values = keys.flip(2), values.flip(2)
        scores = by_distance(call.relative.to(q.dtype), length)
        mask = scores if mask is None else mask.flip(2) + scores
    # PyTorch's fast kernel takes a mask of four axes only.
    mask = None if mask is None else mask[None]
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=call.dropout, scale=call.scale)
    return y.transpose(1, 2).flatten(0, 1)


def by_distance(relative: Tensor, length: int) -> Tensor:
    """Scores ``[H, L, L]`` of queries in order and keys from the last to the first, a view of ``[H, 2M-1]``.

    With the keys in this order, what depends on the distance alone is a matrix whose element (i, j) depends on i + j.
    Such a matrix is a view with equal strides, however long the sequence; see ``AttentionCall.relative``.
    """
    relative = relative.contiguous()
    heads, columns = relative.shape
    return relative.as_strided(
        (heads, length, length), (columns, 1, 1), relative.storage_offset() + columns // 2 + 1 - length
    )


def _native_adds(call: AttentionCall) -> bool:
    """Whether the native library can add what a call adds to its scores: one bias, in float32, without gradients."""
    added = (call.bias is not None) + (call.relative is not None)
    return not added or (added == 1 and call.q.dtype == torch.float32 and not call.needs_gradients)


def _native(call: AttentionCall) -> Tensor:
    """The native library's, with the bits of a sequence the same in every pack."""
    return attention(call.q, call.k, call.v, call.cu_q, call.cu_k, call.scale, call.bias, call.relative)


def _varlen(call: AttentionCall) -> Tensor:
    """PyTorch's FlashAttention for packed sequences."""
    cu_q, cu_k = call.cu_q, call.cu_k
    longest = (cu_q.max_length, cu_k.max_length)
    out = _varlen_attention()(call.q, call.k, call.v, cu_q.offsets, cu_k.offsets, *longest, scale=call.scale)
    assert isinstance(out, Tensor)
    return out


@cache
def _varlen_attention() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    # With the keys in one split, a sequence gets the same bits in any pack; some versions of PyTorch lack the option.
    option: dict[str, Any] = {"num_splits": 1} if "num_splits" in inspect.signature(varlen_attn).parameters else {}
    return partial(varlen_attn, **option)


VARLEN: Final = Kernel(
    "varlen",
    _varlen,
    device="cuda",
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    head_widths=range(8, 257, 8),
    gradients=True,
    available=lambda call: native_bfloat16(call.q.device),
)
NATIVE: Final = Kernel(
    "native",
    _native,
    device="cpu",
    head_widths=HEAD_WIDTHS,
    bias=True,
    relative=True,
    gradients=True,
    available=lambda call: supports(call.q.dtype) and _native_adds(call),
)
SDPA: Final = Kernel("sdpa", _sdpa, bias=True, relative=True, dropout=True, gradients=True)

KERNELS: Final = [VARLEN, NATIVE, SDPA]
"""In order of preference; the last supports every call."""
