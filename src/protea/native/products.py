"""Linear layers of the native library on PyTorch's tensors, with what comes before and after them.

Each call checks what the library cannot: types, shapes and strides, without which it would read other memory.

Shapes: T tokens of all sequences, D inputs and N outputs of a linear layer, K head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

import torch
from torch import Tensor

from protea.errors import UsageError
from protea.native import library, parallel
from protea.packing import CuSeqlens

TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS: Final = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "gelu_slope": 4}
GROUP: Final = 128
"""Inputs, of a token or of an output's weights, that share a scale in int8."""

_ALIGNED: Final = 64
_LANES: Final = 16  # of the widest vectors

_pointer, _number, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_MOVING: Final = (_pointer, _pointer, _number, _number, _number)


class _Linear(ctypes.Structure):
    _fields_ = (
        *(("x", _pointer), ("x_stride", _number), ("x_step", _number), ("x_type", _number)),
        *(("norm_weight", _pointer), ("norm_bias", _pointer)),
        *(("norm_epsilon", _real), ("centred", _number)),
        *(("weight", _pointer), ("w_type", _number), ("w_step", _number)),
        *(("bias", _pointer), ("activation", _number), ("before", _pointer), ("before_stride", _number)),
        *(("cosine", _pointer), ("sine", _pointer), ("angle_stride", _number)),
        *(("head_width", _number), ("rotated", _number), ("residual", _pointer), ("residual_stride", _number)),
        *(("y", _pointer), ("y_stride", _number), ("y_type", _number)),
        *(("rows", _number), ("inputs", _number), ("outputs", _number)),
        *(("cu", _pointer), ("sequences", _number), ("distance", _number)),
    )


def supports(dtype: torch.dtype) -> bool:
    """Whether there is a library for this processor that multiplies a type, and PyTorch need not record it."""
    return dtype in TYPES and bool(_types() & 1 << TYPES[dtype]) and not _is_recorded()


def _is_recorded() -> bool:
    """Whether PyTorch records what is computed, to do it again: it would miss what the library does."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch.compiler.is_exporting()


def _types() -> int:
    return 0 if library() is None else int(_function("protea_types", ctypes.c_int64)())


@dataclass(frozen=True)
class Packed:
    """A weight ``[N, D]`` in the order that the library multiplies."""

    data: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        """Pack a float32 or bfloat16 weight, which may be transposed; every bit can be had again.

        Packed in int8, a weight is rounded: GROUP inputs of an output share a scale.
        """
        weight, dtype = weight.detach(), dtype or weight.dtype
        if dtype == torch.int8:
            weight = weight.float()
        elif dtype != weight.dtype:
            raise TypeError(f"a weight in {weight.dtype} is not packed in {dtype}")
        if not supports(dtype) or weight.device.type != "cpu":
            raise TypeError(f"the native library multiplies no {dtype} on {weight.device}")
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"a weight needs two dimensions with items, got {tuple(weight.shape)}")
        shape, kind = (weight.shape[0], weight.shape[1]), TYPES[dtype]
        size = _function("protea_packed_bytes", _number, *[_number] * 3)(*shape, kind)
        memory = torch.empty(size + _ALIGNED, dtype=torch.uint8)
        data = memory[-memory.data_ptr() % _ALIGNED :][:size]
        pack = _function("protea_pack_linear", None, *_MOVING, _number, _number)
        pack(data.data_ptr(), weight.data_ptr(), *shape, kind, *weight.stride())
        return cls(data, shape, dtype)

    def unpacked(self) -> Tensor:
        """The weight in its original order; one in int8 as it was rounded, in float32."""
        weight = torch.empty(self.shape, dtype=torch.float32 if self.dtype == torch.int8 else self.dtype)
        _function("protea_unpack_linear", None, *_MOVING)(
            weight.data_ptr(), self.data.data_ptr(), *self.shape, TYPES[self.dtype]
        )
        return weight


@dataclass(frozen=True)
class Unpacked:
    """A float32 weight ``[N, D]`` that is multiplied where it lies, with its N items for an input side by side."""

    data: Tensor
    step: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.data.shape[0], self.data.shape[1]

    @classmethod
    def of(cls, weight: Tensor) -> Unpacked | Packed:
        """The weight as it is, if its shape allows that, else packed."""
        weight = weight.detach()
        if weight.dtype != torch.float32 or weight.stride(0) != 1 or weight.shape[0] % (2 * _LANES):
            return Packed.of(weight)
        check_tensor(weight, weight.dtype)
        return cls(weight, weight.stride(1))


@dataclass(frozen=True)
class Turn:
    """Rotary angles for the outputs of a product whose rotary pairs lie side by side.

    ``cosine`` and ``sine`` are ``[T, K + 16]``, each angle twice, and continue from K with those of 0: a vector of
    outputs may begin anywhere in a head. In ``sine``, the first of each pair is negative.
    """

    cosine: Tensor
    sine: Tensor
    head_width: int

    @classmethod
    def of(cls, cosine: Tensor, sine: Tensor) -> Turn:
        """From cosine and sine of the angles, ``[T, 1, K/2]``."""
        width = 2 * cosine.shape[-1]
        places = torch.arange(width + _LANES) % width
        signs = torch.tensor([-1.0, 1.0])[places % 2]
        twice = (x.squeeze(1)[:, places // 2] for x in (cosine, sine))
        cosine, sine = next(twice), next(twice) * signs
        return cls(cosine.contiguous(), sine.contiguous(), width)


def linear(
    x: Tensor,
    weight: Packed | Unpacked,
    bias: Tensor | None = None,
    *,
    norm: torch.nn.LayerNorm | torch.nn.RMSNorm | None = None,
    turn: Turn | None = None,
    turned: int = 0,
    activation: str | None = None,
    before: Tensor | None = None,
    residual: Tensor | None = None,
    narrow: bool = False,
    out: Tensor | None = None,
    distance: int = 0,
    cu: CuSeqlens | None = None,
) -> Tensor:
    """``activation(norm(x) W + bias) + residual``, ``[T, N]`` in float32, or with ``narrow`` in the weight's type.

    ``x`` is ``[T, D]`` in float32 or the weight's type, and rounded to that. The first ``turned`` outputs are rotated
    after the bias. ``before``, ``[T, N]`` of the result's type, receives the input of ``gelu``; ``gelu_slope``
    multiplies by the slope of GELU there. Rows of tensors may lie apart; ``x`` alone may also be transposed in memory.
    ``out`` receives the result, and may be ``residual``. With ``distance``, the result for a token comes from the row
    so far behind it, if that belongs to the same sequence of ``cu``; else the token's row of ``out`` stays as it is.
    """
    if _is_recorded():
        raise UsageError(
            "torch.jit.trace and torch.export cannot record Protea's native library; load the model with "
            "protea.load(..., trainable=True)"
        )
    outputs, inputs = weight.shape
    if activation not in ACTIVATIONS or not 0 <= turned <= outputs or turned % 2 or (turned and turn is None):
        raise ValueError(f"the native library has no activation {activation}, or cannot turn {turned} of {outputs}")
    call = _Linear(rows=len(x), inputs=inputs, outputs=outputs, weight=weight.data.data_ptr())
    call.w_step = weight.step if isinstance(weight, Unpacked) else 0
    call.w_type, call.activation = TYPES[weight.dtype], ACTIVATIONS[activation]
    call.x_step, call.x_type = 1, TYPES.get(x.dtype, 0)
    if x.dim() == 2 and x.stride(0) == 1 != x.stride(1):
        # Inputs that lie apart: the library can do no more than multiply them.
        if norm is not None or x.dtype != torch.float32 or weight.dtype != torch.float32:
            raise ValueError("the native library needs rows whose items lie side by side")
        call.x_stride, call.x_step = 1, x.stride(1)
        call.x, _ = _rows(x.T, torch.float32, len(x), inputs)
    else:
        call.x, call.x_stride = _rows(x, torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32, inputs)
    if bias is not None:
        call.bias = _vector(bias, outputs)
    if norm is not None:
        scale, offset = _widened(norm.weight), _widened(getattr(norm, "bias", None))
        if scale is None:
            raise ValueError("a norm needs weights")
        call.norm_weight = _vector(scale, inputs)
        call.norm_bias = None if offset is None else _vector(offset, inputs)
        call.centred = int(isinstance(norm, torch.nn.LayerNorm))
        call.norm_epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    if turn is not None:
        call.cosine, call.angle_stride = _rows(turn.cosine, torch.float32, turn.head_width + _LANES, len(x))
        call.sine, _ = _rows(turn.sine, torch.float32, turn.head_width + _LANES, len(x))
        call.head_width, call.rotated = turn.head_width, turned
    if residual is not None:
        call.residual, call.residual_stride = _rows(residual, torch.float32, outputs, len(x))
    if distance:
        _read_elsewhere(call, distance, cu, out)
    kind = torch.bfloat16 if narrow and weight.dtype != torch.float32 else torch.float32
    y = torch.empty(len(x), outputs, dtype=kind) if out is None else out
    call.y, call.y_stride = _rows(y, kind, outputs, len(x))
    _remember(call, activation, before, kind)
    call.y_type = TYPES[kind]
    run("protea_linear", call)
    return y


def _remember(call: _Linear, activation: str | None, before: Tensor | None, kind: torch.dtype) -> None:
    if before is not None and activation in ("gelu", "gelu_slope"):
        call.before, call.before_stride = _rows(before, kind, call.outputs, call.rows)
    elif before is not None or activation == "gelu_slope":
        raise ValueError("the slope of GELU needs the input of GELU, which only GELU gives")


def _read_elsewhere(call: _Linear, distance: int, cu: CuSeqlens | None, out: Tensor | None) -> None:
    if cu is None or out is None:
        raise ValueError("a distance needs boundaries of sequences, and rows that may stay as they are")
    offsets = cu.host_offsets
    check_boundaries(offsets, call.rows, len(offsets))
    call.cu, call.sequences, call.distance = offsets.data_ptr(), len(offsets) - 1, distance


def run(name: str, call: ctypes.Structure) -> None:
    """Call a function of the library, with PyTorch's threads."""
    function = _function(name, ctypes.c_int, _pointer, _number, _pointer)
    if function(ctypes.addressof(call), torch.get_num_threads(), parallel()):
        raise MemoryError("the native library ran out of memory")


def check_tensor(x: Tensor, dtype: torch.dtype) -> None:
    """Refuse tensors whose memory the library would read wrongly."""
    if x.dtype != dtype or x.device.type != "cpu":
        raise TypeError(f"the native library needs {dtype} on the CPU, got {x.dtype} on {x.device}")
    if x.numel() and not x.data_ptr():
        raise TypeError(f"the native library needs tensors in memory, got {type(x).__name__}")


def check_boundaries(offsets: Tensor, tokens: int, number: int, *, least: int = 1) -> None:
    """Refuse boundaries of sequences that are not those of so many tokens, at least ``least`` in each."""
    if offsets.dtype != torch.int32 or offsets.device.type != "cpu" or not offsets.is_contiguous():
        raise TypeError("the native library needs boundaries in int32 on the CPU")
    if (
        offsets.shape != (number,)
        or number < 2
        or (int(offsets[0]), int(offsets[-1])) != (0, tokens)
        or bool((offsets.diff() < least).any())
    ):
        raise ValueError(f"boundaries {offsets.tolist()} do not fit {tokens} tokens in {number - 1} sequences")


def _rows(x: Tensor, dtype: torch.dtype, width: int, rows: int | None = None) -> tuple[int, int]:
    """The address of ``[T, width]`` and the distance of its rows."""
    check_tensor(x, dtype)
    if x.dim() != 2 or x.shape[1] != width or (rows is not None and len(x) != rows) or x.stride(1) != 1:
        raise ValueError(f"the native library needs [{'T' if rows is None else rows}, {width}], got {tuple(x.shape)}")
    return x.data_ptr(), x.stride(0)


def _widened(x: Tensor | None) -> Tensor | None:
    """A vector in float32 instead of bfloat16."""
    return x.float() if x is not None and x.dtype == torch.bfloat16 else x


def _vector(x: Tensor, width: int) -> int:
    check_tensor(x, torch.float32)
    if x.shape != (width,) or not x.is_contiguous():
        raise ValueError(f"the native library needs [{width}], got {tuple(x.shape)}")
    return x.data_ptr()


@cache
def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    found = library()
    assert found is not None, "the native library was called, but is not there"
    function = getattr(found, name)
    function.restype, function.argtypes = result, arguments
    return cast("Callable[..., Any]", function)
