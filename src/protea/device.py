"""The device and floating-point type of a run, from their names; freed memory."""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache
from typing import Any, Final

import torch

from protea.errors import DeviceError, UsageError

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MIXED: Final = "bf16-mixed"
"""A name beside those of ``DTYPES`` for what a model computes in: products in bfloat16, the rest in float32."""

QUANTIZED: Final = "int8"
"""Another: products in int8, attention in bfloat16 where the processor has it, the rest in float32; only on CPUs."""


def resolve_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the first GPU, else the CPU, but never Apple's untested ``mps``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "this PyTorch is a CPU build" if torch.version.cuda is None else "no GPU or driver was found"
            raise DeviceError(f"device {name!r} is not available: {why}; use cpu, or install PyTorch for CUDA")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"device {name!r} is not available: the last GPU is cuda:{torch.cuda.device_count() - 1}")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError(f"device {name!r} is not available on this machine; use cpu")
    elif device.type != "cpu":
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """The floating-point type of a name; ``UsageError`` if it is not in ``DTYPES``."""
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}; use {', '.join(DTYPES)}")
    return DTYPES[name]


@cache
def native_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16: GPUs since Ampere, CPUs with AVX-512 BF16, AMX or Arm's BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and any(_able(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@cache
def has_matrix_unit() -> bool:
    """Whether the processor has AMX: PyTorch multiplies bfloat16 with it, several times faster than in vectors."""
    return _able("amx_bf16")


def _able(capability: str) -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get(capability, False))


# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_SECONDS: Final = 10.0
_last_returned = 0.0


def return_freed_memory(*, between_packs: bool = False) -> None:
    """Return freed memory to the system, also the memory between small blocks of the heap that are still in use.

    With ``between_packs``, do it at most every ten seconds: if memory is never returned, it grows for hours; returned
    after each pack, it costs page faults.
    """
    global _last_returned  # noqa: PLW0603  the process has one heap
    now = time.monotonic()
    if between_packs and now - _last_returned < _SECONDS:
        return
    _last_returned = now
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next pack: memory that comes back from the system costs page faults."""
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)  # only the main arena may grow without bounds


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
