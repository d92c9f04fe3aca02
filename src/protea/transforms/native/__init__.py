"""Attention for training in bfloat16 on CPUs, in C++, compiled on the machine that runs it.

PyTorch's attention gains nothing from a CPU's bfloat16 instructions. This kernel uses them; it needs a C++ compiler and
a processor with AVX-512 BF16. After ``enable``, ``protea.models.attention`` picks it for calls that need gradients.
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

from protea.models.attention import AttentionCall, Kernel, add_kernel, remove_kernel
from protea.packing import CuSeqlens
from protea.transforms.native.library import UnavailableError, compiled, load, use

__all__ = ["NATIVE", "compiled", "disable", "enable"]


def attention(call: AttentionCall) -> Tensor:
    """Softmax attention within each sequence, in bfloat16."""
    out = _Attention.apply(call.q, call.k, call.v, call.cu_q, call.cu_k, call.scale)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        _run("protea_attention_forward", (q, k, v, out, lse), cu_q, cu_k, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = cu_q, cu_k, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _run("protea_attention_backward", (q, k, v, out, lse, dout.contiguous(), dq, dk, dv), *ctx.rest)
        return dq, dk, dv, None, None, None


def _run(name: str, tensors: tuple[Tensor, ...], cu_q: CuSeqlens, cu_k: CuSeqlens, scale: float) -> None:
    library = compiled()
    assert library is not None, "native attention called without being enabled"
    q, k = tensors[:2]
    offsets_q, offsets_k = cu_q.host_offsets, cu_k.host_offsets
    _check(q, offsets_q)
    _check(k, offsets_k)
    # Longest first: otherwise one thread could begin a long sequence when the others are done.
    order = (offsets_q.diff() * offsets_k.diff().long()).argsort(descending=True, stable=True).int()
    pointers = [x.data_ptr() for x in (*tensors, offsets_q, offsets_k, order)]
    function = _function(library, name, len(pointers))
    if function(*pointers, len(order), *q.shape[1:], scale, torch.get_num_threads(), parallel()):
        raise MemoryError("attention ran out of memory")


@cache
def _function(library: ctypes.CDLL, name: str, pointers: int) -> Callable[..., int]:
    function = getattr(library, name)
    sizes = [ctypes.c_int64] * 3
    function.argtypes = [*[ctypes.c_void_p] * pointers, *sizes, ctypes.c_float, ctypes.c_int, ctypes.c_void_p]
    return cast("Callable[..., int]", function)


def _check(x: Tensor, offsets: Tensor) -> None:
    """Refuse tensors for which the compiled code would read outside their memory."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        raise TypeError(f"the compiled attention needs bfloat16 on the CPU, got {x.dtype} on {x.device}")
    if offsets.dtype != torch.int32 or not offsets.is_contiguous() or int(offsets[-1]) != len(x):
        raise ValueError(f"the boundaries do not fit {len(x)} tokens")


@cache
def parallel() -> int | None:
    """The address of ``GOMP_parallel`` in PyTorch's OpenMP; threads of a second OpenMP would compete with PyTorch's."""
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value


_BFLOAT16: Final = frozenset({torch.bfloat16})
NATIVE: Final = Kernel(
    "native", attention, device="cpu", dtypes=_BFLOAT16, head_widths=range(8, 129, 8), gradients=True, inference=False
)


def enable() -> str | None:
    """Compile the kernel or load it from the user's cache, and use it; returns the reason if that is impossible."""
    try:
        loaded = load()
        parallel()  # fails here instead of at the first step
    except UnavailableError as error:
        return str(error)
    except (OSError, AttributeError) as error:  # no library where PyTorch's wheels have it, or another OpenMP
        return f"PyTorch's own OpenMP was not found: {error}"
    use(loaded)
    add_kernel(NATIVE)
    return None


def disable() -> None:
    """Undo ``enable``."""
    remove_kernel(NATIVE)
    use(None)
