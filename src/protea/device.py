"""Which device and which floating-point type to compute with, from what a user typed."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

from protea.errors import DeviceError, UsageError

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of a name: ``auto`` is the first GPU, else the CPU.

    Apple's ``mps`` is used when asked for, never by ``auto``: nothing here was tested on it.

    Raises:
        UsageError: the name is no device.
        DeviceError: this machine, or this build of PyTorch, has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "this PyTorch is a CPU build" if torch.version.cuda is None else "no GPU or driver was found"
            raise DeviceError(f"device {name!r} is not available: {why}; use --device cpu, or install PyTorch for CUDA")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"device {name!r} is not available: this machine has {torch.cuda.device_count()} GPUs")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError(f"device {name!r} is not available on this machine; use --device cpu")
    elif device.type != "cpu":
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """The floating-point type of a name.

    Raises:
        UsageError: the name is none of float32, bfloat16, float16.
    """
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}; use {', '.join(DTYPES)}")
    return DTYPES[name]


@cache
def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself: GPUs from Ampere on, CPUs with AVX-512 BF16, AMX or Arm's BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device; of a GPU what PyTorch keeps for reuse included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_memory()


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping; 8 GB where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:  # noqa: PTH123  no path of the user's
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30
