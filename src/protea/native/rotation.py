"""Rotation of queries and keys by rotary angles, of the native library on PyTorch's tensors.

Shapes: T tokens, H heads, K head width.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from protea.native.products import TYPES, check_tensor, run, supports

HEAD_WIDTHS: Final = range(8, 4097, 8)

_pointer, _number, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Rotation(ctypes.Structure):
    _fields_ = (
        *(("x", _pointer), ("y", _pointer), ("x_stride", _number), ("y_stride", _number), ("type", _number)),
        *(("cosine", _pointer), ("sine", _pointer)),
        *(("rows", _number), ("heads", _number), ("width", _number), ("back", _number), ("factor", _real)),
    )


def rotate(
    x: Tensor, cosine: Tensor, sine: Tensor, factor: float = 1.0, *, back: bool = False, out: Tensor | None = None
) -> Tensor:
    """``[T, H, K]`` times a factor, rotated as ``models.layers.rotate`` does, or ``back`` by the negative angles.

    ``cosine`` and ``sine`` are ``[T, 1, K/2]`` in float32. ``out`` receives the result, and may be ``x``. Tokens
    may lie apart in both.
    """
    if x.dim() != 3 or x.shape[-1] not in HEAD_WIDTHS or not supports(x.dtype):
        raise ValueError(f"the native library rotates no {tuple(x.shape)} in {x.dtype}")
    rows, heads, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    for tensor in (x, y):
        check_tensor(tensor, x.dtype)
        if tensor.shape != x.shape or tensor.stride()[1:] != (width, 1):
            raise ValueError(f"the native library needs heads side by side, got strides {tensor.stride()}")
    for angles in (cosine, sine):
        check_tensor(angles, torch.float32)
        if angles.shape != (rows, 1, width // 2) or not angles.is_contiguous():
            raise ValueError(f"the native library needs angles [{rows}, 1, {width // 2}], got {tuple(angles.shape)}")
    call = _Rotation(x=x.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0), y_stride=y.stride(0), type=TYPES[x.dtype])
    call.cosine, call.sine = cosine.data_ptr(), sine.data_ptr()
    call.rows, call.heads, call.width, call.back, call.factor = rows, heads, width, int(back), factor
    run("protea_rotate", call)
    return y
