"""The compiled functions as a differentiable function of tensors, and the kernel that attention may pick.

Shapes: T tokens, H heads, K head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protea.models.attention import Kernel
from protea.packing import CuSeqlens
from protea.transforms.native.library import compiled


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: CuSeqlens,
    cu_k: CuSeqlens,
    scale: float,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """Softmax attention within each sequence, ``[Tq, H, K]`` and ``[Tk, H, K]`` in bfloat16 to ``[Tq, H, K]``."""
    out = _Attention.apply(q, k, v, cu_q, cu_k, scale)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        _call("protea_attention_forward", (q, k, v, out, lse), cu_q, cu_k, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = cu_q, cu_k, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tensors = (q, k, v, out, lse, dout.contiguous(), dq, dk, dv)
        _call("protea_attention_backward", tensors, *ctx.rest)
        return dq, dk, dv, None, None, None


def _call(name: str, tensors: tuple[Tensor, ...], cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> None:
    loaded = compiled()
    assert loaded is not None, "native attention called without being enabled"
    q, k = tensors[:2]
    offsets_q, offsets_k = cu_q.host_offsets, cu_k.host_offsets
    _check(q, offsets_q)
    _check(k, offsets_k)
    # The longest first, so that no thread begins a long one when the others are through.
    order = (offsets_q.diff() * offsets_k.diff().long()).argsort(descending=True, stable=True).int()
    pointers = [x.data_ptr() for x in (*tensors, offsets_q, offsets_k, order)]
    function = _function(loaded, name, len(pointers))
    if function(*pointers, len(order), *q.shape[1:], scale, torch.get_num_threads(), parallel()):
        raise MemoryError("attention ran out of memory")


@cache
def _function(loaded: ctypes.CDLL, name: str, pointers: int) -> Callable[..., int]:
    function = getattr(loaded, name)
    sizes = [ctypes.c_int64] * 3
    function.argtypes = [*[ctypes.c_void_p] * pointers, *sizes, ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
    return cast("Callable[..., int]", function)


def _check(x: Tensor, offsets: Tensor) -> None:
    """Beyond these the compiled code would read what is not there."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        raise TypeError(f"the compiled attention takes bfloat16 on the CPU, got {x.dtype} on {x.device}")
    if offsets.dtype != torch.int32 or not offsets.is_contiguous() or int(offsets[-1]) != len(x):
        raise ValueError(f"boundaries that do not fit {len(x)} tokens")


@cache
def parallel() -> int | None:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch itself runs: a second one would spin beside it.

    Raises:
        OSError: PyTorch's library is not where its wheels have it.
        AttributeError: it runs another OpenMP.
    """
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value


NATIVE: Final = Kernel(
    "native",
    attention,
    device="cpu",
    dtypes=frozenset({torch.bfloat16}),
    head_widths=range(8, 129, 8),
    gradients=True,
    inference=False,
)
