"""Attention of the native library on PyTorch's tensors, forward and backward.

Shapes: T tokens of all sequences, H heads, K head width, B sequences.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protea.native.products import TYPES, check_boundaries, check_tensor, run, supports
from protea.packing import CuSeqlens

HEAD_WIDTHS: Final = range(8, 257, 8)

_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class _Attention(ctypes.Structure):
    _fields_ = (
        *(("q", _pointer), ("k", _pointer), ("v", _pointer)),
        *(("q_stride", _number), ("k_stride", _number), ("v_stride", _number)),
        *(("out", _pointer), ("out_stride", _number), ("out_type", _number), ("lse", _pointer)),
        *(("bias", _pointer), ("bias_head_stride", _number)),
        *(("bias_row_stride", _number), ("bias_column_stride", _number)),
        *(("dout", _pointer), ("dq", _pointer), ("dk", _pointer), ("dv", _pointer)),
        *(("cu_q", _pointer), ("cu_k", _pointer), ("order", _pointer)),
        *(("sequences", _number), ("heads", _number), ("width", _number)),
        *(("type", _number), ("scale", ctypes.c_double)),
    )
    kept: tuple[Tensor, ...] = ()  # tensors that must live until the library has run


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """Softmax attention within each sequence, ``[Tq, H, K]``; with gradients, unless there is a bias.

    ``bias`` is ``[H, >=longest, >=longest]``, added to the scaled scores of every sequence, from its first token on;
    ``relative`` is ``[H, 2M-1]`` instead, of which column M-1 + i - j is added for query i and key j.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias, relative)):
        if bias is not None or relative is not None:
            raise ValueError("the native library has no gradients of attention with a bias")
        out = _Differentiable.apply(q, k, v, cu_q, cu_k, scale)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out
    return _forward(q, k, v, cu_q, cu_k, scale, bias, relative)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> Tensor:
        lse = torch.empty(q.shape[1], len(q), dtype=torch.float32)
        out = _forward(q, k, v, cu_q, cu_k, scale, lse=lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = cu_q, cu_k, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call = _call(q, k, v, *ctx.rest)
        dout = dout.contiguous()
        check_tensor(dout, q.dtype)
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        call.out, call.lse, call.dout = out.data_ptr(), lse.data_ptr(), dout.data_ptr()
        call.dq, call.dk, call.dv = (x.data_ptr() for x in gradients)
        run("protea_attention_backward", call)
        return *gradients, None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    call = _call(q, k, v, cu_q, cu_k, scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    call.out, call.out_stride, call.out_type = out.data_ptr(), out.stride(0), TYPES[out.dtype]
    if lse is not None:
        call.lse = lse.data_ptr()
    added = [x.float().contiguous() for x in (bias, relative) if x is not None]
    if added:
        _add_bias(call, added, relative is not None, q, cu_q.max_length, cu_k.max_length)
    run("protea_attention_forward", call)
    return out


def _add_bias(call: _Attention, added: list[Tensor], is_relative: bool, q: Tensor, queries: int, keys: int) -> None:
    if q.dtype != torch.float32 or len(added) > 1:
        raise TypeError(f"the native library adds one bias in float32, not {len(added)} in {q.dtype}")
    (bias,) = added
    check_tensor(bias, torch.float32)
    call.kept += (bias,)
    heads, columns = bias.shape[0], bias.shape[-1]
    rows = bias.shape[1] if bias.dim() == 3 else 0
    if is_relative:
        rows = columns = (columns + 1) // 2 if bias.dim() == 2 and columns % 2 else 0
    if heads != q.shape[1] or rows < queries or columns < keys:
        raise ValueError(f"a bias {tuple(bias.shape)} does not fit {q.shape[1]} heads, {queries} queries, {keys} keys")
    call.bias_head_stride = bias.stride(0)
    if is_relative:
        call.bias, call.bias_row_stride, call.bias_column_stride = bias[:, rows - 1 :].data_ptr(), 1, -1
    else:
        call.bias, call.bias_row_stride, call.bias_column_stride = bias.data_ptr(), columns, 1


def _call(q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> _Attention:
    """The library's arguments for these tensors."""
    if not supports(q.dtype) or q.device.type != "cpu":
        raise TypeError(f"the native library has no attention in {q.dtype} on {q.device}")
    if q.dim() != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:] or q.shape[2] not in HEAD_WIDTHS:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit")
    q, k, v = map(_rows_of_heads, (q, k, v))
    heads, width = q.shape[1:]
    offsets_q, offsets_k = cu_q.host_offsets, cu_k.host_offsets
    for x in (q, k, v):
        check_tensor(x, q.dtype)
    check_boundaries(offsets_q, len(q), len(offsets_k), least=0)
    check_boundaries(offsets_k, len(k), len(offsets_q))
    # Longest first: otherwise one thread could begin a long sequence when the others are done.
    order = (offsets_q.diff() * offsets_k.diff().long()).argsort(descending=True, stable=True).int()
    call = _Attention(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), sequences=len(order), heads=heads, width=width)
    call.q_stride, call.k_stride, call.v_stride = q.stride(0), k.stride(0), v.stride(0)
    call.cu_q, call.cu_k, call.order = offsets_q.data_ptr(), offsets_k.data_ptr(), order.data_ptr()
    call.type, call.scale = TYPES[q.dtype], scale
    call.kept = q, k, v, offsets_q, offsets_k, order
    return call


def _rows_of_heads(x: Tensor) -> Tensor:
    """The same ``[T, H, K]`` with the heads of a token side by side; tokens may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
